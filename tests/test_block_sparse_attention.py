"""Block-sparse attention against the fp32 reference and dense attention, on awkward shapes; the block-mask contract."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from infer_patch.kernels.block_mask import BlockMask, blocks_of_window, causal_blocks, sink_window_blocks
from infer_patch.kernels.block_sparse_attention import block_sparse_attention, token_mask
from infer_patch.kernels.dense_attention import dense_attention

SHAPES = [(300, 300), (64, 64), (130, 333), (257, 600), (1, 257), (3, 66), (5, 130), (16, 400), (17, 81), (1, 1)]
HEADS = [(3, 3), (6, 2), (8, 1)]
BLOCKS = [(64, 64), (64, 16), (32, 32)]


def random_mask(generator, batch, lists, queries, keys, block_q=64, block_k=64, every=False):
    """Random valid lists, garbage past the counts."""
    per, n_k = block_q // block_k, -(-keys // block_k)
    first, last = (keys - queries) // block_q, -(-keys // block_q)
    idx = torch.randint(-5, 10**6, (batch, lists, last - first, n_k), generator=generator)
    count = torch.zeros(batch, lists, last - first, dtype=torch.long)
    for b, m, i in itertools.product(range(batch), range(lists), range(last - first)):
        diagonal = list(range((first + i) * per, min((first + i + 1) * per, n_k)))
        past = torch.randperm((first + i) * per, generator=generator)
        some = past if every else past[: int(torch.randint(0, len(past) + 1, (1,), generator=generator))]
        entries = sorted(some.tolist()) + diagonal
        idx[b, m, i, : len(entries)] = torch.tensor(entries)
        count[b, m, i] = len(entries)
    return BlockMask(idx, count, block_q, block_k)


def qkv(generator, heads, kv_heads, queries, keys, dtype=torch.float32, batch=2, size=32):
    shapes = [(batch, heads, queries, size), (batch, kv_heads, keys, size), (batch, kv_heads, keys, size)]
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("heads, kv_heads", HEADS)
@pytest.mark.parametrize("queries, keys", SHAPES)
def test_random_lists(queries, keys, heads, kv_heads, blocks):
    generator = torch.Generator().manual_seed(queries * keys + heads)
    q, k, v = qkv(generator, heads, kv_heads, queries, keys)
    for lists in {1, kv_heads, heads}:
        mask = random_mask(generator, 2, lists, queries, keys, *blocks)
        mask.check(queries, keys)
        plain = F.scaled_dot_product_attention(
            q,
            *(x.repeat_interleave(heads // kv_heads, 1) for x in (k, v)),
            attn_mask=token_mask(mask, heads, queries, keys),
            scale=0.3,
        )
        for face in ("reference", "cpu"):
            torch.testing.assert_close(block_sparse_attention(q, k, v, mask, 0.3, face), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("queries, keys", SHAPES)
def test_all_blocks_listed_is_dense_attention(queries, keys):
    generator = torch.Generator().manual_seed(0)
    q, k, v = qkv(generator, 6, 2, queries, keys)
    mask = random_mask(generator, 2, 2, queries, keys, every=True)
    dense = dense_attention(q, k, v, 32**-0.5)
    causal = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=True)
    torch.testing.assert_close(dense, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(block_sparse_attention(q, k, v, mask), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("queries, keys", [(300, 300), (1, 257), (130, 333)])
def test_half_precision_errs_at_most_twice_what_torch_does(dtype, queries, keys):
    generator = torch.Generator().manual_seed(1)
    q, k, v = qkv(generator, 6, 2, queries, keys, dtype)
    mask = random_mask(generator, 2, 2, queries, keys)
    exact = block_sparse_attention(q.float(), k.float(), v.float(), mask, implementation="reference")
    visible = token_mask(mask, 6, queries, keys)
    torchs = F.scaled_dot_product_attention(q, *(x.repeat_interleave(3, 1) for x in (k, v)), attn_mask=visible)
    ours = block_sparse_attention(q, k, v, mask)
    assert (ours.float() - exact).abs().max() <= 2 * (torchs.float() - exact).abs().max() + 1e-6


def test_keys_in_a_larger_buffer_and_every_stride():
    """Cache layers hand over views of buffers; what stands behind the last key must not matter."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = qkv(generator, 6, 2, 200, 300)
    mask = random_mask(generator, 2, 2, 200, 300)
    expected = block_sparse_attention(q, k, v, mask)

    def in_buffer(x, start, capacity):
        buffer = torch.full((2, 2, capacity, 32), 7.0)
        buffer[:, :, start : start + 300] = x
        return buffer[:, :, start : start + 300]

    for start, capacity in [(0, 320), (17, 384), (17, 317), (0, 300)]:
        views = [in_buffer(x, start, capacity) for x in (k, v)]
        torch.testing.assert_close(block_sparse_attention(q, *views, mask), expected)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(block_sparse_attention(*transposed, mask), expected)


def test_equivariance():
    generator = torch.Generator().manual_seed(3)
    q, k, v = qkv(generator, 4, 4, 200, 200)
    mask = random_mask(generator, 2, 4, 200, 200)
    out = block_sparse_attention(q, k, v, mask)
    heads = torch.tensor([2, 0, 3, 1])
    permuted = BlockMask(mask.idx.flip(0)[:, heads], mask.count.flip(0)[:, heads])
    found = block_sparse_attention(*(x.flip(0)[:, heads] for x in (q, k, v)), permuted)
    torch.testing.assert_close(found, out.flip(0)[:, heads])


@pytest.mark.parametrize(
    "idx, count, complaint",
    [
        ([[0, 9], [0, 1]], [1, 3], "count 3 outside"),
        ([[0, 9], [1, 0]], [1, 2], "not ascending"),
        ([[0, 9], [1, 1]], [1, 2], "not ascending and unique"),
        ([[0, 9], [0, 2]], [1, 2], "outside the visible"),
        ([[0, 9], [0, 9]], [1, 1], "the diagonal"),
        ([[0, 9]], [1], "for 2 query blocks"),
    ],
)
def test_broken_lists_are_named(idx, count, complaint):
    with pytest.raises(ValueError, match=complaint):
        BlockMask(torch.tensor(idx)[None, None], torch.tensor(count)[None, None]).check(128, 128)


@pytest.mark.parametrize("queries, keys", SHAPES)
@pytest.mark.parametrize("sinks, window", [(0, 64), (4, 64), (65, 100), (4, 129), (4, 10**6)])
def test_sink_window_lists_hold_what_they_must(queries, keys, sinks, window):
    mask = sink_window_blocks(queries, keys, sinks, [blocks_of_window(window)])
    mask.check(queries, keys)
    seen = token_mask(mask, 1, queries, keys)[0, 0]
    position, key = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    causal = key <= position
    assert (seen | ~(causal & ((key < sinks) | (key > position - window))))[causal].all(), "a promised key is missing"
    block_start = position // 64 * 64
    reach = (key // 64 < -(-sinks // 64)) | (key // 64 >= (block_start - window + 1) // 64)
    assert torch.equal(seen, causal & reach)


def test_sink_window_lists_over_evicted_storage():
    """With whole blocks missing between sinks and window, the same tokens are read."""
    masks = [sink_window_blocks(1, keys, 4, [blocks_of_window(128)]) for keys in (1000, 1000 - 640)]
    full, rest = (mask.idx[0, 0, 0, : mask.count[0, 0, 0]].tolist() for mask in masks)
    assert [full[0]] + [b - 10 for b in full[1:]] == rest


def test_causal_blocks():
    assert causal_blocks(300, 300, 64, 64) == 15
    assert causal_blocks(1, 300, 64, 64) == 5
    assert causal_blocks(300, 300, 64, 16) == 4 + 8 + 12 + 16 + 19


def test_unknown_implementation():
    q, k, v = qkv(torch.Generator(), 2, 2, 1, 10)
    with pytest.raises(ValueError, match="unknown kernel implementation 'cuda'; choose from reference, cpu"):
        block_sparse_attention(q, k, v, random_mask(torch.Generator(), 2, 2, 1, 10), implementation="cuda")
