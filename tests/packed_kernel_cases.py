"""Triton kernels of packed caches against the reference; run as kernel_cases.py is, in the interpreter and on a GPU.

Triton's interpreter cannot multiply matrices of bfloat16, which only rows in full precision do: on the processor,
bfloat16 meets packed groups alone.
"""

from dataclasses import replace

import pytest
import torch
from kernel_cases import DEVICE, TOLERANCE, poisoned_memory
from miniatures import MINIATURES, text_inputs
from test_kv_pack import KINDS, data
from test_packed_attention import make, random

import infer_patch
from infer_patch.kernels.kv_pack import BITS, PLAIN, Groups, dequantise, quantise_and_pack
from infer_patch.kernels.packed_attention import packed_attention
from infer_patch.kernels.packed_attention_triton import attention
from infer_patch.kernels.probe_scores import probe_scores
from infer_patch.kernels.probe_scores_triton import probe_scores as triton_scores
from infer_patch.packed_pool import Pool
from infer_patch.patches import KVQuant, ZipVL


def there(x):
    return x.map(lambda y: y.to(DEVICE)) if isinstance(x, Groups) else None if x is None else x.to(DEVICE)


def of_dtype(groups, dtype):
    """Groups of 16 bits in a dtype; packed ones as they are."""
    if groups.bits != PLAIN:
        return groups
    return replace(groups, key_codes=groups.key_codes.to(dtype), value_codes=groups.value_codes.to(dtype))


def formula(q, packed, keys, values, scale, visible=None):
    """Everything dequantised, one softmax; on the processor, in fp32 (but for `dequantise`, the reference itself)."""
    plain = [g.map(lambda x: x.float() if x.is_floating_point() else x) if g.bits == PLAIN else g for g in packed]
    return packed_attention(q.float(), plain, keys.float(), values.float(), scale, visible, "reference")


def compare_packed(q, packed, keys, values, scale=0.1, visible=None, splits=(None,)):
    packed = [of_dtype(groups, q.dtype) for groups in packed]
    expected = formula(q, packed, keys, values, scale, visible)
    for many in splits:
        with poisoned_memory():
            found = attention(
                there(q), [there(g) for g in packed], there(keys), there(values), scale, there(visible), many
            )
        assert found.dtype == q.dtype and found.transpose(1, 2).is_contiguous()
        tolerance = TOLERANCE[q.dtype]
        torch.testing.assert_close(found.cpu().float(), expected, atol=tolerance, rtol=tolerance)


def rows(seed, *shape, dtype=torch.float32):
    return (random(seed + i, *shape).to(dtype) for i in (7, 8))


PACKED = [
    # bits of the pools, heights, heads, queries, tail, size, fillers, dtype
    ((2,), (16,), 2, 1, 1, 48, False, torch.float32),
    ((4, 2), (32, 80), 4, 1, 9, 64, True, torch.float32),
    ((8,), (128,), 8, 1, 70, 32, True, torch.float32),
    ((16, 4), (48, 16), 6, 1, 3, 40, True, torch.float32),
    ((4,), (32,), 6, 7, 21, 32, True, torch.float32),  # 21 rows: two tiles of 16
    ((8, 2), (16, 48), 4, 1, 17, 128, False, torch.float16),
    ((4, 16), (64, 32), 14, 5, 5, 80, True, torch.float16),  # 35 rows: two tiles of 32
    ((2,), (16,), 2, 1, 0, 96, True, torch.bfloat16),
    ((4, 8), (48, 16), 4, 2, 0, 64, True, torch.bfloat16),
]


@pytest.mark.parametrize("widths, sizes, heads, queries, tail, dim, fillers, dtype", PACKED)
def test_packed_decode(widths, sizes, heads, queries, tail, dim, fillers, dtype):
    pools = enumerate(zip(widths, sizes))
    packed = [make(i, bits, n=2 + i, size=size, dim=dim, fillers=fillers) for i, (bits, size) in pools]
    q = random(5, 2, heads, queries, dim).to(dtype)
    visible = None
    if queries > 1 and tail:
        visible = (torch.arange(tail) <= torch.arange(tail - queries, tail)[:, None]).expand(2, -1, -1)
    compare_packed(q, packed, *rows(0, 2, 2, tail, dim, dtype=dtype), visible=visible, splits=(1, 3))


@pytest.mark.parametrize(
    "bits, value_bits, dim, dtype",
    [
        (4, 2, 48, torch.float32),
        (8, 2, 40, torch.float32),
        (8, 4, 64, torch.float16),
        (4, 2, 80, torch.float16),
        (2, 4, 48, torch.float32),
    ],
)
def test_packed_values_in_other_bits_than_keys(bits, value_bits, dim, dtype):
    packed = [make(0, bits, dim=dim, fillers=True, value_bits=value_bits), make(1, 4, size=16, dim=dim)]
    q = random(5, 2, 6, 1, dim).to(dtype)
    compare_packed(q, packed, *rows(0, 2, 2, 9, dim, dtype=dtype), splits=(1, 3))


@pytest.mark.parametrize("bits, value_bits", [(4, 2), (8, 2), (2, 8)])
def test_quantising_values_to_other_bits_than_keys(bits, value_bits):
    k, v = random(0, 1, 2, 40, 48), random(1, 1, 2, 40, 48)
    same_groups(k, v, torch.arange(40).view(1, 1, 2, 20), bits, value_bits)


@pytest.mark.parametrize("splits", [2, 7, 32])
def test_packed_any_number_of_splits(splits):
    """32 splits of at most 5 tiles: most find nothing to do. 65 parts: merged in five steps."""
    packed = [make(0, 4, n=5, batch=1, heads=1, fillers=True), make(1, 2, n=3, size=16, batch=1, heads=1)]
    compare_packed(random(0, 1, 2, 1, 48), packed, *rows(0, 1, 1, 5, 48), splits=(splits,))


def test_packed_groups_without_a_token():
    """Pools in which nothing is valid, pools of no group, and rows that see nothing at all."""
    none = torch.zeros(2, 2, 3, dtype=torch.int32)
    empty = replace(make(0, 4), valid=none)
    q, (keys, values) = random(0, 2, 4, 2, 48), rows(0, 2, 2, 3, 48)
    compare_packed(q, [empty, make(1, 2)], keys, values)
    compare_packed(q, [make(1, 2).map(lambda x: x[:, :, :0]), make(1, 2)], keys, values)
    compare_packed(q, [], keys, values)
    visible = torch.ones(2, 2, 3, dtype=torch.bool)
    visible[1, 0] = False  # padding
    found = attention(there(q), [there(empty)], there(keys), there(values), 0.1, there(visible)).cpu()
    expected = formula(q, [], keys, values, 0.1, visible)
    assert (found[1, :, 0] == 0).all()
    seen = visible.any(-1)
    torch.testing.assert_close(found.transpose(1, 2)[seen], expected.transpose(1, 2)[seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_packed_data_that_breaks_careless_code(kind, dtype):
    """No NaN, and no more error than products in the dtype have, at any magnitude."""
    bits = {torch.float32: 2, torch.float16: 4}[dtype]
    k, v = data(kind, 0, (1, 1, 32, 32)), data(kind, 1, (1, 1, 32, 32))
    groups = quantise_and_pack(k, v, torch.arange(32).view(1, 1, 2, 16), bits)
    q, none = random(3, 1, 2, 1, 32).to(dtype), torch.empty(1, 1, 0, 32, dtype=dtype)
    k2, v2 = dequantise(groups)
    for scale in (32**-0.5, 2 / float(k2.abs().max() * 32**0.5 + 1e-30)):
        found = attention(there(q), [there(groups)], there(none), there(none), scale).cpu()
        if dtype == torch.float32:
            assert found.isfinite().all()  # fp16 cannot hold the values of some kinds
        assert not found.isnan().any()
    expected, most = formula(q, [groups], none, none, scale), v2.abs().max()
    largest = torch.finfo(dtype).max
    wrong = (found.float() - expected.clamp(-largest, largest)).abs()[expected.abs() < largest]
    assert (wrong <= TOLERANCE[dtype] * (most + 1e-3)).all()


def filled_pool(bits, counts, dtype=torch.float32, group=32):
    """A pool of samples with different counts of tokens, taken in two steps: odd lengths, fillers, free places."""
    pool = Pool(len(counts), bits, group)
    k, v = random(0, len(counts), 2, 80, 32).to(dtype), random(1, len(counts), 2, 80, 32).to(dtype)
    for sample, count in enumerate(counts):
        at = 0
        for some in (count // 2, count - count // 2):
            index = torch.arange(at, at + some).view(1, 1, -1)
            if some:
                pool.append([sample], *(x[sample : sample + 1] for x in (k, v)), index, [at])
            at += some
    return pool


@pytest.mark.parametrize("bits", [4, 16])
def test_packed_pools_of_odd_lengths(bits):
    """Samples of 70, 1 and no tokens: a sample in the batch gets what it gets alone."""
    pool = filled_pool(bits, [70, 1, 0])
    packed, q, (keys, values) = pool.groups(), random(2, 3, 4, 1, 32), rows(3, 3, 2, 1, 32)
    assert len(packed) > 1 and any(groups.valid is not None for groups in packed)
    compare_packed(q, packed, keys, values)
    both = attention(there(q), [there(g) for g in packed], there(keys), there(values), 0.1)
    for b in range(3):
        one = [there(g.map(lambda x, b=b: x[b : b + 1])) for g in packed]
        alone = attention(there(q[b : b + 1]), one, *(there(x[b : b + 1]) for x in (keys, values)), 0.1)
        torch.testing.assert_close(both[b : b + 1], alone, atol=1e-6, rtol=1e-6)


def test_packed_views_of_buffers():
    """Rows and groups with free places behind each head (not a number), heads of q next to each other."""
    groups, q, (keys, values) = make(0, 4), random(0, 2, 4, 2, 48), rows(0, 2, 2, 5, 48)
    expected = formula(q, [groups], keys, values, 0.1)

    def roomy(x, dim=2, value=float("nan")):
        wide = torch.full(
            (*x.shape[:dim], x.shape[dim] + 3, *x.shape[dim + 1 :]), 255 if x.dtype == torch.uint8 else value
        )
        wide = wide.to(x.dtype).to(DEVICE)
        wide[:, :, : x.shape[dim]] = x.to(DEVICE)
        return wide[:, :, : x.shape[dim]]

    q = there(q).transpose(1, 2).contiguous().transpose(1, 2)
    for some in (
        groups.map(roomy),
        replace(there(groups), key_step=roomy(groups.key_step)),
    ):  # second: laid out unevenly
        found = attention(q, [some], roomy(keys), roomy(values), 0.1).cpu()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_packed_attention_by_the_dispatcher():
    q, packed, (keys, values) = random(0, 2, 4, 3, 48), [make(0, 2)], rows(0, 2, 2, 9, 48)
    found = packed_attention(there(q), [there(packed[0])], there(keys), there(values), 0.1, implementation="triton")
    torch.testing.assert_close(found.cpu(), formula(q, packed, keys, values, 0.1), atol=1e-5, rtol=1e-5)


GATHERED = [
    # tokens, groups, rows of a group, size, rows for each head, dtype
    (40, 2, 20, 32, False, torch.float32),
    (50, 3, 16, 48, True, torch.bfloat16),
    (30, 1, 1, 16, True, torch.float16),
    (200, 1, 200, 16, False, torch.float32),
    (20, 1, 16, 160, False, torch.float16),  # at 8 bits: three pieces of a row
]


@pytest.mark.parametrize("tokens, n, size, dim, each, dtype", GATHERED)
@pytest.mark.parametrize("bits", BITS)
def test_quantising_gives_the_codes_of_the_reference(tokens, n, size, dim, each, dtype, bits):
    """Bit for bit: codes and parameters, from views of rows that lie apart."""
    k, v = (random(seed, 2, tokens, 2, dim).to(dtype).transpose(1, 2) for seed in (0, 1))
    k[..., 3] += 20
    generator = torch.Generator().manual_seed(bits)
    drawn = torch.stack([torch.randperm(tokens, generator=generator)[: n * size] for _ in range(4 if each else 2)])
    index = drawn.view(2, -1, n, size)
    same_groups(k, v, index, bits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_quantising_data_that_breaks_careless_code(kind, bits):
    k, v = data(kind, 0, (1, 1, 20, 16)), data(kind, 1, (1, 1, 20, 16))
    same_groups(k, v, torch.arange(20).view(1, 1, 1, 20), bits)


def same_groups(k, v, index, bits, value_bits=None):
    expected = quantise_and_pack(k, v, index, bits, implementation="reference", value_bits=value_bits).tensors()
    with poisoned_memory():
        where = there(k), there(v), there(index)
        found = quantise_and_pack(*where, bits, implementation="triton", value_bits=value_bits).tensors()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].cpu(), value), name


PROBES = [
    # batch, probes, keys, heads, key heads, size, splits, dtype
    (2, 5, 70, 4, 2, 16, None, torch.float32),
    (1, 20, 300, 6, 1, 48, 3, torch.float32),  # 120 rows: eight tiles
    (1, 40, 64, 6, 2, 80, 1, torch.float16),  # 120 rows: two tiles
    (1, 1, 1, 2, 2, 32, 32, torch.float32),
]


@pytest.mark.parametrize("batch, probes, keys, heads, kv_heads, size, splits, dtype", PROBES)
def test_probe_scores_equal_the_formula(batch, probes, keys, heads, kv_heads, size, splits, dtype):
    q, k = random(0, batch, heads, probes, size).to(dtype), random(1, batch, kv_heads, keys, size).to(dtype)
    generator = torch.Generator().manual_seed(keys)
    at = torch.stack([torch.randperm(keys, generator=generator)[:probes] for _ in range(batch)])
    order = torch.arange(keys).expand(batch, -1)
    expected = probe_scores(q.float(), k.float(), 0.3, at, implementation="reference")
    with poisoned_memory():
        found = triton_scores(there(q), there(k), 0.3, there(at), there(order), splits).cpu()
    assert found.dtype == torch.float32
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=10 * tolerance)
    total = torch.full((batch, kv_heads), probes * heads / kv_heads)
    torch.testing.assert_close(found.sum(-1), total, atol=0.0, rtol=tolerance)


def test_probe_scores_without_probes_and_of_hidden_keys():
    """By the dispatcher: -1 is no probe, padding is seen by nobody, scores are large, keys are a view."""
    q, k = random(0, 1, 2, 3, 16), random(1, 1, 40, 1, 16).transpose(1, 2)[:, :, 5:25] * 100
    at, order = torch.tensor([[19, -1, 10]]), torch.arange(20)[None].clone()
    order[:, :4] = 2**62  # padding: int64
    expected = probe_scores(q, k, 0.3, at, order, "reference")
    found = probe_scores(there(q), there(k), 0.3, there(at), there(order), "triton").cpu()
    assert (found[..., :4] == 0).all() and found.isfinite().all()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    nobody = probe_scores(there(q), there(k), 0.3, there(torch.full_like(at, -1)), there(order), "triton")
    assert (nobody == 0).all()


SMALL = {"sinks": 2, "recent": 8, "window": 16, "group": 16}
METHODS = [KVQuant(**SMALL), KVQuant(important=0.5, **SMALL), ZipVL(dense_below=0, dense_above=1.0, **SMALL)]


@pytest.mark.parametrize("method", METHODS, ids=["kv_quant", "kv_quant-mixed", "zipvl"])
def test_packed_model_generates_what_it_does_with_the_torch_path(method, monkeypatch):
    """A padded batch on a GPU. Codes are the same, so logits differ by rounding alone."""
    layers, lengths, tokens = (1, (70, 45), 2) if DEVICE == "cpu" else (4, (300, 210, 150), 40)
    model = MINIATURES["llama"].build(num_hidden_layers=layers).to(DEVICE)
    inputs = {name: x.to(DEVICE) for name, x in text_inputs(model, lengths).items()}
    settings = dict(max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with infer_patch.patch(model, method) as handle:
        monkeypatch.setenv("INFER_PATCH_KERNELS", "cpu")
        expected = model.generate(**inputs, **settings)
        monkeypatch.setenv("INFER_PATCH_KERNELS", "triton")
        found = model.generate(**inputs, **settings)
    assert handle.report().methods[method.name]["fired"]
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-3, rtol=1e-3)
