"""Block-sparse attention for few queries in Triton: the list is split over programs, partial results are merged.

All query heads of a key head, and all queries, are the rows of one tile, so keys and values are read once for the
group. Every split takes an equal part of the list, whose length stays on the device: a split that finds nothing left
writes a log-sum-exp of -inf. Parts share no key, so the merge weighs them by exp(lse).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from infer_patch.kernels.block_mask import BlockMask
from infer_patch.kernels.triton_common import (
    HOPPER,
    LIST_STRIDES,
    LN_2,
    LOG2_E,
    MAX_SPLITS,
    OPTIONS,
    attend_listed,
    gpu,
    pad,
    precision,
    rows_contiguous,
    stages,
    tile,
)


@triton.jit(do_not_specialize=["queries", "keys", "first_block", *LIST_STRIDES])
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    idx_ptr,
    count_ptr,
    out_ptr,
    lse_ptr,
    scale,
    queries,
    keys,
    first_block,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    idx_batch,
    idx_list,
    idx_block,
    count_batch,
    count_list,
    count_block,
    out_batch,
    out_head,
    out_row,
    out_split,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    LISTS: tl.constexpr,
    STACK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_K: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_V: tl.constexpr,
    PAD: tl.constexpr,
    PAD_V: tl.constexpr,
    PRECISION: tl.constexpr,
    LSE: tl.constexpr,
):
    """Rows are STACK heads x queries; grid (splits, batch x HEADS / STACK, query blocks the queries lie in).

    `scale` carries log2 e. Output of split s at out_ptr + s out_split; lse (base 2) [splits, B, H, T] if LSE.
    """
    PER: tl.constexpr = BLOCK_K // TILE_K
    split = tl.program_id(0)
    batch = (tl.program_id(1) // (HEADS // STACK)).to(tl.int64)
    head = tl.program_id(1) % (HEADS // STACK) * STACK
    block = tl.program_id(2)
    row = tl.arange(0, ROWS)
    heads = head + row // queries
    query = row % queries
    position = keys - queries + query
    real = (row < STACK * queries) & (position // BLOCK_Q == first_block + block)
    channel = tl.arange(0, PAD)
    channel_v = tl.arange(0, PAD_V)

    q_at = batch * q_batch + heads * q_head + query * q_row
    q = tl.load(q_ptr + q_at[:, None] + channel, mask=real[:, None] & (channel < SIZE), other=0.0)
    k_ptr += batch * k_batch + (head // GROUP).to(tl.int64) * k_head
    v_ptr += batch * v_batch + (head // GROUP).to(tl.int64) * v_head
    which = head // (HEADS // LISTS)
    entries = idx_ptr + batch * idx_batch + which.to(tl.int64) * idx_list + block * idx_block
    listed = tl.load(count_ptr + batch * count_batch + which * count_list + block * count_block).to(tl.int32) * PER
    share = tl.cdiv(listed, tl.num_programs(0))

    last = tl.minimum((split + 1) * share, listed)
    top, total, acc = attend_listed(
        q, position, k_ptr, v_ptr, k_row, v_row, entries, split * share, last, keys, scale,
        BLOCK_K, TILE_K, SIZE, SIZE_V, PAD, PAD_V, PRECISION,
    )  # fmt: skip

    seen = total > 0
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    out_at = split.to(tl.int64) * out_split + batch * out_batch + heads * out_head + query * out_row
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_at[:, None] + channel_v, out, mask=real[:, None] & (channel_v < SIZE_V))
    if LSE:
        batches = tl.num_programs(1) // (HEADS // STACK)
        lse_at = ((split * batches + batch) * HEADS + heads) * queries + query
        tl.store(lse_ptr + lse_at, tl.where(seen, top + tl.log2(total), float("-inf")), mask=real)


@triton.jit(do_not_specialize=["queries", "rows", "splits"])
def merge_kernel(
    parts_ptr,
    lses_ptr,
    out_ptr,
    lse_ptr,
    queries,
    rows,
    splits,
    out_batch,
    out_head,
    out_row,
    HEADS: tl.constexpr,
    SIZE_V: tl.constexpr,
    PAD_V: tl.constexpr,
    LSE: tl.constexpr,
):
    """out = sum_s parts_s 2^lse_s / sum_s 2^lse_s for one of the B x H x T rows; parts fp32 [splits, rows, SIZE_V].

    Every row has a split that saw a key. `lse` (natural, fp32 [rows]) only if LSE.
    """
    row = tl.program_id(0)
    split = tl.arange(0, MAX_SPLITS)
    channel = tl.arange(0, PAD_V)
    lses = tl.load(lses_ptr + split * rows + row, mask=split < splits, other=float("-inf"))
    top = tl.max(lses, 0)
    weight = tl.exp2(lses - top)
    total = tl.sum(weight, 0)
    # parts of empty splits are never read: they hold whatever was in memory
    part_at = (split.to(tl.int64) * rows + row)[:, None] * SIZE_V + channel
    parts = tl.load(parts_ptr + part_at, mask=(weight > 0)[:, None] & (channel < SIZE_V), other=0.0)
    out = tl.sum(parts * weight[:, None], 0) / total
    batch = (row // queries // HEADS).to(tl.int64)
    at = batch * out_batch + row // queries % HEADS * out_head + row % queries * out_row
    tl.store(out_ptr + at + channel, out.to(out_ptr.dtype.element_ty), mask=channel < SIZE_V)
    if LSE:
        tl.store(lse_ptr + row, (top + tl.log2(total)) * LN_2)


def serves(heads: int, kv_heads: int, lists: int, queries: int, size: int, dtype: torch.dtype) -> bool:
    """Whether the rows of one program fit its tile; where not, prefill serves the call."""
    most = 64 if size <= 128 and dtype != torch.float32 else 32
    return (heads // kv_heads if lists != heads else 1) * queries <= most


def constants(
    heads: int,
    kv_heads: int,
    lists: int,
    queries: int,
    splits: int,
    block_q: int,
    block_k: int,
    size: int,
    size_v: int,
    dtype: torch.dtype,
    shared: int,
    lse: bool = False,
) -> tuple[dict[str, Any], dict[str, int]]:
    """(constants of `decode_kernel`, launch options) for these sizes on a GPU with `shared` bytes of shared memory."""
    item, wide, wide_v = dtype.itemsize, pad(size), pad(size_v)
    stack = heads // kv_heads if lists != heads else 1
    rows = pad(stack * queries)
    # these spill no registers: benchmarks/kernel_resources.py
    keys = 64 if max(wide, wide_v) * item <= 256 and (rows == 16 or dtype != torch.float32) else 32
    if rows == 64 and max(wide, wide_v) == 128 and shared < HOPPER:
        keys = 32
    tile_k = tile(block_k, keys)
    named: dict[str, Any] = {
        "HEADS": heads,
        "GROUP": heads // kv_heads,
        "LISTS": lists,
        "STACK": stack,
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "ROWS": rows,
        "TILE_K": tile_k,
        "SIZE": size,
        "SIZE_V": size_v,
        "PAD": wide,
        "PAD_V": wide_v,
        "PRECISION": precision(dtype),
        "LSE": splits > 1 or lse,
    }
    depth = stages(shared, rows * wide * item, tile_k * (wide + wide_v) * item)
    warps = 8 if rows > 16 and dtype == torch.float32 else 4
    return named, {"num_warps": warps, "num_stages": depth, **OPTIONS}


def number_of_splits(programs: int, width: int, multiprocessors: int) -> int:
    """Parts to split lists of up to `width` blocks into: two programs a multiprocessor, two blocks a part or more.

    `programs` is how many one part makes. All of it is known on the host.
    """
    return max(1, min(2 * multiprocessors // programs, width // 2, MAX_SPLITS.value))


def decode(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, lse: bool = False, splits: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """(attention [B, H, T, D_v] of few queries q [B, H, T, D] to the listed blocks, natural log-sum-exp if `lse`).

    Parameters
    ----------
    splits : int, optional
        Parts of each list, 1 to 32; default by the size of the GPU.
    """
    if splits is not None and not 1 <= splits <= MAX_SPLITS.value:
        raise ValueError(f"splits must be 1 to {MAX_SPLITS.value}, got {splits}")
    batch, heads, queries, size = q.shape
    kv_heads, keys, size_v = k.shape[1], k.shape[2], v.shape[3]
    q, k, v, idx = (rows_contiguous(x) for x in (q, k, v, mask.idx))
    lists, width = idx.shape[1], idx.shape[3]
    idx, count = idx.expand(batch, -1, -1, -1), mask.count.expand(batch, -1, -1)
    first, blocks = mask.diagonal(queries, keys)
    multiprocessors, shared = gpu(q.device)
    programs = batch * blocks * (heads if lists == heads else kv_heads)
    splits = number_of_splits(programs, width, multiprocessors) if splits is None else splits
    sizes = (heads, kv_heads, lists, queries, splits, mask.block_q, mask.block_k, size, size_v, q.dtype, shared)
    named, options = constants(*sizes, lse=lse)
    out = torch.empty(batch, queries, heads, size_v, dtype=q.dtype, device=q.device).transpose(1, 2)
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    parts = torch.empty(splits, batch, heads, queries, size_v, **fp32) if splits > 1 else out[None]
    lses = torch.empty(splits, batch, heads, queries, **fp32) if named["LSE"] else out
    with torch.cuda.device_of(q):
        decode_kernel[(splits, batch * heads // named["STACK"], blocks)](
            q,
            k,
            v,
            idx,
            count,
            parts,
            lses,
            float(scale * LOG2_E),
            queries,
            keys,
            first,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *idx.stride()[:3],
            *count.stride(),
            *parts.stride()[1:4],
            parts.stride(0),
            **named,
            **options,
        )
        if splits == 1:
            return out, lses[0] * LN_2.value if lse else None
        sums = torch.empty(batch, heads, queries, **fp32) if lse else None
        merge_kernel[(batch * heads * queries,)](
            parts,
            lses,
            out,
            parts if sums is None else sums,
            queries,
            batch * heads * queries,
            splits,
            *out.stride()[:3],
            HEADS=heads,
            SIZE_V=size_v,
            PAD_V=pad(size_v),
            LSE=lse,
            **OPTIONS,
        )
    return out, sums
