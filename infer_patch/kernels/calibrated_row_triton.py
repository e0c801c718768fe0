"""One new row of each chosen head in Triton: its probabilities, column sums with it, and sinks lowered in it (ACT).

Four launches, each split over keys, and nothing waits for the device: scores; probabilities and column sums; the part
of the output that changes; the sum of those parts. Every program merges what the splits before it found in the same
order (no atomics: results repeat). With b the row's mass on listed keys, r all other mass and c = 1 + (1 - beta) b / r:

    o' = c o + (beta - c) O_S      or, where c would multiply the rounding of o as well,      o' = beta O_S + c O_rest

b and r are both summed, so that r keeps its digits in rows that read little but listed keys.
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
    rows_contiguous,
)

_TINY = tl.constexpr(1e-30)
SUMMED = 256  # keys whose sums are read together


@triton.jit(do_not_specialize=["keys", "splits"])
def row_scores_kernel(
    q_ptr, k_ptr, kv_ptr, score_ptr, lse_ptr, scale, keys, splits, q_batch, q_head, k_batch, k_head, k_row,
    HEADS: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Scores of one query a head, fp32 [b, h, S], and their LSE in each split, [b x h, splits], both in base 2.

    Grid (splits, b x h), of the next two kernels as well. `scale` carries log2 e.
    """
    split, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = pair // HEADS, pair % HEADS
    channel = tl.arange(0, PAD)
    q_at = q_ptr + batch * q_batch + head * q_head + channel
    q = tl.load(q_at, mask=channel < SIZE, other=0.0).to(tl.float32) * scale
    k_at = k_ptr + batch * k_batch + tl.load(kv_ptr + head) * k_head + channel
    tiles = tl.cdiv(keys, TILE)
    share = tl.cdiv(tiles, splits)
    top = tl.full([TILE], LOWEST, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for j in range(split * share, tl.minimum((split + 1) * share, tiles)):
        key = j * TILE + tl.arange(0, TILE)
        mask = (key < keys)[:, None] & (channel < SIZE)
        k = tl.load(k_at + key.to(tl.int64)[:, None] * k_row, mask=mask, other=0.0).to(tl.float32)
        scores = tl.sum(k * q, 1)
        tl.store(score_ptr + pair * keys + key, scores, mask=key < keys)
        scores = tl.where(key < keys, scores, float("-inf"))
        new = tl.maximum(top, scores)
        total = total * tl.exp2(top - new) + tl.exp2(scores - new)
        top = new
    most = tl.max(top, 0)
    sum_of_all = tl.sum(total * tl.exp2(top - most), 0)
    lse = tl.where(sum_of_all > 0, most + tl.log2(tl.maximum(sum_of_all, _TINY)), float("-inf"))
    tl.store(lse_ptr + pair * splits + split, lse)


@triton.jit
def _sinks(sums, key, keys, threshold, least, SPARE_TOKEN: tl.constexpr):
    """Which keys receive more than `threshold` on average from the rows that see them, `least` rows or more."""
    seen_by = tl.maximum(keys - key, 1)
    sinks = (tl.div_rn(sums, seen_by.to(tl.float32)) > threshold) & (seen_by >= least) & (key < keys)
    if SPARE_TOKEN:
        sinks = sinks & (key > 0)
    return sinks


@triton.jit(do_not_specialize=["keys", "splits", "least"])
def add_row_kernel(
    score_ptr, lses_ptr, old_ptr, sums_ptr, lse_ptr, first_ptr, found_ptr, threshold, keys, splits, least,
    TILE: tl.constexpr, SPARE_TOKEN: tl.constexpr,
):  # fmt: skip
    """Scores become probabilities where they lie; sums [b, h, S] are the old ones [b, h, S - 1] and this row.

    Of each split: its first sink, int32 [b x h, splits] (S: none), and fp32 [b x h, 3, splits] the mass on that one, on
    its other sinks, and on all other keys. lse [b, h] is natural. With SPARE_TOKEN, token 0 is no sink and no first
    one is told apart.
    """
    split, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    number = tl.arange(0, MAX_SPLITS)
    lses = tl.load(lses_ptr + pair * splits + number, mask=number < splits, other=float("-inf"))
    most = tl.max(lses, 0)
    lse = most + tl.log2(tl.sum(tl.exp2(lses - most), 0))
    tl.store(lse_ptr + pair, lse * LN_2, mask=split == 0)
    tiles = tl.cdiv(keys, TILE)
    share = tl.cdiv(tiles, splits)
    first, on_first, mass, rest = keys, 0.0, 0.0, 0.0
    for j in range(split * share, tl.minimum((split + 1) * share, tiles)):
        key = j * TILE + tl.arange(0, TILE)
        at = pair * keys + key
        scores = tl.load(score_ptr + at, mask=key < keys, other=float("-inf"))
        old = tl.load(old_ptr + pair * (keys - 1) + key, mask=key < keys - 1, other=0.0)
        p = tl.exp2(scores - lse)
        sums = old + p
        tl.store(score_ptr + at, p, mask=key < keys)
        tl.store(sums_ptr + at, sums, mask=key < keys)
        sinks = _sinks(sums, key, keys, threshold, least, SPARE_TOKEN)
        own = key == keys  # none
        if not SPARE_TOKEN:
            here = tl.min(tl.where(sinks, key, keys), 0)
            own = sinks & (key == here) & (first == keys)
            first = tl.minimum(first, here)
        on_first += tl.sum(tl.where(own, p, 0.0), 0)
        mass += tl.sum(tl.where(sinks & ~own, p, 0.0), 0)
        rest += tl.sum(tl.where(sinks, 0.0, p), 0)
    tl.store(first_ptr + pair * splits + split, first)
    found_at = found_ptr + pair * 3 * splits + split
    tl.store(found_at, on_first)
    tl.store(found_at + splits, mass)
    tl.store(found_at + 2 * splits, rest)


@triton.jit(do_not_specialize=["keys", "splits", "least"])
def lower_row_kernel(
    p_ptr, sums_ptr, first_ptr, found_ptr, v_ptr, kv_ptr, parts_ptr, factor_ptr, changed_ptr, threshold, beta, limit,
    keys, splits, least, v_batch, v_head, v_row,
    HEADS: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, SPARE_TOKEN: tl.constexpr,
):  # fmt: skip
    """Parts fp32 [b x h, splits, D_v], which with `factor` [b x h] times the plain output make the new one.

    Where c is above `limit`, factor is 0 and the parts hold everything. changed u8 [b x h].
    """
    split, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = pair // HEADS, pair % HEADS
    number = tl.arange(0, MAX_SPLITS)
    there = number < splits
    firsts = tl.load(first_ptr + pair * splits + number, mask=there, other=keys)
    found_at = found_ptr + pair * 3 * splits + number
    on_first = tl.load(found_at, mask=there, other=0.0)
    first = tl.min(firsts, 0)  # the sink that is left alone; the first ones of later splits are not
    mass = tl.load(found_at + splits, mask=there, other=0.0) + tl.where(firsts == first, 0.0, on_first)
    rest = tl.load(found_at + 2 * splits, mask=there, other=0.0) + tl.where(firsts == first, on_first, 0.0)
    b, r = tl.sum(mass, 0), tl.sum(rest, 0)
    changed = (b > 0) & (r > _TINY)
    c = 1 + (1 - beta) * b / tl.maximum(r, _TINY)
    afresh = c > limit
    factor = tl.where(afresh, 0.0, c)
    tl.store(factor_ptr + pair, factor, mask=split == 0)
    tl.store(changed_ptr + pair, changed.to(tl.uint8), mask=split == 0)

    channel = tl.arange(0, PAD)
    v_at = v_ptr + batch * v_batch + tl.load(kv_ptr + head) * v_head + channel
    tiles = tl.cdiv(keys, TILE)
    share = tl.cdiv(tiles, splits)
    part = tl.zeros([PAD], tl.float32)
    for j in range(split * share, tl.where(changed, tl.minimum((split + 1) * share, tiles), 0)):
        key = j * TILE + tl.arange(0, TILE)
        p = tl.load(p_ptr + pair * keys + key, mask=key < keys, other=0.0)
        sums = tl.load(sums_ptr + pair * keys + key, mask=key < keys, other=0.0)
        listed = _sinks(sums, key, keys, threshold, least, SPARE_TOKEN) & (key != first)
        weight = p * tl.where(listed, beta - factor, c - factor)
        read = weight != 0
        if tl.max(read.to(tl.int32), 0) > 0:
            mask = read[:, None] & (channel < SIZE)
            v = tl.load(v_at + key.to(tl.int64)[:, None] * v_row, mask=mask, other=0.0)
            part += tl.sum(weight[:, None] * v.to(tl.float32), 0)
    tl.store(parts_ptr + (pair * splits + split) * SIZE + channel, part, mask=channel < SIZE)


@triton.jit(do_not_specialize=["splits"])
def finish_row_kernel(
    o_ptr, parts_ptr, factor_ptr, changed_ptr, out_ptr, splits, o_batch, o_head, out_batch, out_head,
    HEADS: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """factor x the plain output + all parts; the output as it was where nothing changed. Grid (b x h)."""
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // HEADS, pair % HEADS
    number, channel = tl.arange(0, MAX_SPLITS), tl.arange(0, PAD)
    changed = tl.load(changed_ptr + pair).to(tl.int32) != 0
    part_at = parts_ptr + (pair * splits + number)[:, None] * SIZE + channel
    parts = tl.load(part_at, mask=(number < splits)[:, None] & (channel < SIZE), other=0.0)
    plain = tl.load(o_ptr + batch * o_batch + head * o_head + channel, mask=channel < SIZE, other=0.0)
    new = tl.load(factor_ptr + pair) * plain.to(tl.float32) + tl.sum(parts, 0)
    new = tl.where(changed, new.to(plain.dtype), plain)
    tl.store(out_ptr + batch * out_batch + head * out_head + channel, new, mask=channel < SIZE)


def sizes(heads: int, size: int) -> dict[str, int]:
    """Constants of the kernels that read keys or values."""
    wide = pad(size)
    return {"HEADS": heads, "TILE": min(8192 // wide, 128), "SIZE": size, "PAD": wide}


def running_row(
    output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sums: Tensor,
    kv_index: Tensor,
    threshold: float,
    spare_token: bool,
    min_queries: int,
    beta: float,
    scale: float,
    limit: float,
    splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `calibrated_row.running_row`.

    Parameters
    ----------
    limit : float
        c above which a row is computed afresh.
    splits : int, optional
        Parts of the keys, 1 to 32; default by the size of the GPU.
    """
    output, q, k, v = (rows_contiguous(x) for x in (output, q, k, v))
    (batch, heads, _, size), keys = q.shape, k.shape[2]
    pairs, of_keys, of_values = batch * heads, sizes(heads, size), sizes(heads, v.shape[-1])
    if splits is None:
        splits = max(1, min(2 * gpu(q.device)[0] // pairs, keys // (2 * of_keys["TILE"]), MAX_SPLITS.value))
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    p, new_sums = torch.empty(batch, heads, keys, **fp32), torch.empty(batch, heads, keys, **fp32)
    lses, found = torch.empty(pairs, splits, **fp32), torch.empty(pairs, 3, splits, **fp32)
    first = torch.empty(pairs, splits, dtype=torch.int32, device=q.device)
    parts, factor = torch.empty(pairs, splits, v.shape[-1], **fp32), torch.empty(pairs, **fp32)
    changed = torch.empty(batch, heads, 1, dtype=torch.uint8, device=q.device)
    lse, new = torch.empty(batch, heads, 1, **fp32), torch.empty_like(output)
    grid, rule = (splits, pairs), (keys, splits, int(min_queries))
    with torch.cuda.device_of(q):
        row_scores_kernel[grid](
            q, k, kv_index, p, lses, float(scale * LOG2_E), keys, splits, *q.stride()[:2], *k.stride()[:3],
            **of_keys, **OPTIONS,
        )  # fmt: skip
        add_row_kernel[grid](
            p, lses, sums.contiguous(), new_sums, lse, first, found, float(threshold), *rule,
            TILE=SUMMED, SPARE_TOKEN=spare_token, **OPTIONS,
        )  # fmt: skip
        lower_row_kernel[grid](
            p, new_sums, first, found, v, kv_index, parts, factor, changed, float(threshold), float(beta), float(limit),
            *rule, *v.stride()[:3], **of_values, SPARE_TOKEN=spare_token, **OPTIONS,
        )  # fmt: skip
        named = {name: of_values[name] for name in ("HEADS", "SIZE", "PAD")}
        finish_row_kernel[(pairs,)](
            output, parts, factor, changed, new, splits, *output.stride()[:2], *new.stride()[:2], **named, **OPTIONS
        )
    return new, changed.view(torch.bool), new_sums, lse
