"""Block selection in Triton: envelopes of key blocks, and their scores in two passes.

The first pass takes the log-sum-exp of every sampled row over all score blocks before its query block, the second
computes the same scores again and keeps, for each key block, the largest minus that sum. Scores never reach memory:
what does is one number for each sampled row, and one for each pair of a query block and a key block.
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
    MAX_SPLITS,
    OPTIONS,
    gpu,
    pad,
    precision,
    rows_contiguous,
    softmax_step,
    stages,
)

_BLOCKS = 16  # score blocks of one program of `envelope_kernel`


@triton.jit(do_not_specialize=["keys", "blocks"])
def envelope_kernel(
    k_ptr,
    centre_ptr,
    half_ptr,
    keys,
    blocks,
    kv_heads,
    k_batch,
    k_head,
    k_row,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SIZE: tl.constexpr,
    PAD: tl.constexpr,
):
    """Centre and half-width [B, H_kv, blocks, SIZE] of blocks of BLOCK keys; grid (blocks / BLOCKS, B x H_kv)."""
    pair = tl.program_id(1)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    channel = tl.arange(0, PAD)
    mask = (block < blocks)[:, None] & (channel < SIZE)
    k_ptr += (pair // kv_heads).to(tl.int64) * k_batch + (pair % kv_heads).to(tl.int64) * k_head
    low = tl.full([BLOCKS, PAD], float("inf"), tl.float32)
    high = tl.full([BLOCKS, PAD], float("-inf"), tl.float32)
    for i in range(BLOCK):
        key = tl.minimum(block * BLOCK + i, keys - 1)  # past the last key: the last key again
        x = tl.load(k_ptr + key.to(tl.int64)[:, None] * k_row + channel, mask=mask, other=0.0).to(tl.float32)
        low, high = tl.minimum(low, x), tl.maximum(high, x)
    at = (pair.to(tl.int64) * blocks + block)[:, None] * SIZE + channel
    tl.store(centre_ptr + at, ((high + low) * 0.5).to(centre_ptr.dtype.element_ty), mask=mask)
    tl.store(half_ptr + at, ((high - low) * 0.5).to(half_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sampled_rows(
    q_ptr, number, head, row_tile, queries, keys, q_head, q_row,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, SAMPLES: tl.constexpr, ROWS: tl.constexpr,
    SIZE: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """(q [ROWS, PAD], which rows are real): every STRIDE-th row of query block `number` from its last one up."""
    row = row_tile * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, PAD)
    past = keys - queries
    position = tl.minimum((number + 1) * BLOCK, keys) - 1 - row % SAMPLES * STRIDE
    real = (row < GROUP * SAMPLES) & (position >= number * BLOCK) & (position >= past)
    at = (head * GROUP + row // SAMPLES).to(tl.int64) * q_head + (position - past).to(tl.int64) * q_row
    return tl.load(q_ptr + at[:, None] + channel, mask=real[:, None] & (channel < SIZE), other=0.0), real


@triton.jit
def _tile_scores(
    q, centre_ptr, half_ptr, column, columns, scale, slack, c_row, h_row,
    SIZE: tl.constexpr, PAD: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale (q . c + slack |q| . h): q [R, PAD] and score blocks `column` [N] -> [R, N], -inf from `columns` on."""
    channel = tl.arange(0, PAD)
    mask = (column < columns)[None, :] & (channel < SIZE)[:, None]
    wide = column.to(tl.int64)[None, :]
    centre = tl.load(centre_ptr + wide * c_row + channel[:, None], mask=mask, other=0.0)
    scores = tl.dot(q, centre, input_precision=PRECISION)
    if HALF:
        half = tl.load(half_ptr + wide * h_row + channel[:, None], mask=mask, other=0.0)
        scores += tl.dot(tl.abs(q), half, input_precision=PRECISION) * slack
    return tl.where((column < columns)[None, :], scores * scale, float("-inf"))


@triton.jit(do_not_specialize=["queries", "keys", "first", "row_tiles", "splits"])
def row_sums_kernel(
    q_ptr, centre_ptr, half_ptr, lse_ptr, scale, slack, queries, keys, first, row_tiles, splits,
    q_batch, q_head, q_row, c_batch, c_head, c_row, h_batch, h_head, h_row,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, PER: tl.constexpr, STRIDE: tl.constexpr,
    SAMPLES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr,
    PAD: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """lse (base 2) [B x H_kv, n_q, row tiles, splits, ROWS]; grid (splits x row tiles, n_q, B x H_kv)."""
    split, row_tile = tl.program_id(0) % splits, tl.program_id(0) // splits
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    pair = tl.program_id(2)
    batch, head = (pair // KV_HEADS).to(tl.int64), pair % KV_HEADS
    number = first + block
    q, _real = _sampled_rows(
        q_ptr + batch * q_batch, number, head, row_tile, queries, keys, q_head, q_row,
        GROUP, BLOCK, STRIDE, SAMPLES, ROWS, SIZE, PAD,
    )  # fmt: skip
    centre_ptr += batch * c_batch + head.to(tl.int64) * c_head
    half_ptr += batch * h_batch + head.to(tl.int64) * h_head
    columns = number * PER
    tiles = tl.cdiv(columns, COLUMNS)
    share = tl.cdiv(tiles, splits)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for j in range(split * share, tl.minimum((split + 1) * share, tiles)):
        column = j * COLUMNS + tl.arange(0, COLUMNS)
        scores = _tile_scores(
            q, centre_ptr, half_ptr, column, columns, scale, slack, c_row, h_row, SIZE, PAD, HALF, PRECISION
        )
        _p, top, total, _shrink = softmax_step(scores, top, total)
    lse = tl.where(total > 0, top + tl.log2(total), LOWEST)
    at = ((pair.to(tl.int64) * tl.num_programs(1) + block) * row_tiles + row_tile) * splits + split
    tl.store(lse_ptr + at * ROWS + tl.arange(0, ROWS), lse)


@triton.jit(do_not_specialize=["queries", "keys", "first", "row_tiles", "splits", "key_blocks"])
def block_maxima_kernel(
    q_ptr, centre_ptr, half_ptr, lse_ptr, score_ptr, scale, slack, queries, keys, first, row_tiles, splits, key_blocks,
    q_batch, q_head, q_row, c_batch, c_head, c_row, h_batch, h_head, h_row,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, PER: tl.constexpr, STRIDE: tl.constexpr,
    SAMPLES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr,
    PAD: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Scores fp32 [row tiles, B x H_kv, n_q, key_blocks]; grid (chunks x row tiles, n_q, B x H_kv).

    A program writes CHUNK tiles of COLUMNS score blocks, -inf where they do not lie before the query block.
    """
    NEW: tl.constexpr = COLUMNS // PER
    row_tile, chunk = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    pair = tl.program_id(2)
    batch, head = (pair // KV_HEADS).to(tl.int64), pair % KV_HEADS
    number = first + block
    q, real = _sampled_rows(
        q_ptr + batch * q_batch, number, head, row_tile, queries, keys, q_head, q_row,
        GROUP, BLOCK, STRIDE, SAMPLES, ROWS, SIZE, PAD,
    )  # fmt: skip
    centre_ptr += batch * c_batch + head.to(tl.int64) * c_head
    half_ptr += batch * h_batch + head.to(tl.int64) * h_head
    score_row = (row_tile * tl.num_programs(2) + pair).to(tl.int64) * tl.num_programs(1) + block
    score_ptr += score_row * key_blocks
    columns = number * PER

    split = tl.arange(0, MAX_SPLITS)
    at = ((pair.to(tl.int64) * tl.num_programs(1) + block) * row_tiles + row_tile) * splits + split
    lses = tl.load(lse_ptr + at[:, None] * ROWS + tl.arange(0, ROWS), mask=(split < splits)[:, None], other=LOWEST)
    top = tl.max(lses, 0)
    lse = top + tl.log2(tl.sum(tl.exp2(lses - top[None, :]), 0))

    begin, end = chunk * CHUNK, (chunk + 1) * CHUNK
    worth = tl.minimum(tl.maximum(tl.cdiv(columns, COLUMNS), begin), end)  # tiles from here on lie behind
    for j in range(begin, worth):
        column = j * COLUMNS + tl.arange(0, COLUMNS)
        key_block = j * NEW + tl.arange(0, NEW)
        scores = _tile_scores(
            q, centre_ptr, half_ptr, column, columns, scale, slack, c_row, h_row, SIZE, PAD, HALF, PRECISION
        )
        scores = tl.where(real[:, None], scores - lse[:, None], float("-inf"))
        best = tl.max(tl.reshape(tl.max(scores, 0), [NEW, PER]), 1)
        tl.store(score_ptr + key_block, best * LN_2, mask=key_block < key_blocks)
    for j in range(worth, end):
        key_block = j * NEW + tl.arange(0, NEW)
        tl.store(score_ptr + key_block, tl.full([NEW], float("-inf"), tl.float32), mask=key_block < key_blocks)


def envelope(k: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(centre, half-width) of blocks of `block` keys: k [B, H_kv, S, D] -> two of [B, H_kv, ceil(S / block), D]."""
    batch, kv_heads, keys, size = k.shape
    k, blocks = rows_contiguous(k), -(-keys // block)
    centre, half = (torch.empty(batch, kv_heads, blocks, size, dtype=k.dtype, device=k.device) for _ in range(2))
    with torch.cuda.device_of(k):
        envelope_kernel[(triton.cdiv(blocks, _BLOCKS), batch * kv_heads)](
            k,
            centre,
            half,
            keys,
            blocks,
            kv_heads,
            *k.stride()[:3],
            BLOCK=block,
            BLOCKS=_BLOCKS,
            SIZE=size,
            PAD=pad(size),
            **OPTIONS,
        )
    return centre, half


def constants(
    heads: int,
    kv_heads: int,
    block: int,
    per: int,
    stride: int,
    samples: int,
    size: int,
    dtype: torch.dtype,
    shared: int,
    half: bool,
) -> tuple[dict[str, Any], dict[str, int]]:
    """(constants both scoring kernels share, launch options); `samples` rows of a query block at most are scored."""
    item, wide, group, samples = dtype.itemsize, pad(size), heads // kv_heads, pad(samples, 1)
    # these spill no registers: benchmarks/kernel_resources.py
    rows = min(pad(group * samples), 16 if dtype == torch.float32 else 128 if wide <= 128 else 64)
    columns = max(per, 64 if wide <= 128 else 32)
    named: dict[str, Any] = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "BLOCK": block,
        "PER": per,
        "STRIDE": stride,
        "SAMPLES": samples,
        "ROWS": rows,
        "COLUMNS": columns,
        "SIZE": size,
        "PAD": wide,
        "HALF": half,
        "PRECISION": precision(dtype),
    }
    depth = stages(shared, 2 * rows * wide * item, (1 + half) * columns * wide * item)
    return named, {"num_warps": 8 if rows == 128 else 4, "num_stages": depth, **OPTIONS}


def scores(
    q: Tensor,
    envelope: tuple[Tensor, Tensor | None],
    keys: int,
    block: int,
    per: int,
    stride: int,
    slack: float,
    scale: float,
    splits: int | None = None,
) -> Tensor:
    """log of the largest probability that any sampled row gives any of the `per` score blocks of a key block.

    q [B, H, T, D] and envelopes of score blocks -> fp32 [B, H_kv, n_q, n_k], -inf from the query block's own on.
    """
    batch, heads, queries, size = q.shape
    kv_heads = envelope[0].shape[1]
    half = envelope[1] is not None and slack != 0
    q, centre = rows_contiguous(q), rows_contiguous(envelope[0])
    half_width = rows_contiguous(envelope[1]) if half else centre  # type: ignore[arg-type]
    first, key_blocks = (keys - queries) // block, -(-keys // block)
    n_q = key_blocks - first
    multiprocessors, shared = gpu(q.device)
    samples = -(-min(block, queries) // stride)
    named, options = constants(heads, kv_heads, block, per, stride, samples, size, q.dtype, shared, half)
    rows, columns = named["ROWS"], named["COLUMNS"]
    row_tiles = triton.cdiv(named["GROUP"] * named["SAMPLES"], rows)
    column_tiles = triton.cdiv(key_blocks * per, columns)
    programs = batch * kv_heads * n_q * row_tiles
    if splits is None:
        splits = max(1, min(2 * multiprocessors // programs, column_tiles // 2, MAX_SPLITS.value))
    chunk = 8 if programs * column_tiles >= 64 * multiprocessors else 1
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    lse = torch.empty(batch * kv_heads, n_q, row_tiles, splits, rows, **fp32)
    score = torch.empty(row_tiles, batch, kv_heads, n_q, key_blocks, **fp32)
    strides = (*q.stride()[:3], *centre.stride()[:3], *half_width.stride()[:3])
    sizes = (float(scale * LOG2_E), float(slack), queries, keys, first, row_tiles, splits)
    with torch.cuda.device_of(q):
        row_sums_kernel[(splits * row_tiles, n_q, batch * kv_heads)](
            q, centre, half_width, lse, *sizes, *strides, **named, **options
        )
        block_maxima_kernel[(triton.cdiv(column_tiles, chunk) * row_tiles, n_q, batch * kv_heads)](
            q, centre, half_width, lse, score, *sizes, key_blocks, *strides,
            CHUNK=chunk, **named, **options,
        )  # fmt: skip
    return score[0] if row_tiles == 1 else score.amax(0)
