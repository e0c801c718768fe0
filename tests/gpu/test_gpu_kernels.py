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
from packed_kernel_cases import *  # noqa: F403
from packed_kernel_cases import compare_packed
from test_block_sparse_attention import qkv, random_mask
from test_packed_attention import make, random

from infer_patch.kernels.block_mask import BlockMask, causal_blocks
from infer_patch.kernels.block_sparse_attention import block_sparse_attention, token_mask
from infer_patch.kernels.block_sparse_decode_triton import decode
from infer_patch.kernels.block_sparse_prefill_triton import prefill
from infer_patch.kernels.dispatch import triton_refusal
from infer_patch.kernels.envelope import block_envelope, score_key_blocks, select_blocks
from infer_patch.kernels.kv_pack import BITS, quantise_and_pack
from infer_patch.kernels.packed_attention import packed_attention
from infer_patch.kernels.probe_scores import probe_scores

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


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [*BITS, 16])
@pytest.mark.parametrize("queries", [1, 9])
def test_packed_half_precision(queries, bits, dim, dtype):
    packed = [make(0, bits, dim=dim, fillers=True, n=9, size=128), make(1, 2, dim=dim, fillers=True, size=48)]
    q, keys, values = (
        random(i, 2, heads, n, dim).to(dtype) for i, heads, n in ((0, 8, queries), (7, 2, 70), (8, 2, 70))
    )
    visible = (torch.arange(70) <= torch.arange(70 - queries, 70)[:, None]).expand(2, -1, -1)
    compare_packed(q, packed, keys, values, scale=dim**-0.5, visible=visible, splits=(None, 1, 5))


def packed_call(seed, keys=32768, tail=150):
    """A query of 8 heads, 32k tokens of 2 key heads in 4 bits and in 2, and a tail: bfloat16, on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (x.cuda() for x in qkv(generator, 8, 2, 1, keys, torch.bfloat16, batch=2, size=128))
    rows = torch.randperm(keys, generator=generator).cuda().view(1, 1, -1, 128).expand(2, -1, -1, -1)
    parts = rows[:, :, : rows.shape[2] // 3], rows[:, :, rows.shape[2] // 3 :]
    packed = [quantise_and_pack(k, v, part, bits) for part, bits in zip(parts, (4, 2))]
    return q, packed, k[:, :, -tail:], v[:, :, -tail:]


def test_long_packed_caches():
    q, packed, keys, values = packed_call(0)
    found, expected = (packed_attention(q, packed, keys, values, 0.3, None, x) for x in ("triton", "reference"))
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=2e-2)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bits", BITS)
def test_codes_of_half_precision_are_those_of_the_processor(bits, dtype):
    k, v = (random(seed, 2, 2, 4000, 128).to(dtype) for seed in (0, 1))
    rows = torch.randperm(4000)[:3840].view(1, 1, 30, 128).expand(2, -1, -1, -1)
    expected = quantise_and_pack(k, v, rows, bits, implementation="cpu").tensors()
    found = quantise_and_pack(k.cuda(), v.cuda(), rows.cuda(), bits, implementation="triton").tensors()
    assert all(torch.equal(found[name].cpu(), value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", HALF)
def test_long_probe_scores(dtype):
    q, k = random(0, 2, 8, 128, 128).to(dtype).cuda(), random(1, 2, 2, 20000, 128).to(dtype).cuda()
    at = torch.arange(19872, 20000, device="cuda").expand(2, -1)
    found, expected = (probe_scores(q, k, 128**-0.5, at, None, x) for x in ("triton", "reference"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=2e-2)
    torch.testing.assert_close(found.sum(-1), torch.full((2, 2), 512.0, device="cuda"), atol=0.0, rtol=1e-3)


def test_packed_steps_never_wait_for_the_gpu():
    q, packed, keys, values = packed_call(1, keys=4096)
    rows, at = torch.arange(64, device="cuda").view(1, 1, 4, 16), torch.tensor([[99, 149]], device="cuda")

    def layer():
        groups = quantise_and_pack(keys, values, rows.expand(2, -1, -1, -1), 4)
        mass = probe_scores(q.expand(-1, -1, 2, -1), keys, 0.1, at.expand(2, -1))
        return packed_attention(q, [*packed, groups], keys, values, 0.1), mass

    expected = layer()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = layer()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_packed_decode_in_a_cuda_graph():
    first, second = packed_call(2, keys=4096), packed_call(3, keys=4096)
    q, packed, keys, values = (
        x.clone() if torch.is_tensor(x) else [g.map(torch.clone) for g in x] for x in packed_call(2, keys=4096)
    )
    packed_attention(q, packed, keys, values, 0.1, implementation="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = packed_attention(q, packed, keys, values, 0.1, implementation="triton")
    for call in (first, second, first):
        for to, x in zip((q, keys, values), (call[0], call[2], call[3])):
            to.copy_(x)
        for to, groups in zip(packed, call[1]):
            for name, x in groups.tensors().items():
                to.tensors()[name].copy_(x)
        graph.replay()
        torch.testing.assert_close(out, packed_attention(*call, 0.1, implementation="reference"), atol=2e-3, rtol=2e-2)


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
