"""Probe scores in Triton: the log-sum-exp of every probe row, then the column sums. Scores never reach memory.

In the first pass a program holds a tile of probe rows and walks its split of the keys; in the second it holds a tile of
keys and walks the rows of all query heads, so that it owns its sums and nothing is added atomically.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from infer_patch.kernels.triton_common import (
    LOG2_E,
    LOWEST,
    MAX_SPLITS,
    OPTIONS,
    gpu,
    pad,
    precision,
    rows_contiguous,
    softmax_step,
    stages,
)


@triton.jit
def _rows(
    q_ptr, probe_ptr, row, probes, q_head, q_row,
    GROUP: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """(q [ROWS, PAD], position of each row): rows are GROUP heads x probes; position -1 past the last of them."""
    real = row < GROUP * probes
    channel = tl.arange(0, PAD)
    at = (row // probes).to(tl.int64)[:, None] * q_head + (row % probes).to(tl.int64)[:, None] * q_row + channel
    q = tl.load(q_ptr + at, mask=real[:, None] & (channel < SIZE), other=0.0)
    return q, tl.load(probe_ptr + row % probes, mask=real, other=-1)


@triton.jit
def _keys(k_ptr, position_ptr, column, keys, k_row, SIZE: tl.constexpr, PAD: tl.constexpr):
    """(k^T [PAD, COLUMNS], position of each key, which are there)."""
    channel = tl.arange(0, PAD)
    there = column < keys
    at = column.to(tl.int64)[None, :] * k_row + channel[:, None]
    k = tl.load(k_ptr + at, mask=there[None, :] & (channel < SIZE)[:, None], other=0.0)
    return k, tl.load(position_ptr + column, mask=there, other=0), there


@triton.jit(do_not_specialize=["probes", "keys", "splits", "probe_batch", "position_batch"])
def probe_sums_kernel(
    q_ptr, k_ptr, probe_ptr, position_ptr, lse_ptr, scale, probes, keys, splits, q_batch, q_head, q_row,
    k_batch, k_head, k_row, probe_batch, position_batch,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr,
    PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """lse (base 2) [B x KV_HEADS, splits, GROUP x probes]; grid (splits, row tiles, B x KV_HEADS).

    -inf where a row sees no key of the split.
    """
    split, pair = tl.program_id(0), tl.program_id(2)
    batch, head = (pair // KV_HEADS).to(tl.int64), (pair % KV_HEADS).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    q, limit = _rows(
        q_ptr + batch * q_batch + head * GROUP * q_head, probe_ptr + batch * probe_batch, row, probes, q_head, q_row,
        GROUP, SIZE, PAD,
    )  # fmt: skip
    k_ptr += batch * k_batch + head * k_head
    position_ptr += batch * position_batch
    tiles = tl.cdiv(keys, COLUMNS)
    share = tl.cdiv(tiles, splits)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for j in range(split * share, tl.minimum((split + 1) * share, tiles)):
        column = j * COLUMNS + tl.arange(0, COLUMNS)
        k, position, there = _keys(k_ptr, position_ptr, column, keys, k_row, SIZE, PAD)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        visible = there[None, :] & (position[None, :] <= limit[:, None])
        _p, top, total, _shrink = softmax_step(tl.where(visible, scores, float("-inf")), top, total)
    seen = total > 0
    lse = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
    at = (pair.to(tl.int64) * splits + split) * (GROUP * probes) + row
    tl.store(lse_ptr + at, lse, mask=row < GROUP * probes)


@triton.jit(do_not_specialize=["probes", "keys", "probe_batch", "position_batch"])
def probe_mass_kernel(
    q_ptr, k_ptr, probe_ptr, position_ptr, lse_ptr, mass_ptr, scale, probes, keys, q_batch, q_head, q_row,
    k_batch, k_head, k_row, probe_batch, position_batch,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr,
    PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """mass fp32 [B, KV_HEADS, keys] = sum over rows of 2^(score - lse); grid (key tiles, B x KV_HEADS).

    lse (base 2) [B x KV_HEADS, GROUP x probes]; a row that sees nothing (-inf) adds nothing.
    """
    pair = tl.program_id(1)
    batch, head = (pair // KV_HEADS).to(tl.int64), (pair % KV_HEADS).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    k, position, there = _keys(
        k_ptr + batch * k_batch + head * k_head, position_ptr + batch * position_batch, column, keys, k_row, SIZE, PAD
    )
    q_ptr += batch * q_batch + head * GROUP * q_head
    rows = GROUP * probes
    mass = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        q, limit = _rows(q_ptr, probe_ptr + batch * probe_batch, row, probes, q_head, q_row, GROUP, SIZE, PAD)
        lse = tl.load(lse_ptr + pair.to(tl.int64) * rows + row, mask=row < rows, other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        visible = (position[None, :] <= limit[:, None]) & (row < rows)[:, None]
        mass += tl.sum(tl.exp2(tl.where(visible, scores - lse[:, None], float("-inf"))), 0)
    tl.store(mass_ptr + pair.to(tl.int64) * keys + column, mass, mask=there)


def constants(
    heads: int, kv_heads: int, probes: int, size: int, dtype: torch.dtype, shared: int
) -> tuple[dict[str, Any], dict[str, int]]:
    """(constants of both kernels, launch options) for these sizes on a GPU with `shared` bytes of shared memory."""
    wide = pad(size)
    rows = min(pad(heads // kv_heads * probes), 64 if dtype != torch.float32 else 16)
    named: dict[str, Any] = {
        "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "ROWS": rows,
        "COLUMNS": 64,
        "SIZE": size,
        "PAD": wide,
        "PRECISION": precision(dtype),
    }
    depth = stages(shared, 2 * rows * wide * dtype.itemsize, 64 * wide * dtype.itemsize)
    return named, {"num_warps": 4, "num_stages": depth, **OPTIONS}


def row_log_sums(
    q: Tensor, k: Tensor, scale: float, probes: Tensor, positions: Tensor, splits: int | None = None
) -> Tensor:
    """Natural log-sum-exp of rows q [B, H, m, D] over the keys k [B, H_kv, n, D] up to each: fp32 [B, H, m].

    Parameters
    ----------
    probes, positions : int64 Tensor [B or 1, m] and [B or 1, n]
        Positions of rows and keys.
    splits : int, optional
        Parts of the keys; default by the size of the GPU.
    """
    (batch, heads, m, size), (kv_heads, n) = q.shape, k.shape[1:3]
    q, k = rows_contiguous(q), rows_contiguous(k)
    probes, positions = (rows_contiguous(x).expand(batch, -1) for x in (probes, positions))
    multiprocessors, shared = gpu(q.device)
    named, options = constants(heads, kv_heads, m, size, q.dtype, shared)
    rows = heads // kv_heads * m
    row_tiles, column_tiles = triton.cdiv(rows, named["ROWS"]), triton.cdiv(n, named["COLUMNS"])
    if splits is None:
        splits = max(1, min(2 * multiprocessors // (batch * kv_heads * row_tiles), column_tiles // 2, MAX_SPLITS.value))
    lses = torch.empty(batch * kv_heads, splits, rows, dtype=torch.float32, device=q.device)
    strides = (*q.stride()[:3], *k.stride()[:3], probes.stride(0), positions.stride(0))
    with torch.cuda.device_of(q):
        probe_sums_kernel[(splits, row_tiles, batch * kv_heads)](
            q, k, probes, positions, lses, float(scale * LOG2_E), m, n, splits, *strides, **named, **options
        )
    return (lses * (1 / LOG2_E)).logsumexp(1).view(batch, heads, m)


def probe_scores(
    q: Tensor, k: Tensor, scale: float, probes: Tensor, positions: Tensor, splits: int | None = None
) -> Tensor:
    """`probe_scores` of q [B, H, m, D] and k [B, H_kv, n, D], positions int64 [B, m] and [B, n]: fp32 [B, H_kv, n].

    `splits` as of `row_log_sums`, the first pass.
    """
    (batch, heads, m, size), (kv_heads, n) = q.shape, k.shape[1:3]
    q, k = rows_contiguous(q), rows_contiguous(k)
    probes, positions = (rows_contiguous(x).expand(batch, -1) for x in (probes, positions))
    lse = row_log_sums(q, k, scale, probes, positions, splits) * LOG2_E
    named, options = constants(heads, kv_heads, m, size, q.dtype, gpu(q.device)[1])
    mass = torch.empty(batch, kv_heads, n, dtype=torch.float32, device=q.device)
    strides = (*q.stride()[:3], *k.stride()[:3], probes.stride(0), positions.stride(0))
    with torch.cuda.device_of(q):
        probe_mass_kernel[(triton.cdiv(n, named["COLUMNS"]), batch * kv_heads)](
            q, k, probes, positions, lse, mass, float(scale * LOG2_E), m, n, *strides, **named, **options
        )
    return mass
