"""Attention over packed groups: equal to dequantising first, in any order and any split; probe scores."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infer_patch.kernels.kv_pack import BITS, Groups, dequantise, quantise_and_pack
from infer_patch.kernels.packed_attention import attend_groups, attend_rows, merge, packed_attention
from infer_patch.kernels.probe_scores import probe_scores, probes_that_see


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(seed, bits, n=3, size=32, batch=2, heads=2, dim=48, fillers=False, value_bits=None):
    k, v = random(seed, batch, heads, n * size, dim), random(seed + 1, batch, heads, n * size, dim)
    k[..., 3] += 20  # an outlier channel
    rows = torch.arange(n * size).view(1, 1, n, size).expand(batch, -1, -1, -1)
    valid = None
    if fillers:
        valid = torch.randint(1, size + 1, (batch, 1, n), generator=torch.Generator().manual_seed(seed))
        valid = valid.expand(-1, heads, -1).int().contiguous()
    return quantise_and_pack(k, v, rows, bits, valid, value_bits=value_bits)


def dense(q, packed, keys, values, scale, visible=None):
    """Everything dequantised, one softmax in fp64."""
    all_keys, all_values, hidden = [keys.double()], [values.double()], []
    batch, heads, rows = keys.shape[:3]
    seen = torch.ones(batch, q.shape[2], rows, dtype=torch.bool) if visible is None else visible
    hidden.append(~seen[:, None].expand(-1, heads, -1, -1))
    for groups in packed:
        k, v = dequantise(groups)
        all_keys.append(k.flatten(2, 3).double())
        all_values.append(v.flatten(2, 3).double())
        size, valid = groups.size, groups.valid
        filler = torch.zeros(k.shape[:4], dtype=torch.bool)
        if valid is not None:
            filler = torch.arange(size) >= valid[..., None]
        hidden.append(filler.flatten(2)[:, :, None].expand(-1, -1, q.shape[2], -1))
    group = q.shape[1] // heads
    k, v, gone = (torch.cat(x, d) for x, d in ((all_keys, 2), (all_values, 2), (hidden, 3)))
    k, v, gone = (x.repeat_interleave(group, 1) for x in (k, v, gone))
    scores = (q.double() @ k.mT * scale).masked_fill(gone, float("-inf"))
    return scores.softmax(-1) @ v


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(st.sampled_from([*BITS, 16]), min_size=0, max_size=3),
    st.sampled_from([1, 5]),
    st.booleans(),
    st.sampled_from(["cpu", "reference"]),
)
def test_equal_to_dequantising_first(seed, widths, queries, fillers, implementation):
    packed = [make(seed + i, bits, n=i + 1, fillers=fillers) for i, bits in enumerate(widths)]
    q, keys, values = random(seed, 2, 4, queries, 48), random(seed + 7, 2, 2, 9, 48), random(seed + 8, 2, 2, 9, 48)
    visible = torch.arange(9) <= torch.arange(9 - queries, 9)[:, None]
    visible = visible.expand(2, -1, -1)
    out = packed_attention(q, packed, keys, values, 0.1, visible, implementation)
    torch.testing.assert_close(out.double(), dense(q, packed, keys, values, 0.1, visible), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("bits, value_bits", [(4, 2), (8, 2), (8, 4), (2, 4)])
def test_values_in_other_bits_than_keys(bits, value_bits, implementation):
    packed = [make(0, bits, value_bits=value_bits), make(3, 4, fillers=True)]
    q, keys, values = random(0, 2, 4, 3, 48), random(7, 2, 2, 9, 48), random(8, 2, 2, 9, 48)
    out = packed_attention(q, packed, keys, values, 0.1, implementation=implementation)
    torch.testing.assert_close(out.double(), dense(q, packed, keys, values, 0.1), atol=2e-4, rtol=2e-4)
    assert packed[0].value_codes.shape[-1] == 48 * value_bits // 8 != packed[0].key_codes.shape[-1]


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", BITS)
def test_head_sizes(dim, bits):
    packed = [make(0, bits, dim=dim)]
    q, keys, values = random(0, 2, 4, 1, dim), random(7, 2, 2, 9, dim), random(8, 2, 2, 9, dim)
    out = packed_attention(q, packed, keys, values, dim**-0.5)
    torch.testing.assert_close(out.double(), dense(q, packed, keys, values, dim**-0.5), atol=2e-4, rtol=2e-4)


def test_the_order_of_keys_means_nothing():
    groups = make(3, 16, n=4)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = replace(groups, key_codes=groups.key_codes[:, :, order], value_codes=groups.value_codes[:, :, order])
    q, keys, values = random(0, 2, 4, 1, 48).double(), random(1, 2, 2, 5, 48), random(2, 2, 2, 5, 48)
    a, b = (dense(q, [x], keys, values, 0.2) for x in (groups, shuffled))
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    a, b = (packed_attention(q.float(), [x], keys, values, 0.2) for x in (groups, shuffled))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_merging_three_parts_is_one_softmax():
    q, k, v = random(0, 1, 2, 3, 16).double(), random(1, 1, 2, 30, 16).double(), random(2, 1, 2, 30, 16).double()
    whole = (q @ k.mT).softmax(-1) @ v

    def part(rows):
        scores = q @ k[:, :, rows].mT
        return scores.softmax(-1) @ v[:, :, rows], scores.logsumexp(-1)

    parts = [part(slice(0, 4)), part(slice(4, 20)), part(slice(20, 30))]
    torch.testing.assert_close(merge(parts), whole, atol=1e-12, rtol=1e-12)
    out, lse = attend_rows(q.float(), k.float(), v.float())
    torch.testing.assert_close(out.double(), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), (q @ k.mT).logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_a_row_that_sees_nothing_is_no_nan():
    packed = [make(0, 4)]
    packed = [replace(packed[0], valid=torch.zeros(2, 2, 3, dtype=torch.int32))]
    q, keys, values = random(0, 2, 4, 1, 48), random(1, 2, 2, 3, 48), random(2, 2, 2, 3, 48)
    out = packed_attention(q, packed, keys, values, 0.1)
    torch.testing.assert_close(out.double(), dense(q, [], keys, values, 0.1), atol=1e-4, rtol=1e-4)
    empty, lse = attend_groups(random(0, 2, 2, 2, 48), packed[0])
    assert empty.isfinite().all() and (lse < -1e29).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(BITS))
def test_scores_and_outputs_stay_within_their_bounds(seed, bits):
    """|d(q k)| <= sum |q_d| key_step_d / 2, and the output moves by (e^(2 eps) - 1) max |v| + max c value_step / 2."""
    k, v, q = random(seed, 1, 1, 64, 32), random(seed + 1, 1, 1, 64, 32), random(seed + 2, 1, 1, 4, 32) / 4
    rows = torch.arange(64).view(1, 1, 2, 32)
    groups = quantise_and_pack(k, v, rows, bits)
    k2 = dequantise(groups)[0].flatten(2, 3)
    shift = (q.abs() @ groups.key_step.float().mT / 2).repeat_interleave(32, -1)  # [1, 1, 4, 64]
    assert ((q @ (k2 - k).mT).abs() <= shift + 1e-4).all()
    eps = shift.amax()
    element = (groups.channel.float()[..., None, :] * groups.value_step.float()[..., None] / 2).amax()
    moved = packed_attention(q, [groups], k[:, :, :0], v[:, :, :0], 1.0) - (q @ k.mT).softmax(-1) @ v
    assert moved.abs().amax() <= (torch.exp(2 * eps) - 1) * v.abs().amax() + element + 1e-4


def test_a_map_keeps_what_is_not_a_tensor():
    groups = make(0, 4)
    moved = groups.map(lambda x: x[:, :, :1])
    assert isinstance(moved, Groups) and moved.bits == 4 and moved.key_codes.shape[2] == 1 and moved.valid is None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 90), st.integers(1, 12), st.sampled_from(["cpu", "reference"]))
def test_probe_scores_are_softmax_rows_summed(seed, keys, probes, implementation):
    probes = min(probes, keys)
    q, k = random(seed, 2, 4, probes, 16), random(seed + 1, 2, 2, keys, 16)
    at = torch.stack([torch.randperm(keys, generator=torch.Generator().manual_seed(seed + b))[:probes] for b in (0, 1)])
    mass = probe_scores(q, k, 0.3, at, implementation=implementation)
    scores = q @ k.repeat_interleave(2, 1).mT * 0.3
    rows = scores.masked_fill(torch.arange(keys) > at[:, None, :, None], float("-inf")).softmax(-1)
    torch.testing.assert_close(mass, rows.sum(2).unflatten(1, (2, 2)).sum(2), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mass.sum(-1), torch.full((2, 2), 2.0 * probes), atol=1e-3, rtol=1e-4)  # rows sum to 1
    expected = (torch.arange(keys)[:, None] <= at[:, None]).sum(-1)
    assert torch.equal(probes_that_see(at, torch.arange(keys).expand(2, -1)), expected)


def test_probe_scores_in_many_blocks(monkeypatch):
    from infer_patch.kernels import probe_scores as module

    q, k, at = random(0, 1, 4, 8, 16), random(1, 1, 2, 700, 16), torch.arange(692, 700)[None]
    whole = probe_scores(q, k, 0.3, at)
    monkeypatch.setattr(module, "_SCORES_PER_BLOCK", 1)
    torch.testing.assert_close(probe_scores(q, k, 0.3, at), whole, atol=1e-6, rtol=1e-5)


def test_places_without_a_probe_and_hidden_keys_count_nothing():
    q, k = random(0, 1, 2, 3, 16), random(1, 1, 2, 20, 16)
    at, where = torch.tensor([[19, -1, 10]]), torch.arange(20)[None].clone()
    where[:, :4] = 2**30  # padding
    mass = probe_scores(q, k, 0.3, at, where)
    alone = probe_scores(q[:, :, [0, 2]], k[:, :, 4:], 0.3, torch.tensor([[15, 6]]))
    assert (mass[..., :4] == 0).all()
    torch.testing.assert_close(mass[..., 4:], alone, atol=1e-6, rtol=1e-5)
    assert probes_that_see(at, where)[0, :5].tolist() == [0, 0, 0, 0, 2]
