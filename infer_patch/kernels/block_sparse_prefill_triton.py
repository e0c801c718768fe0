"""Block-sparse prefill in Triton: one program walks the list of one query block, for one or more heads of a group.

Every listed block is masked (position of the key <= position of the query): a second loop without the mask would spill
registers on sm_80 and lose the multi-buffering of keys and values. Heads that share keys and list are stacked as rows
of one tile, so that a tile of 128 rows reads each key block once for two heads. Long lists start first.
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
    OPTIONS,
    attend_listed,
    gpu,
    pad,
    precision,
    rows_contiguous,
    stages,
    tile,
)


@triton.jit(do_not_specialize=["queries", "keys", "first_tile", "tiles", "first_block", "batches", *LIST_STRIDES])
def prefill_kernel(
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
    first_tile,
    tiles,
    first_block,
    batches,
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
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    LISTS: tl.constexpr,
    STACK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_V: tl.constexpr,
    PAD: tl.constexpr,
    PAD_V: tl.constexpr,
    PRECISION: tl.constexpr,
    LSE: tl.constexpr,
):
    """Rows of TILE_Q positions x STACK heads; idx and count are read with their strides (0 where shared).

    `scale` carries log2 e. Tiles are numbered from position 0 on; lse (natural, fp32 [B, H, T]) only if LSE.
    """
    SETS: tl.constexpr = HEADS // STACK
    PER: tl.constexpr = BLOCK_K // TILE_K
    program = tl.program_id(0)
    head = program % SETS * STACK
    batch = (program // SETS % batches).to(tl.int64)
    number = first_tile + tiles - 1 - program // SETS // batches
    block = number // (BLOCK_Q // TILE_Q) - first_block
    row = tl.arange(0, TILE_Q * STACK)
    position = number * TILE_Q + row % TILE_Q
    heads = head + row // TILE_Q
    query = position - (keys - queries)
    real = (query >= 0) & (query < queries)
    channel = tl.arange(0, PAD)
    channel_v = tl.arange(0, PAD_V)

    q_at = batch * q_batch + heads.to(tl.int64) * q_head + query.to(tl.int64) * q_row
    q = tl.load(q_ptr + q_at[:, None] + channel, mask=real[:, None] & (channel < SIZE), other=0.0)
    k_ptr += batch * k_batch + (head // GROUP).to(tl.int64) * k_head
    v_ptr += batch * v_batch + (head // GROUP).to(tl.int64) * v_head
    which = head // (HEADS // LISTS)
    entries = idx_ptr + batch * idx_batch + which.to(tl.int64) * idx_list + block.to(tl.int64) * idx_block
    listed = tl.load(count_ptr + batch * count_batch + which * count_list + block * count_block).to(tl.int32)

    top, total, acc = attend_listed(
        q, position, k_ptr, v_ptr, k_row, v_row, entries, 0, listed * PER, keys, scale,
        BLOCK_K, TILE_K, SIZE, SIZE_V, PAD, PAD_V, PRECISION,
    )  # fmt: skip

    out_at = out_ptr + batch * out_batch + heads.to(tl.int64) * out_head + query.to(tl.int64) * out_row
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_at[:, None] + channel_v, out, mask=real[:, None] & (channel_v < SIZE_V))
    if LSE:
        lse_at = lse_ptr + (batch * HEADS + heads) * queries + query
        tl.store(lse_at, (top + tl.log2(total)) * LN_2, mask=real)


def constants(
    heads: int,
    kv_heads: int,
    lists: int,
    block_q: int,
    block_k: int,
    size: int,
    size_v: int,
    dtype: torch.dtype,
    shared: int,
    lse: bool = False,
) -> tuple[dict[str, Any], dict[str, int]]:
    """(constants of `prefill_kernel`, launch options) for these sizes on a GPU with `shared` bytes of shared memory."""
    wide, wide_v = pad(size), pad(size_v)
    most, keys, warps = _largest_tile(max(wide, wide_v), dtype)
    tile_q = tile(block_q, min(most, 64))
    group = heads // kv_heads
    stack = tile(group, most // tile_q) if lists != heads else 1
    rows = tile_q * stack
    if rows <= 64 and max(wide, wide_v) == 128 and shared < HOPPER:
        keys = 32  # with 64, queries and products spill: here they are all in registers
    if rows <= 64 and max(wide, wide_v) <= 128 and dtype != torch.float32:
        warps = 4
    named: dict[str, Any] = {
        "HEADS": heads,
        "GROUP": group,
        "LISTS": lists,
        "STACK": stack,
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "TILE_Q": tile_q,
        "TILE_K": tile(block_k, keys),
        "SIZE": size,
        "SIZE_V": size_v,
        "PAD": wide,
        "PAD_V": wide_v,
        "PRECISION": precision(dtype),
        "LSE": lse,
    }
    depth = stages(shared, rows * wide * dtype.itemsize, named["TILE_K"] * (wide + wide_v) * dtype.itemsize)
    return named, {"num_warps": warps, "num_stages": depth, **OPTIONS}


def _largest_tile(size: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(rows, keys, warps) that neither spill registers nor overflow shared memory: benchmarks/kernel_resources.py."""
    if dtype == torch.float32:
        return (32, 32, 4) if size <= 64 else (32, 32, 8)
    return (128, 64, 8) if size <= 128 else (64, 32, 8)


def prefill(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(attention [B, H, T, D_v] of q [B, H, T, D] to the listed blocks, natural log-sum-exp fp32 [B, H, T] if `lse`).

    The output is laid out as [B, T, H, D_v], as models want it next.
    """
    batch, heads, queries, size = q.shape
    kv_heads, keys, size_v = k.shape[1], k.shape[2], v.shape[3]
    q, k, v, idx = (rows_contiguous(x) for x in (q, k, v, mask.idx))
    lists = idx.shape[1]
    shared = gpu(q.device)[1]
    named, options = constants(heads, kv_heads, lists, mask.block_q, mask.block_k, size, size_v, q.dtype, shared, lse)
    out = torch.empty(batch, queries, heads, size_v, dtype=q.dtype, device=q.device).transpose(1, 2)
    sums = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device) if lse else None
    past, tile_q = keys - queries, named["TILE_Q"]
    first_tile = past // tile_q
    tiles = -(-keys // tile_q) - first_tile
    count = mask.count.expand(batch, lists, -1)
    idx = idx.expand(batch, lists, -1, -1)
    with torch.cuda.device_of(q):
        prefill_kernel[(tiles * batch * heads // named["STACK"],)](
            q,
            k,
            v,
            idx,
            count,
            out,
            out if sums is None else sums,
            float(scale * LOG2_E),
            queries,
            keys,
            first_tile,
            tiles,
            past // mask.block_q,
            batch,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *idx.stride()[:3],
            *count.stride(),
            *out.stride()[:3],
            **named,
            **options,
        )
    return out, sums
