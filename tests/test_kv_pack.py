"""Quantising and packing: the error bounds, the bytes, and data that breaks careless code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infer_patch.kernels.kv_pack import (
    BITS,
    channel_factors,
    dequantise,
    pack,
    quantise,
    quantise_and_pack,
    round_down,
    unpack,
)

KINDS = ["random", "constant", "zero", "outlier channel", "outlier token", "huge offset", "tiny", "beyond fp16", "ramp"]
FP32 = 2.0**-22  # of a value's size: what computing code * step + low in fp32 may cost


def data(kind, seed, shape=(2, 3, 40, 32)):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "constant":
        x = torch.full(shape, 0.1 + seed % 7)
    elif kind == "zero":
        x = torch.zeros(shape)
    elif kind == "outlier channel":
        x[..., 5] = x[..., 5] * 300 + 900
    elif kind == "outlier token":
        x[..., 3, :] *= 5000
    elif kind == "huge offset":
        x = x * 0.01 + 30000
    elif kind == "tiny":
        x = x * 1e-9
    elif kind == "beyond fp16":
        x = x * 1e6
    elif kind == "ramp":
        x = torch.arange(x.numel(), dtype=torch.float32).view(shape) / 100
    return x


def in_groups(kv, size, keys):
    """rows [1, 1, n, size] of the first keys, in order."""
    return torch.arange(keys).view(1, 1, -1, size).expand(kv.shape[0], -1, -1, -1)


def packed(kind, seed, bits, size=20, implementation="cpu"):
    k, v = data(kind, seed), data(kind, seed + 1)
    groups = quantise_and_pack(k, v, in_groups(k, size, 40), bits, implementation=implementation)
    return k.unflatten(2, (-1, size)), v.unflatten(2, (-1, size)), groups


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.sampled_from(BITS))
def test_every_element_is_within_half_a_stored_step(kind, seed, bits):
    k, v, groups = packed(kind, seed, bits)
    k = k.clamp(-65504, 65504)
    k2, v2 = dequantise(groups)
    assert k2.isfinite().all() and v2.isfinite().all()
    step = groups.key_step.float()[..., None, :] / 2
    slack = FP32 * (k.abs() + groups.key_low.float().abs()[..., None, :] + 2 * step * 2**bits)
    assert ((k2 - k).abs() <= step + slack).all()
    channel, step = groups.channel.float()[..., None, :], groups.value_step.float()[..., None] / 2
    scaled = v / channel
    slack = channel * FP32 * (scaled.abs() + groups.value_low.float().abs()[..., None] + 2 * step * 2**bits)
    assert ((v2 - v).abs() <= channel * step + slack).all()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.sampled_from(BITS))
def test_the_ends_of_a_range_come_back(kind, seed, bits):
    """Minimum and maximum are exact up to the rounding of the parameters to fp16."""
    k, _, groups = packed(kind, seed, bits)
    k = k.clamp(-65504, 65504)
    back, _ = dequantise(groups)
    low, high = k.amin(-2, keepdim=True), k.amax(-2, keepdim=True)
    rounding = 2.0**-10 * (low.abs() + high.abs()) + 2.0**-23 * 2**bits
    for end in (low, high):
        at_end = k == end
        assert ((back - k).abs() <= rounding)[at_end].all()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10**6))
def test_one_more_bit_halves_the_step_at_least(kind, seed):
    x = data(kind, seed, (6, 24)).clamp(-65504, 65504)
    widest = (x.amax(1) - x.amin(1)).clamp(min=1e-3)
    steps = [quantise(x, bits, 1)[1].float() for bits in range(2, 9)]
    for few, more, bits in zip(steps, steps[1:], range(2, 8)):
        varied = few != 1  # 1 stands for "all the same"
        slack = (
            2.0**-9 * (widest + x.abs().amax(1)) / 2**bits + 2.0**-24
        )  # both were rounded up, from a minimum rounded down
        assert (more <= few / 2 + slack)[varied].all()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.sampled_from(BITS))
def test_coding_the_same_group_again_gives_the_same_codes(kind, seed, bits):
    x = data(kind, seed, (6, 24))
    codes, step, low = quantise(x, bits, 1)
    again, _, _ = quantise((codes.float() * step.float()[:, None] + low.float()[:, None]), bits, 1)
    whole = (codes.amax(1) == 2**bits - 1) & (
        codes.amin(1) == 0
    )  # where rounding left the last code free, ranges shrink
    assert torch.equal(again[whole], codes[whole])


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e6, 1e6, width=32))
def test_rounding_down_to_fp16(x):
    x = torch.tensor([x, -x])
    below = round_down(x).float()
    clipped = x.clamp(-65504, 65504)
    assert (below <= clipped).all()
    assert (clipped - below <= 2.0**-10 * clipped.abs() + 2.0**-24).all()


@pytest.mark.parametrize("kind", KINDS)
def test_channel_factors_are_never_zero(kind):
    c = channel_factors(data(kind, 0))
    assert c.dtype == torch.float16 and c.isfinite().all() and (c > 0).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_packing_is_planar_and_comes_back(bits, size):
    codes = torch.randint(0, 2**bits, (3, 5, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    bytes_ = pack(codes, bits)
    planes = 8 // bits
    width = size // planes
    assert bytes_.shape == (3, 5, width)
    for j in range(planes):  # byte i holds channel j D / f + i in its bits from b j on
        assert torch.equal((bytes_ >> bits * j) & (2**bits - 1), codes[..., j * width : (j + 1) * width])
    assert torch.equal(unpack(bytes_, bits), codes.float())


@pytest.mark.parametrize("bits", [*BITS, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_both_implementations_agree(bits, dtype):
    k, v = (data("random", seed, (2, 3, 200, 48)).to(dtype) for seed in (0, 1))
    rows = torch.stack([torch.randperm(200)[:96].view(1, 6, 16) for _ in range(2)])
    a, b = (quantise_and_pack(k, v, rows, bits, implementation=name) for name in ("reference", "cpu"))
    for name, value in a.tensors().items():
        assert torch.equal(value, b.tensors()[name]), name
    fewer = [quantise_and_pack(k, v, rows, bits, implementation=name, value_bits=2) for name in ("reference", "cpu")]
    for name, value in fewer[0].tensors().items():
        assert torch.equal(value, fewer[1].tensors()[name]), name
    for x, back in zip((k, v), dequantise(a, dtype)):
        taken = x[:, :, rows[0, 0].flatten()]
        if bits == 16:
            assert torch.equal(back[0].flatten(1, 2), taken[0])
        else:
            assert (back[0].flatten(1, 2) - taken[0]).abs().max() < {2: 2.0, 4: 0.6, 8: 0.06}[bits]


def test_samples_do_not_share_parameters():
    """A sample gets the codes it gets alone (the released channel statistics run over the batch)."""
    k, v = data("random", 0), data("random", 1)
    k[1] *= 100
    rows = in_groups(k, 20, 40)
    both = quantise_and_pack(k, v, rows, 4).tensors()
    alone = quantise_and_pack(k[:1], v[:1], rows[:1], 4).tensors()
    assert all(torch.equal(both[name][:1], value) for name, value in alone.items())


def test_codes_do_not_carry_into_their_neighbours():
    """Out-of-range codes would spill over into the next field of a byte."""
    x = torch.tensor([[0.0, 1.0, 65504.0, -65504.0, 1e30, -1e30, 3.0, 4.0]]).T.repeat(1, 8)
    for bits in BITS:
        codes, _, _ = quantise(x, bits, 0)
        assert codes.max() <= 2**bits - 1
        assert torch.equal(unpack(pack(codes, bits), bits), codes.float())
