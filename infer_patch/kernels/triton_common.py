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
