"""Attention of few queries to packed groups and full-precision rows in Triton, with no dequantised copy in memory.

One launch for each set of keys (the groups of one height and precision; the rows in full precision) attends to it in
splits, and one launch merges all parts by their log-sum-exp. All query heads of a key head, and all queries, are rows
of a tile, so codes are read once for the group. The arithmetic is that of `packed_attention`: steps and minima are
folded into queries and probabilities, codes go into matrix products as they are.

Codes come out of their bytes next to each other: lane l of a row holds field l % f of byte l // f, that is channel
l % f * D / f + l // f. Queries, parameters and output are read and written in that order, so no lane ever moves;
values may have other fields than keys, and then an order of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from infer_patch.kernels.block_sparse_decode_triton import number_of_splits
from infer_patch.kernels.kv_pack import PLAIN, Groups
from infer_patch.kernels.triton_common import (
    LOG2_E,
    LOWEST,
    OPTIONS,
    gpu,
    pad,
    precision,
    rows_contiguous,
    softmax_step,
    stages,
)

_LEAST = tl.constexpr(1e-30)


@triton.jit
def _codes(packed, BITS: tl.constexpr, WIDE: tl.constexpr):
    """Bytes [N, W] -> codes [N, 8 W / BITS] as fp32 if WIDE, else fp16; those of one byte stand next to each other."""
    codes = packed
    if BITS == 4:
        codes = tl.join(packed & 15, packed >> 4)
    if BITS == 2:
        codes = tl.join(tl.join(packed & 3, (packed >> 4) & 3), tl.join((packed >> 2) & 3, packed >> 6))
    codes = codes.reshape(packed.shape[0], packed.shape[1] * (8 // BITS))
    if WIDE:
        codes = codes.to(tl.float32)
    if not WIDE:  # 0x6400 is 1024 in fp16, and its last ten bits are units: cheaper than converting integers
        codes = (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
    return codes


@triton.jit
def _times_codes(x, codes, PRECISION: tl.constexpr):
    """x [R, N] (fp32) times codes [N, M]; where those are fp16, rows of x are scaled to at most 1, to stay in range."""
    if codes.dtype == tl.float32:
        product = tl.dot(x, codes, input_precision=PRECISION)
    else:
        peak = tl.maximum(tl.max(tl.abs(x), 1), _LEAST)[:, None]
        product = tl.dot((x / peak).to(codes.dtype), codes) * peak
    return product


@triton.jit(do_not_specialize=["queries", "groups", "size", "part_rows", "batch_rows", "head_rows", "visible_batch",
                               "visible_row"])  # fmt: skip
def packed_decode_kernel(
    q_ptr, k_ptr, v_ptr, k_step_ptr, k_low_ptr, v_step_ptr, v_low_ptr, channel_ptr, valid_ptr, visible_ptr, out_ptr,
    lse_ptr, scale, queries, groups, size, part_rows, q_batch, q_head, q_row, batch_rows, head_rows, visible_batch,
    visible_row,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, VALID: tl.constexpr, VISIBLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Parts fp32 [splits, B, H, T, D] and lse (base 2) [splits, B, H, T]; grid (splits, row tiles, B x KV_HEADS).

    `groups` groups of `size` rows of SIZE numbers, in fewer bytes below 16 bits; rows lie behind one another, those of
    a head from batch x batch_rows + head x head_rows on. `scale` carries log2 e. A split without a visible key writes
    -inf.
    """
    FIELDS: tl.constexpr = 8 // BITS if BITS < 8 else 1
    WIDTH: tl.constexpr = SIZE // FIELDS
    PAD_W: tl.constexpr = PAD // FIELDS
    V_FIELDS: tl.constexpr = 8 // VALUE_BITS if VALUE_BITS < 8 else 1
    V_WIDTH: tl.constexpr = SIZE // V_FIELDS
    V_PAD_W: tl.constexpr = PAD // V_FIELDS
    split, pair = tl.program_id(0), tl.program_id(2)
    batch, head = (pair // KV_HEADS).to(tl.int64), pair % KV_HEADS
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real = row < GROUP * queries
    heads, query = head * GROUP + row // queries, row % queries
    lane = tl.arange(0, PAD)
    there = lane // FIELDS < WIDTH
    channel = lane % FIELDS * WIDTH + lane // FIELDS
    byte = tl.arange(0, PAD_W)
    v_there, v_channel, v_byte = there, channel, byte
    if VALUE_BITS != BITS:
        v_there = lane // V_FIELDS < V_WIDTH
        v_channel = lane % V_FIELDS * V_WIDTH + lane // V_FIELDS
        v_byte = tl.arange(0, V_PAD_W)

    q_at = batch * q_batch + heads.to(tl.int64) * q_head + query * q_row
    q = tl.load(q_ptr + q_at[:, None] + channel, mask=real[:, None] & there, other=0.0)
    if BITS < 16:
        q = q.to(tl.float32) * scale
    first_row = batch * batch_rows + head.to(tl.int64) * head_rows
    first_group = first_row // size
    per = tl.cdiv(size, TILE)
    share = tl.cdiv(groups * per, tl.num_programs(0))
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PAD], tl.float32)
    for j in range(split * share, tl.minimum((split + 1) * share, groups * per)):
        group = first_group + j // per
        place = j % per * TILE + tl.arange(0, TILE)
        inside = place < size
        rows = first_row + (j // per).to(tl.int64) * size + place
        at = rows[:, None] * WIDTH + byte
        mask = inside[:, None] & (byte < WIDTH)
        k = tl.load(k_ptr + at, mask=mask, other=0)
        if VALUE_BITS != BITS:
            at = rows[:, None] * V_WIDTH + v_byte
            mask = inside[:, None] & (v_byte < V_WIDTH)
        v = tl.load(v_ptr + at, mask=mask, other=0)
        if BITS < 16:
            k_step = tl.load(k_step_ptr + group * SIZE + channel, mask=there, other=0.0).to(tl.float32)
            k_low = tl.load(k_low_ptr + group * SIZE + channel, mask=there, other=0.0).to(tl.float32)
            scores = _times_codes(q * k_step, tl.trans(_codes(k, BITS, PRECISION == "tf32x3")), PRECISION)
            scores += tl.sum(q * k_low, 1)[:, None]
        else:
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        seen = inside
        if VALID:
            seen = place < tl.load(valid_ptr + group)
        if VISIBLE:
            seen_at = batch * visible_batch + query.to(tl.int64)[:, None] * visible_row + place
            sees = tl.load(visible_ptr + seen_at, mask=real[:, None] & inside, other=0) != 0
            scores = tl.where(sees, scores, float("-inf"))
        scores = tl.where(seen, scores, float("-inf"))
        p, top, total, shrink = softmax_step(scores, top, total)
        if BITS < 16:
            v_step = tl.load(v_step_ptr + rows, mask=inside, other=0.0).to(tl.float32)
            v_low = tl.load(v_low_ptr + rows, mask=inside, other=0.0).to(tl.float32)
            factor = tl.load(channel_ptr + group * SIZE + v_channel, mask=v_there, other=0.0).to(tl.float32)
            product = _times_codes(p * v_step, _codes(v, VALUE_BITS, PRECISION == "tf32x3"), PRECISION)
            acc = acc * shrink[:, None] + (product + tl.sum(p * v_low, 1)[:, None]) * factor
        else:
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)

    saw = total > 0
    acc = acc / tl.where(saw, total, 1.0)[:, None]
    out_row = split.to(tl.int64) * part_rows + (batch * KV_HEADS * GROUP + heads) * queries + query
    tl.store(out_ptr + out_row[:, None] * SIZE + v_channel, acc, mask=real[:, None] & v_there)
    tl.store(lse_ptr + out_row, tl.where(saw, top + tl.log2(total), float("-inf")), mask=real)


@triton.jit(do_not_specialize=["queries", "rows", "parts"])
def packed_merge_kernel(
    parts_ptr, lses_ptr, out_ptr, queries, rows, parts, out_batch, out_head, out_row,
    HEADS: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out = sum_s parts_s 2^lse_s / sum_s 2^lse_s for one of the B x H x T rows, PARTS parts at a time.

    Parts [parts, rows, SIZE] and lses [parts, rows] are fp32. A row that no part saw a key for is 0.
    """
    row = tl.program_id(0)
    channel = tl.arange(0, PAD)
    top = tl.full([1], LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([PAD], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        lses = tl.load(lses_ptr + part.to(tl.int64) * rows + row, mask=part < parts, other=float("-inf"))
        new = tl.maximum(top, tl.max(lses, 0))
        weight = tl.exp2(lses - new)
        shrink = tl.exp2(top - new)
        at = (part.to(tl.int64) * rows + row)[:, None] * SIZE + channel
        some = tl.load(parts_ptr + at, mask=(part < parts)[:, None] & (channel < SIZE), other=0.0)
        acc = acc * shrink + tl.sum(some * weight[:, None], 0)
        top, total = new, total * shrink + tl.sum(weight, 0)
    out = acc / tl.where(total > 0, total, 1.0)
    batch = (row // queries // HEADS).to(tl.int64)
    at = batch * out_batch + row // queries % HEADS * out_head + row % queries * out_row
    tl.store(out_ptr + at + channel, out.to(out_ptr.dtype.element_ty), mask=channel < SIZE)


_ANY_SIZE = 64  # the widest tile there is


def constants(
    kv_heads: int,
    group: int,
    queries: int,
    size: int,
    bits: int,
    dim: int,
    dtype: torch.dtype,
    shared: int,
    value_bits: int | None = None,
) -> tuple[dict[str, Any], dict[str, int]]:
    """(constants of `packed_decode_kernel` but VALID and VISIBLE, launch options) for groups of `size` rows."""
    value_bits = bits if value_bits is None else value_bits
    fields = [8 // b if b < 8 else 1 for b in (bits, value_bits)]
    wide = max(f * pad(dim // f, max(1, 16 // f)) for f in fields)
    # these spill no registers (benchmarks/kernel_resources.py); 64 rows would, and take minutes to compile
    rows = min(pad(group * queries), 32 if wide <= 128 and dtype != torch.float32 else 16)
    tile = min(pad(size), 64 if wide * dtype.itemsize <= 256 else 32)
    named: dict[str, Any] = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "ROWS": rows,
        "TILE": tile,
        "BITS": bits,
        "VALUE_BITS": value_bits,
        "SIZE": dim,
        "PAD": wide,
        "PRECISION": precision(dtype),
    }
    codes = tile * wide * dtype.itemsize  # what one operand of a product takes
    buffers = tile * (sum(wide // f for f in fields) if bits < PLAIN else 2 * wide * dtype.itemsize)
    depth = stages(shared, rows * wide * dtype.itemsize + (codes if bits < PLAIN else 0), buffers)
    warps = 8 if rows > 16 or (bits < 16 and wide * dtype.itemsize > 256) else 4
    return named, {"num_warps": warps, "num_stages": depth, **OPTIONS}


def attention(
    q: Tensor,
    packed: Sequence[Groups],
    keys: Tensor,
    values: Tensor,
    scale: float,
    visible: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """`packed_attention`: q [B, H, T, D], groups and rows keys, values [B, H_kv, r, D] -> [B, H, T, D].

    Parameters
    ----------
    splits : int, optional
        Parts of each set of keys; default by the size of the GPU.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, group = keys.shape[1], heads // keys.shape[1]
    q = rows_contiguous(q)
    sets: list[tuple[Groups, int, Tensor | None]] = [(x, x.size, None) for x in packed if x.key_codes.shape[2]]
    if keys.shape[2]:  # one group; it grows by a row at each step, and one binary shall serve them all
        sets.append((Groups(PLAIN, keys[:, :, None], values[:, :, None]), _ANY_SIZE, visible))
    multiprocessors, shared = gpu(q.device)
    launches = []
    for groups, height, seen in sets:
        named, options = constants(
            kv_heads, group, queries, height, groups.bits, dim, q.dtype, shared, groups.value_bits
        )
        tiles = triton.cdiv(group * queries, named["ROWS"])
        items = groups.key_codes.shape[2] * triton.cdiv(groups.size, named["TILE"])
        many = splits or number_of_splits(batch * kv_heads * tiles, items, multiprocessors)
        launches.append((groups, seen, named, options, tiles, many))
    parts, rows = sum(launch[-1] for launch in launches), batch * heads * queries
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    outputs, lses = torch.empty(parts, rows, dim, **fp32), torch.empty(parts, rows, **fp32)
    out = torch.empty(batch, queries, heads, dim, dtype=q.dtype, device=q.device).transpose(1, 2)
    start = 0
    with torch.cuda.device_of(q):
        for groups, seen, named, options, tiles, many in launches:
            tensors, batch_rows, head_rows = _aligned(groups)
            mask = q if seen is None else rows_contiguous(seen.expand(batch, queries, -1)).view(torch.uint8)
            packed_decode_kernel[(many, tiles, batch * kv_heads)](
                q, *(q if x is None else x for x in tensors), mask, outputs[start:], lses[start:],
                float(scale * LOG2_E), queries, groups.key_codes.shape[2], groups.size, rows, *q.stride()[:3],
                batch_rows, head_rows, *mask.stride()[:2],
                VALID=groups.valid is not None, VISIBLE=seen is not None, **named, **options,
            )  # fmt: skip
            start += many
        packed_merge_kernel[(rows,)](
            outputs, lses, out, queries, rows, parts, *out.stride()[:3],
            HEADS=heads, SIZE=dim, PAD=pad(dim), PARTS=16, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return out


def _aligned(groups: Groups) -> tuple[list[Tensor | None], int, int]:
    """(codes, parameters and `valid`, rows from a sample to the next, from a head to the next).

    Slabs have free places behind each head, as many in all of their tensors; anything laid out otherwise is copied.
    """
    names = ("key_codes", "value_codes", "key_step", "key_low", "value_step", "value_low", "channel", "valid")
    found = [getattr(groups, name) for name in names]
    size = groups.size

    def layout(x: Tensor) -> tuple[int, int] | None:
        inner = x[0, 0]
        unit = x.shape[4] if x.dim() == 5 else inner[0].numel()  # numbers of a row, or of a group
        if not inner.is_contiguous() or x.stride(0) % unit or x.stride(1) % unit:
            return None
        share = 1 if x.dim() == 5 else size
        return x.stride(0) // unit * share, x.stride(1) // unit * share

    layouts = {layout(x) for x in found if x is not None}
    if len(layouts) > 1 or None in layouts:
        found = [x if x is None else x.contiguous() for x in found]
    batch_rows, head_rows = layout(found[0]) or (0, 0)
    return found, batch_rows, head_rows
