"""What the Triton kernels share: the online softmax, tile sizes, facts about the GPU.

Scores are kept in base 2 (the scale carries log2 e), maxima start at -1e30 rather than -inf: a row that has seen no
visible key yet then multiplies by 2^0, never by a NaN.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))
LOWEST = tl.constexpr(-1e30)
MAX_SPLITS = tl.constexpr(32)
# numbers that change between calls: one binary serves them all
LIST_STRIDES = ["idx_batch", "idx_list", "idx_block", "count_batch", "count_list", "count_block"]
OPTIONS = {"enable_fp_fusion": True}  # for every launch: the default changes between versions of Triton
HOPPER = 200 * 1024  # GPUs with more shared memory read both operands of a product from there, others from registers
_INTERPRETED_GPU = 132, 232448  # an H100 stands in where Triton interprets


@triton.jit
def softmax_step(scores, top, total):
    """One step of the online softmax: scores [R, N], running maximum and sum [R] -> (p [R, N], top, total, shrink)."""
    new = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - new[:, None])
    shrink = tl.exp2(top - new)
    return p, new, total * shrink + tl.sum(p, 1), shrink


@triton.jit
def attend_listed(
    q, position, k_ptr, v_ptr, k_row, v_row, entries, first, last, keys, scale,
    BLOCK_K: tl.constexpr, TILE_K: tl.constexpr, SIZE: tl.constexpr, SIZE_V: tl.constexpr, PAD: tl.constexpr,
    PAD_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of rows q [R, PAD] at `position` [R] to tiles `first` to `last` - 1 of the listed key blocks.

    Returns (maximum [R], sum [R], unnormalised output [R, PAD_V]). Every tile is masked: keys up to a row's position.
    """
    PER: tl.constexpr = BLOCK_K // TILE_K
    channel = tl.arange(0, PAD)
    channel_v = tl.arange(0, PAD_V)
    column = tl.arange(0, TILE_K)
    k_at = k_ptr + column[None, :] * k_row + channel[:, None]
    v_at = v_ptr + column[:, None] * v_row + channel_v[None, :]
    top = tl.full([q.shape[0]], LOWEST, tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    acc = tl.zeros([q.shape[0], PAD_V], tl.float32)
    for j in range(first, last):
        start = tl.load(entries + j // PER).to(tl.int32) * BLOCK_K + j % PER * TILE_K
        key = start + column
        k_mask = (key < keys)[None, :]
        v_mask = (key < keys)[:, None]
        if SIZE < PAD:
            k_mask = k_mask & (channel < SIZE)[:, None]
        if SIZE_V < PAD_V:
            v_mask = v_mask & (channel_v < SIZE_V)[None, :]
        k = tl.load(k_at + start.to(tl.int64) * k_row, mask=k_mask, other=0.0)
        v = tl.load(v_at + start.to(tl.int64) * v_row, mask=v_mask, other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
        p, top, total, shrink = softmax_step(scores, top, total)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return top, total, acc


def precision(dtype: torch.dtype) -> str:
    """Precision of matrix products: fp32 inputs as three TF32 products (error about that of fp32), not one."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def pad(size: int, least: int = 16) -> int:
    """The power of two that holds `size`, at least the 16 of a tensor-core tile."""
    return max(least, 1 << (size - 1).bit_length())


def tile(block: int, most: int) -> int:
    """Largest power of two that divides `block`, at most `most`."""
    return min(block & -block, most)


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` itself, or a copy, such that its last dimension is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


@cache
def gpu(device: torch.device) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory a program may use)."""
    if device.type != "cuda":
        return _INTERPRETED_GPU
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, getattr(found, "shared_memory_per_block_optin", 101376)


def stages(shared: int, once: int, per_stage: int, most: int = 3) -> int:
    """Loop stages whose buffers fit: `once` bytes held throughout, `per_stage` for each stage."""
    return max(1, min(most, (shared - once) // per_stage))
