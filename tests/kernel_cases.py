"""Triton kernels against the fp32 reference on awkward shapes.

Run twice: by test_triton_kernels.py in Triton's interpreter on the processor (TRITON_INTERPRET=1 must be set before
Triton is imported, hence the process of its own), and by gpu/test_gpu_kernels.py on a GPU.
"""

import os
from contextlib import contextmanager

import pytest
import torch
from miniatures import MINIATURES, text_inputs
from test_block_sparse_attention import qkv, random_mask

import infer_patch
from infer_patch.kernels.block_mask import BlockMask, sink_window_blocks
from infer_patch.kernels.block_sparse_attention import block_sparse_attention, token_mask
from infer_patch.kernels.block_sparse_decode_triton import decode, serves
from infer_patch.kernels.block_sparse_prefill_triton import prefill
from infer_patch.kernels.envelope import block_envelope, score_key_blocks, select_blocks
from infer_patch.patches import Envelope, SinkWindow

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@contextmanager
def poisoned_memory():
    """Fresh memory holds NaN, so that a result which nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def on_device(mask):
    return BlockMask(mask.idx.to(DEVICE), mask.count.to(DEVICE), mask.block_q, mask.block_k)


def compare(kernel, q, k, v, mask, scale=0.3, **options):
    """Output and log-sum-exp of a kernel against the formula, which is computed on the processor."""
    expected = block_sparse_attention(q.float(), k.float(), v.float(), mask, scale, "reference")
    with poisoned_memory():
        found, lse = kernel(*(x.to(DEVICE) for x in (q, k, v)), on_device(mask), scale, lse=True, **options)
    tolerance = TOLERANCE[q.dtype]
    assert found.dtype == q.dtype and found.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(found.cpu().float(), expected, atol=tolerance, rtol=tolerance)
    keys = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.float() @ keys.transpose(-1, -2) * scale
    visible = token_mask(mask, q.shape[1], q.shape[2], k.shape[2])
    sums = scores.masked_fill(~visible, float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse.cpu(), sums, atol=tolerance, rtol=tolerance)


PREFILL = [
    # batch, queries, keys, heads, key heads, lists, size, blocks, dtype
    (2, 70, 200, 6, 2, 2, 32, (64, 64), torch.float32),
    (1, 65, 65, 8, 1, 1, 64, (32, 32), torch.float32),
    (1, 50, 50, 8, 1, 8, 80, (32, 32), torch.float32),
    (1, 40, 75, 3, 1, 1, 40, (16, 16), torch.float32),
    (1, 33, 97, 3, 3, 1, 128, (64, 16), torch.float32),
    (1, 129, 150, 2, 1, 1, 16, (128, 64), torch.float32),
    (1, 60, 250, 2, 2, 2, 32, (192, 48), torch.float32),
    (2, 70, 130, 4, 2, 2, 64, (64, 64), torch.float16),  # two heads to a tile
    (1, 70, 130, 4, 2, 4, 96, (64, 32), torch.float16),
]


@pytest.mark.parametrize("batch, queries, keys, heads, kv_heads, lists, size, blocks, dtype", PREFILL)
def test_prefill(batch, queries, keys, heads, kv_heads, lists, size, blocks, dtype):
    generator = torch.Generator().manual_seed(queries + size)
    q, k, v = qkv(generator, heads, kv_heads, queries, keys, dtype, batch, size)
    compare(prefill, q, k, v, random_mask(generator, batch, lists, queries, keys, *blocks))


DECODE = [
    (2, 1, 300, 3, 3, 3, 32, (64, 64), torch.float32),
    (2, 1, 250, 8, 1, 1, 64, (64, 64), torch.float32),
    (1, 1, 257, 6, 2, 6, 80, (32, 32), torch.float32),
    (2, 5, 130, 4, 2, 2, 32, (64, 64), torch.float32),  # the queries lie in two query blocks
    (1, 3, 66, 6, 2, 1, 128, (64, 16), torch.float32),
    (1, 7, 135, 4, 1, 1, 64, (64, 64), torch.float16),
    (1, 1, 1, 2, 1, 1, 16, (64, 64), torch.float32),
]


@pytest.mark.parametrize("batch, queries, keys, heads, kv_heads, lists, size, blocks, dtype", DECODE)
def test_decode(batch, queries, keys, heads, kv_heads, lists, size, blocks, dtype):
    generator = torch.Generator().manual_seed(keys + size)
    q, k, v = qkv(generator, heads, kv_heads, queries, keys, dtype, batch, size)
    mask = random_mask(generator, batch, lists, queries, keys, *blocks)
    assert serves(heads, kv_heads, lists, queries, size, dtype)
    for splits in (1, 3):
        compare(decode, q, k, v, mask, splits=splits)


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 32])
def test_any_number_of_splits(splits):
    """32 splits of at most 12 blocks: most find nothing to do."""
    generator = torch.Generator().manual_seed(splits)
    q, k, v = qkv(generator, 2, 1, 1, 750, batch=1)
    compare(decode, q, k, v, random_mask(generator, 1, 1, 1, 750), splits=splits)


def test_too_many_splits():
    q, k, v = qkv(torch.Generator(), 2, 1, 1, 100, batch=1)
    with pytest.raises(ValueError, match="splits must be 1 to 32, got 33"):
        decode(q, k, v, random_mask(torch.Generator(), 1, 1, 1, 100), 0.3, splits=33)


def test_values_of_another_size():
    generator = torch.Generator().manual_seed(0)
    for kernel, queries in ((prefill, 70), (decode, 1)):
        q, k, v = qkv(generator, 2, 1, queries, 100)
        compare(kernel, q, k, v[..., :24], random_mask(generator, 2, 1, queries, 100))


def test_views_and_one_list_for_all():
    """Rows of a cache buffer that is not a number behind them, heads next to each other, lists with stride 0."""
    generator = torch.Generator().manual_seed(1)
    for kernel, queries in ((prefill, 70), (decode, 2)):
        q, k, v = qkv(generator, 4, 2, queries, 100)
        mask = sink_window_blocks(queries, 100, 4, [2])
        expected = block_sparse_attention(q, k, v, mask, 0.3, "reference")
        buffer = torch.full((2, 2, 160, 64), float("nan"), device=DEVICE)
        buffer[:, :, 30:130, :32], buffer[:, :, 30:130, 32:] = k.to(DEVICE), v.to(DEVICE)
        k, v = buffer[:, :, 30:130, :32], buffer[:, :, 30:130, 32:]
        q = q.to(DEVICE).transpose(1, 2).contiguous().transpose(1, 2)
        with poisoned_memory():
            found, _ = kernel(q, k, v, on_device(mask), 0.3)
        torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=1e-5)


def test_the_dispatcher_takes_either_kernel():
    generator = torch.Generator().manual_seed(2)
    for queries in (1, 40):
        q, k, v = qkv(generator, 4, 2, queries, 100, batch=1)
        mask = random_mask(generator, 1, 2, queries, 100)
        found = block_sparse_attention(*(x.to(DEVICE) for x in (q, k, v)), on_device(mask), implementation="triton")
        expected = block_sparse_attention(q, k, v, mask, implementation="reference")
        torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("keys, block, size", [(300, 4, 32), (61, 16, 80), (130, 64, 64), (1, 4, 16)])
def test_envelopes_equal_those_of_torch(keys, block, size, dtype):
    k = torch.randn(2, 3, keys + 5, size, generator=torch.Generator().manual_seed(keys)).to(dtype)[:, :, 5:]
    with poisoned_memory():
        found = block_envelope(k.to(DEVICE), block, "triton")
    for mine, torchs in zip(found, block_envelope(k, block, "cpu")):
        assert torch.equal(mine.cpu(), torchs)


SCORES = [
    # batch, queries, keys, heads, key heads, keys of a score block, stride, dtype, splits
    (1, 80, 200, 4, 2, 1, 4, torch.float32, None),
    (2, 5, 200, 6, 2, 16, 1, torch.float32, 1),
    (2, 1, 500, 8, 2, 4, 1, torch.float32, None),
    (1, 1, 500, 3, 3, 1, 1, torch.float32, 7),
    (1, 100, 200, 8, 1, 16, 2, torch.float16, 2),  # 256 rows: two tiles
    (1, 64, 128, 3, 1, 64, 5, torch.float16, None),
    (1, 20, 20, 2, 2, 4, 3, torch.float32, None),  # nothing lies before the first block
]


@pytest.mark.parametrize("batch, queries, keys, heads, kv_heads, score_block, stride, dtype, splits", SCORES)
def test_scores_equal_the_formula(batch, queries, keys, heads, kv_heads, score_block, stride, dtype, splits):
    from infer_patch.kernels.envelope_triton import scores

    generator = torch.Generator().manual_seed(keys + stride)
    q, k, _ = qkv(generator, heads, kv_heads, queries, keys, dtype, batch, size=48)
    envelope = block_envelope(k, score_block)
    sizes = (keys, 64, 64 // score_block, stride, 0.3, 0.2)
    expected = score_key_blocks(q, envelope, *sizes, implementation="reference")
    there = tuple(x if x is None else x.to(DEVICE) for x in envelope)
    with poisoned_memory():
        found = scores(q.to(DEVICE), there, *sizes, splits=splits).cpu()
    assert torch.equal(found.isinf(), expected.isinf())
    tolerance = 10 * TOLERANCE[dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("queries, score_block, slack", [(1, 4, 0.1), (70, 1, 0.1), (40, 16, 0.0)])
def test_lists_equal_those_of_the_reference(queries, score_block, slack):
    generator = torch.Generator().manual_seed(queries)
    q, k, _ = qkv(generator, 4, 2, queries, 400, batch=1)
    options = dict(budget=192, sinks=4, window=1, stride=8, score_block=score_block, slack=slack)
    there = [x.to(DEVICE) for x in (q, k)]
    envelope = block_envelope(there[1], score_block, "triton")
    found = select_blocks(*there, envelope, **options, implementation="triton")
    expected = select_blocks(q, k, block_envelope(k, score_block), **options, implementation="reference")
    assert torch.equal(found.idx.cpu(), expected.idx) and torch.equal(found.count.cpu(), expected.count)


METHODS = [Envelope(budget=128, dense_below=0), SinkWindow(window=64, dense_below=0)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_patched_model_generates_what_it_does_with_the_torch_path(method, monkeypatch):
    layers, lengths, tokens = (1, (150,), 2) if DEVICE == "cpu" else (4, (300, 210, 150), 16)  # interpreting is slow
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
