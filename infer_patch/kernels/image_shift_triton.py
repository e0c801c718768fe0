"""VAR's correction in Triton: rows that look at the picture, with attention moved from sinks to other visual tokens.

The rows' log-sum-exp comes first; then one kernel reads the listed keys (sinks and visual tokens) alone. It sums each
row's mass on them, applies the row rule, and only in tiles with a chosen row walks the list once more, with the values.
Two short walks hold one accumulator where one walk would hold two, and most tiles end after the first.

    o'_i = o_i - move O_S,i + move (m_S,i / m_N,i) O_N,i
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from infer_patch.kernels import calibrated_triton, probe_scores_triton
from infer_patch.kernels.row_attention import key_heads, key_lists
from infer_patch.kernels.triton_common import (
    LN_2,
    LOG2_E,
    OPTIONS,
    pad,
    precision,
    rows_contiguous,
)

if TYPE_CHECKING:
    from infer_patch.kernels.image_shift import ImageRule

_EPSILON = tl.constexpr(1e-6)  # as in calibrated_attention
_TINY = tl.constexpr(1e-30)
_FEW_ROWS = 64  # of a key head, heads x queries: then the keys are split over programs for the log-sum-exp


@triton.jit
def _listed(
    q, position, lse, idx_ptr, kinds_ptr, k_at, k_row, at, count, scale,
    SIZE: tl.constexpr, PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(p [ROWS, TILE], which are seen, keys [TILE], is a sink, is a visual token) of list entries `at` [TILE]."""
    key = tl.load(idx_ptr + at, mask=at < count, other=-1)
    kind = tl.load(kinds_ptr + key, mask=key >= 0, other=0).to(tl.int32)
    k_mask = (key >= 0)[None, :] & (tl.arange(0, PAD) < SIZE)[:, None]
    k = tl.load(k_at + key[None, :] * k_row, mask=k_mask, other=0.0)
    scores = tl.dot(q, k, input_precision=PRECISION) * scale - lse[:, None]
    seen = (key >= 0)[None, :] & (key[None, :] <= position[:, None])
    return tl.exp2(tl.where(seen, scores, float("-inf"))), seen, key, (kind & 1) != 0, (kind & 2) != 0


@triton.jit(do_not_specialize=["queries", "keys"])
def shift_to_images_kernel(
    o_ptr, q_ptr, k_ptr, v_ptr, idx_ptr, count_ptr, kinds_ptr, asked_ptr, lse_ptr, out_ptr, chosen_ptr,
    scale, portion, least_mass, move, queries, keys,
    o_batch, o_head, o_row, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    out_batch, out_head, out_row,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr,
    SIZE_V: tl.constexpr, PAD: tl.constexpr, PAD_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS of the GROUP x T rows of a key head; grid (row tiles, b x KV_HEADS). `scale` carries log2 e.

    Lists int64 [b, S] name `count` [b] keys; kinds u8 [b, S] are 1 for sinks + 2 for visual tokens; asked u8 [b, T];
    lse natural, chosen u8: [b, H, T].
    """
    pair = tl.program_id(1)
    batch, head = (pair // KV_HEADS).to(tl.int64), (pair % KV_HEADS).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < GROUP * queries
    heads, query = head * GROUP + row // queries, (row % queries).to(tl.int64)
    position = query + keys - queries
    channel = tl.arange(0, PAD)
    channel_v = tl.arange(0, PAD_V)
    q_at = q_ptr + batch * q_batch + (heads * q_head + query * q_row)[:, None]
    q = tl.load(q_at + channel, mask=real[:, None] & (channel < SIZE), other=0.0)
    row_at = (batch * KV_HEADS * GROUP + heads) * queries + query
    lse = tl.load(lse_ptr + row_at, mask=real, other=0.0) / LN_2
    asked = tl.load(asked_ptr + batch * queries + query, mask=real, other=0).to(tl.int32)
    k_at = k_ptr + batch * k_batch + head * k_head + channel[:, None]
    v_at = v_ptr + batch * v_batch + head * v_head + channel_v
    idx_ptr += batch * keys
    kinds_ptr += batch * keys
    count = tl.where(tl.max(asked, 0) > 0, tl.load(count_ptr + batch), 0).to(tl.int32)

    sinks = tl.zeros([ROWS], tl.float32)  # mass on all of them
    visual_sinks = tl.zeros([ROWS], tl.float32)
    others = tl.zeros([ROWS], tl.float32)  # mass on visual tokens that are no sinks
    tokens = tl.zeros([ROWS], tl.float32)  # visual tokens that are seen
    sink_tokens = tl.zeros([ROWS], tl.float32)
    for start in range(0, count, TILE):
        p, seen, _key, is_sink, is_visual = _listed(
            q, position, lse, idx_ptr, kinds_ptr, k_at, k_row, start + tl.arange(0, TILE), count, scale,
            SIZE, PAD, PRECISION,
        )  # fmt: skip
        sinks += tl.sum(tl.where(is_sink[None, :], p, 0.0), 1)
        visual_sinks += tl.sum(tl.where((is_sink & is_visual)[None, :], p, 0.0), 1)
        others += tl.sum(tl.where((is_visual & ~is_sink)[None, :], p, 0.0), 1)
        tokens += tl.sum((seen & is_visual[None, :]).to(tl.float32), 1)
        sink_tokens += tl.sum((seen & (is_sink & is_visual)[None, :]).to(tl.float32), 1)
    image = others + visual_sinks
    share = visual_sinks / tl.maximum(image + _EPSILON * tokens, _TINY)
    chosen = (asked != 0) & (sink_tokens > 0) & (share <= portion) & (image >= least_mass) & (others > _EPSILON)

    gain = tl.where(chosen, move * sinks / tl.maximum(others, _TINY), 0.0)
    loss = tl.where(chosen, move, 0.0)
    part = tl.zeros([ROWS, PAD_V], tl.float32)
    for start in range(0, tl.where(tl.max(chosen.to(tl.int32), 0) > 0, count, 0), TILE):
        p, _seen, key, is_sink, is_visual = _listed(
            q, position, lse, idx_ptr, kinds_ptr, k_at, k_row, start + tl.arange(0, TILE), count, scale,
            SIZE, PAD, PRECISION,
        )  # fmt: skip
        moved = p * tl.where(is_sink[None, :], -loss[:, None], tl.where(is_visual[None, :], gain[:, None], 0.0))
        v_mask = (key >= 0)[:, None] & (channel_v < SIZE_V)
        v = tl.load(v_at + key[:, None] * v_row, mask=v_mask, other=0.0)
        part = tl.dot(moved.to(v.dtype), v, part, input_precision=PRECISION)
    o_mask = real[:, None] & (channel_v < SIZE_V)
    o_at = o_ptr + batch * o_batch + (heads * o_head + query * o_row)[:, None]
    plain = tl.load(o_at + channel_v, mask=o_mask, other=0.0)
    new = tl.where(chosen[:, None], (plain.to(tl.float32) + part).to(plain.dtype), plain)
    out_at = out_ptr + batch * out_batch + (heads * out_head + query * out_row)[:, None]
    tl.store(out_at + channel_v, new, mask=o_mask)
    tl.store(chosen_ptr + row_at, chosen.to(tl.uint8), mask=real)


def constants(
    heads: int, kv_heads: int, queries: int, size: int, size_v: int, dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, int]]:
    """(constants, launch options) of the kernel for these sizes."""
    wide, wide_v, group = pad(size), pad(size_v), heads // kv_heads
    large, heavy = max(wide, wide_v) > 128 or dtype == torch.float32, dtype == torch.float32 and max(wide, wide_v) > 64
    rows = min(pad(group * queries), 16 if heavy else 32 if large else 64)  # other tiles spill: kernel_resources.py
    named: dict[str, Any] = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "ROWS": rows,
        "TILE": 16 if large else 32 if rows == 64 else 64,
        "SIZE": size,
        "SIZE_V": size_v,
        "PAD": wide,
        "PAD_V": wide_v,
        "PRECISION": precision(dtype),
    }
    return named, {"num_warps": 8 if heavy else 4, "num_stages": 1 if heavy else 2, **OPTIONS}


def shift_to_images(
    output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    visual: Tensor,
    asked: Tensor,
    rule: ImageRule,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As `image_shift.shift_to_images`. Waits for the device only where there are several rows."""
    output, q, k, v = (rows_contiguous(x) for x in (output, q, k, v))
    (batch, heads, count, size), (kv_heads, keys) = q.shape, k.shape[1:3]
    chosen, first = torch.zeros(batch, heads, count, dtype=torch.uint8, device=q.device), 0
    if count > 1:
        rows = (asked & (visual & sinks).any(1, keepdim=True)).any(0)
        first = int(torch.where(rows, torch.arange(count, device=q.device), count).min())
        if first == count:
            return output, chosen.view(torch.bool)
    new = torch.empty_like(output)
    new[:, :, :first] = output[:, :, :first]
    late, q, out = (x[:, :, first:] for x in (output, q, new))
    rest, listed = count - first, visual | sinks
    kinds = sinks.to(torch.uint8) + 2 * visual.to(torch.uint8)
    named, options = constants(heads, kv_heads, rest, size, v.shape[-1], q.dtype)
    taken = torch.empty(batch, heads, rest, dtype=torch.uint8, device=q.device)
    strides = [stride for x in (late, q, k, v, out) for stride in x.stride()[:3]]
    bounds = float(rule.sink_portion), float(rule.least_mass), float(rule.move)
    with torch.cuda.device_of(q):
        shift_to_images_kernel[(triton.cdiv(heads // kv_heads * rest, named["ROWS"]), batch * kv_heads)](
            late, q, k, v, key_lists(listed, keys), listed.sum(1), kinds,
            asked[:, first:].to(torch.uint8).contiguous(), _row_lse(q, k, scale), out, taken,
            float(scale * LOG2_E), *bounds, rest, keys, *strides, **named, **options,
        )  # fmt: skip
    chosen[:, :, first:] = taken
    return new, chosen.view(torch.bool)


def _row_lse(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Natural log-sum-exp of rows q [b, H, r, D], those of the last r keys: fp32 [b, H, r]."""
    heads, rows, kv_heads, keys = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    if heads // kv_heads * rows > _FEW_ROWS:
        return calibrated_triton.lse_and_column_sums(q, k, key_heads(heads, kv_heads), scale, sums=False)[0]
    # two tensors: a slice of one would be aligned for some lengths only, and compile for the others anew
    at, positions = (torch.arange(first, keys, device=q.device)[None] for first in (keys - rows, 0))
    return probe_scores_triton.row_log_sums(q, k, scale, at, positions)
