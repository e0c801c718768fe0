"""What ACT needs of chosen heads, in Triton: log-sum-exp of rows, column sums, and listed columns lowered.

No T x S matrix exists: rows are reduced tile by tile with the online softmax, then columns with the rows' LSE, each
program summing its own tile in order (no atomics: results repeat). The correction reads listed keys only.

    LSE_i = log sum_j exp(z_ij)        s_j = sum_i exp(z_ij - LSE_i)        o'_i = c_i o_i + (beta - c_i) O_S,i
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from infer_patch.kernels.triton_common import (
    LN_2,
    LOG2_E,
    LOWEST,
    OPTIONS,
    pad,
    precision,
    rows_contiguous,
    softmax_step,
)

_LISTED = 16  # keys of a list that are read together


@triton.jit(do_not_specialize=["queries", "keys"])
def row_lse_kernel(
    q_ptr, k_ptr, kv_ptr, lse_ptr, scale, queries, keys,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    HEADS: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Natural LSE, fp32 [b, h, T], of TILE_Q rows of one head; `scale` carries log2 e."""
    head = tl.program_id(1) % HEADS
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    query = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    position = query + keys - queries
    channel = tl.arange(0, PAD)
    column = tl.arange(0, TILE_K)
    q_at = q_ptr + batch * q_batch + head.to(tl.int64) * q_head + query.to(tl.int64)[:, None] * q_row
    q = tl.load(q_at + channel, mask=(query < queries)[:, None] & (channel < SIZE), other=0.0)
    k_at = k_ptr + batch * k_batch + tl.load(kv_ptr + head).to(tl.int64) * k_head + channel[:, None]
    top = tl.full([TILE_Q], LOWEST, tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    for start in range(0, tl.minimum(keys, keys - queries + (tl.program_id(0) + 1) * TILE_Q), TILE_K):
        key = start + column
        k_mask = (key < keys)[None, :] & (channel < SIZE)[:, None]
        k = tl.load(k_at + key.to(tl.int64)[None, :] * k_row, mask=k_mask, other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
        _p, top, total, _shrink = softmax_step(scores, top, total)
    lse_at = lse_ptr + (batch * HEADS + head) * queries + query
    tl.store(lse_at, (top + tl.log2(total)) * LN_2, mask=query < queries)


@triton.jit(do_not_specialize=["queries", "keys"])
def column_sums_kernel(
    q_ptr, k_ptr, kv_ptr, lse_ptr, sums_ptr, scale, queries, keys,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    HEADS: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What TILE_K keys of one head receive from all rows, fp32 [b, h, S]; lse is natural."""
    head = tl.program_id(1) % HEADS
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    key = tl.program_id(0) * TILE_K + tl.arange(0, TILE_K)
    channel = tl.arange(0, PAD)
    row = tl.arange(0, TILE_Q)
    k_at = k_ptr + batch * k_batch + tl.load(kv_ptr + head).to(tl.int64) * k_head
    k_mask = (key < keys)[None, :] & (channel < SIZE)[:, None]
    k = tl.load(k_at + channel[:, None] + key.to(tl.int64)[None, :] * k_row, mask=k_mask, other=0.0)
    q_at = q_ptr + batch * q_batch + head.to(tl.int64) * q_head
    lse_at = lse_ptr + (batch * HEADS + head) * queries
    sums = tl.zeros([TILE_K], tl.float32)
    first = tl.maximum(tl.program_id(0) * TILE_K - (keys - queries), 0) // TILE_Q * TILE_Q
    for start in range(first, queries, TILE_Q):
        query = start + row
        real = query < queries
        q_mask = real[:, None] & (channel < SIZE)
        q = tl.load(q_at + query.to(tl.int64)[:, None] * q_row + channel, mask=q_mask, other=0.0)
        lse = tl.load(lse_at + query, mask=real, other=0.0) / LN_2
        scores = tl.dot(q, k, input_precision=PRECISION) * scale - lse[:, None]
        seen = real[:, None] & (key[None, :] <= (query + keys - queries)[:, None])
        sums += tl.sum(tl.exp2(tl.where(seen, scores, float("-inf"))), 0)
    tl.store(sums_ptr + (batch * HEADS + head) * keys + key, sums, mask=key < keys)


@triton.jit(do_not_specialize=["queries", "keys", "listed"])
def lower_columns_kernel(
    o_ptr, q_ptr, k_ptr, v_ptr, kv_ptr, idx_ptr, lse_ptr, out_ptr, mass_ptr, scale, beta, queries, keys, listed,
    o_batch, o_head, o_row, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    out_batch, out_head, out_row,
    HEADS: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, SIZE: tl.constexpr, SIZE_V: tl.constexpr,
    PAD: tl.constexpr, PAD_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """TILE_Q rows of one head with its listed keys (int64 [b, h, listed], -1 at the end) lowered; mass: [b, h, T]."""
    head = tl.program_id(1) % HEADS
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    query = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    real = query < queries
    position = query + keys - queries
    channel = tl.arange(0, PAD)
    channel_v = tl.arange(0, PAD_V)
    column = tl.arange(0, TILE_K)
    q_at = q_ptr + batch * q_batch + head.to(tl.int64) * q_head + query.to(tl.int64)[:, None] * q_row
    q = tl.load(q_at + channel, mask=real[:, None] & (channel < SIZE), other=0.0)
    lse_at = (batch * HEADS + head) * queries + query
    lse = tl.load(lse_ptr + lse_at, mask=real, other=0.0) / LN_2
    kv_head = tl.load(kv_ptr + head).to(tl.int64)
    k_at = k_ptr + batch * k_batch + kv_head * k_head + channel[:, None]
    v_at = v_ptr + batch * v_batch + kv_head * v_head + channel_v
    mass = tl.zeros([TILE_Q], tl.float32)
    part = tl.zeros([TILE_Q, PAD_V], tl.float32)
    for start in range(0, listed, TILE_K):
        at = start + column
        key = tl.load(idx_ptr + (batch * HEADS + head) * listed + at, mask=at < listed, other=-1)
        k_mask = (key >= 0)[None, :] & (channel < SIZE)[:, None]
        v_mask = (key >= 0)[:, None] & (channel_v < SIZE_V)
        k = tl.load(k_at + key[None, :] * k_row, mask=k_mask, other=0.0)
        v = tl.load(v_at + key[:, None] * v_row, mask=v_mask, other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale - lse[:, None]
        seen = (key >= 0)[None, :] & (key[None, :] <= position[:, None])
        p = tl.exp2(tl.where(seen, scores, float("-inf")))
        mass += tl.sum(p, 1)
        part = tl.dot(p.to(v.dtype), v, part, input_precision=PRECISION)
    o_at = o_ptr + batch * o_batch + head.to(tl.int64) * o_head + query.to(tl.int64)[:, None] * o_row
    o_mask = real[:, None] & (channel_v < SIZE_V)
    plain = tl.load(o_at + channel_v, mask=o_mask, other=0.0)
    c = 1 + (1 - beta) * mass / tl.maximum(1 - mass, 1e-6)
    new = (c[:, None] * plain.to(tl.float32) + (beta - c)[:, None] * part).to(plain.dtype)
    out_at = out_ptr + batch * out_batch + head.to(tl.int64) * out_head + query.to(tl.int64)[:, None] * out_row
    tl.store(out_at + channel_v, tl.where((mass > 0)[:, None], new, plain), mask=o_mask)
    tl.store(mass_ptr + lse_at, mass, mask=real)


def constants(heads: int, size: int, dtype: torch.dtype, size_v: int | None = None) -> tuple[dict[str, Any], dict]:
    """(constants, launch options) of the two kernels over all keys; with `size_v`, of `lower_columns_kernel`."""
    wide, wide_v = pad(size), pad(size_v or size)
    large = max(wide, wide_v) > 128 or dtype == torch.float32
    named: dict[str, Any] = {
        "HEADS": heads,
        "TILE_Q": 32 if large else 64,
        "TILE_K": 32 if large else 64,
        "SIZE": size,
        "PAD": wide,
        "PRECISION": precision(dtype),
    }
    warps, heavy = 4, dtype == torch.float32 and max(wide, wide_v) > 64  # wider tiles spill: kernel_resources.py
    if size_v is not None:
        named |= {"TILE_K": _LISTED, "SIZE_V": size_v, "PAD_V": wide_v}
        warps = 8 if heavy else 4
    elif heavy:
        named["TILE_Q"] = 16
    return named, {"num_warps": warps, "num_stages": 2, **OPTIONS}


def lse_and_column_sums(
    q: Tensor, k: Tensor, kv: tuple[int, ...], scale: float, sums: bool = True
) -> tuple[Tensor, Tensor | None]:
    """As `row_attention.lse_and_column_sums`; LSE alone, and None, without `sums`."""
    q, k = rows_contiguous(q), rows_contiguous(k)
    (batch, heads, queries, size), keys = q.shape, k.shape[2]
    named, options = constants(heads, size, q.dtype)
    kv_head = torch.tensor(kv, dtype=torch.int32, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    sizes = float(scale * LOG2_E), queries, keys, *q.stride()[:3], *k.stride()[:3]
    with torch.cuda.device_of(q):
        grid = -(-queries // named["TILE_Q"]), batch * heads
        row_lse_kernel[grid](q, k, kv_head, lse, *sizes, **named, **options)
        if not sums:
            return lse, None
        received = torch.empty(batch, heads, keys, dtype=torch.float32, device=q.device)
        grid = -(-keys // named["TILE_K"]), batch * heads
        column_sums_kernel[grid](q, k, kv_head, lse, received, *sizes, **named, **options)
    return lse, received


def lower_columns(
    output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: tuple[int, ...],
    index: Tensor,
    beta: float,
    scale: float,
    lse: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(output with the keys of the lists int64 [b, h, m] lowered, mass of each row on them, fp32 [b, h, T])."""
    if lse is None:
        lse = lse_and_column_sums(q, k, kv, scale, sums=False)[0]
    output, q, k, v = (rows_contiguous(x) for x in (output, q, k, v))
    batch, heads, queries, size = q.shape
    named, options = constants(heads, size, q.dtype, v.shape[-1])
    kv_head = torch.tensor(kv, dtype=torch.int32, device=q.device)
    new, mass = torch.empty_like(output), torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    strides = [stride for x in (output, q, k, v, new) for stride in x.stride()[:3]]
    sizes = float(scale * LOG2_E), float(beta), queries, k.shape[2], index.shape[-1]
    with torch.cuda.device_of(q):
        lower_columns_kernel[(-(-queries // named["TILE_Q"]), batch * heads)](
            output, q, k, v, kv_head, index.contiguous(), lse.contiguous(), new, mass, *sizes, *strides,
            **named, **options,
        )  # fmt: skip
    return new, mass
