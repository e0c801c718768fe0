"""Triton kernels on a GPU: the cases of the interpreter, bfloat16, long inputs, no waiting for the GPU, CUDA graphs."""

import os

import pytest
import torch

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("triton")

import torch.nn.functional as F
from kernel_cases import *  # noqa: F403
from kernel_cases import compare
from test_block_sparse_attention import qkv, random_mask

from infer_patch.kernels.block_mask import BlockMask, causal_blocks
from infer_patch.kernels.block_sparse_attention import block_sparse_attention, token_mask
from infer_patch.kernels.block_sparse_decode_triton import decode
from infer_patch.kernels.block_sparse_prefill_triton import prefill
from infer_patch.kernels.dispatch import triton_refusal
from infer_patch.kernels.envelope import block_envelope, score_key_blocks, select_blocks

if triton_refusal("cuda"):
    pytest.skip(triton_refusal("cuda"), allow_module_level=True)
HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (8, 2), (7, 1)])
@pytest.mark.parametrize("queries, keys", [(300, 300), (130, 333), (1, 600), (6, 130)])
def test_half_precision(queries, keys, heads, kv_heads, size, dtype):
    generator = torch.Generator().manual_seed(size)
    q, k, v = qkv(generator, heads, kv_heads, queries, keys, dtype, size=size)
    for lists in {1, kv_heads, heads}:
        mask = random_mask(generator, 2, lists, queries, keys)
        compare(decode if queries < 8 else prefill, q, k, v, mask, scale=size**-0.5)


@pytest.mark.parametrize("queries, keys", [(8192, 8192), (4096, 16000), (1, 131072), (8, 131072)])
def test_long_inputs_err_at_most_twice_what_torch_does(queries, keys):
    """Against the formula in fp32, one head at a time; bfloat16, 8 query and 2 key heads."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (x.cuda() for x in qkv(generator, 8, 2, queries, keys, torch.bfloat16, batch=1, size=128))
    mask = spread_blocks(queries, keys, 2)
    found = block_sparse_attention(q, k, v, mask, implementation="triton")
    visible = token_mask(mask, 8, queries, keys)
    for head in range(8):
        one = q[:, head], k[:, head // 4], v[:, head // 4]
        torchs = F.scaled_dot_product_attention(*one, attn_mask=visible[:, head])
        scores = (one[0].float() @ one[1].float().mT * 128**-0.5).masked_fill(~visible[:, head], float("-inf"))
        exact = scores.softmax(-1) @ one[2].float()
        del scores
        assert (found[:, head].float() - exact).abs().max() <= 2 * (torchs.float() - exact).abs().max() + 1e-3


def spread_blocks(queries, keys, lists):
    """About 20 blocks for each query block: the first, every n-th and the last two; other ones for each list."""
    first, last = (keys - queries) // 64, -(-keys // 64)
    row, column = torch.arange(first, last)[:, None], torch.arange(last)
    every = max(last // 18, 1)
    listed = torch.stack(
        [(column <= row) & (((column + i) % every == 0) | (column == 0) | (column >= row - 1)) for i in range(lists)]
    )
    count = listed.sum(-1)
    idx = torch.where(listed, column, last).sort(-1).values[..., : int(count.max())]
    return BlockMask(idx[None].cuda(), count[None].cuda())


def test_all_blocks_are_dense_attention():
    generator = torch.Generator().manual_seed(1)
    q, k, v = (x.cuda() for x in qkv(generator, 8, 2, 4000, 4000, torch.bfloat16, batch=2, size=64))
    n = -(-4000 // 64)
    mask = BlockMask(
        torch.arange(n, device="cuda").expand(1, 1, n, n), torch.arange(1, n + 1, device="cuda")[None, None]
    )
    assert int(mask.count.sum()) == causal_blocks(4000, 4000, 64, 64)
    found = block_sparse_attention(q, k, v, mask, implementation="triton")
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(found, dense, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("queries, keys, score_block", [(4096, 4096, 1), (1000, 20000, 16), (1, 100000, 4)])
def test_long_scores(queries, keys, score_block):
    generator = torch.Generator().manual_seed(2)
    q, k, _ = (x.cuda() for x in qkv(generator, 8, 2, queries, keys, torch.bfloat16, batch=1, size=128))
    envelope = block_envelope(k, score_block)
    sizes = (keys, 64, 64 // score_block, 4, 0.1, 128**-0.5)
    found, expected = (score_key_blocks(q, envelope, *sizes, implementation=x) for x in ("triton", "reference"))
    assert torch.equal(found.isinf(), expected.isinf())
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("queries", [1, 8, 500])
def test_nothing_waits_for_the_gpu(queries):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (x.cuda() for x in qkv(generator, 8, 2, queries, 3000, torch.bfloat16, size=64))

    def layer():
        envelope = block_envelope(k, 4)
        mask = select_blocks(q, k, envelope, budget=512, sinks=4, window=1, score_block=4)
        return block_sparse_attention(q, k, v, mask)

    expected = layer()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = layer()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)


def test_decode_in_a_cuda_graph():
    """The grid does not depend on what lies on the GPU: other lists, keys and queries are served by the same graph."""
    generator = torch.Generator().manual_seed(4)
    first, second = (
        [
            *(x.cuda() for x in qkv(generator, 8, 2, 1, 3000, torch.bfloat16, size=64)),
            random_mask(generator, 2, 2, 1, 3000),
        ]
        for _ in range(2)
    )
    held = [x.clone() for x in first[:3]], BlockMask(first[3].idx.cuda(), first[3].count.cuda())
    block_sparse_attention(*held[0], held[1], implementation="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block_sparse_attention(*held[0], held[1], implementation="triton")
    for q, k, v, mask in (first, second, first):
        for to, x in zip((*held[0], held[1].idx, held[1].count), (q, k, v, mask.idx, mask.count)):
            to.copy_(x)
        graph.replay()
        on_gpu = BlockMask(mask.idx.cuda(), mask.count.cuda())
        expected = block_sparse_attention(q, k, v, on_gpu, implementation="cpu")
        torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_the_second_gpu():
    generator = torch.Generator().manual_seed(5)
    for queries in (1, 100):
        q, k, v = (x.to("cuda:1") for x in qkv(generator, 4, 2, queries, 300))
        mask = random_mask(generator, 2, 2, queries, 300)
        mask = BlockMask(mask.idx.to("cuda:1"), mask.count.to("cuda:1"))
        found, expected = (block_sparse_attention(q, k, v, mask, implementation=x) for x in ("triton", "reference"))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
