"""Quantise and pack in Triton: one program for each group and key head, tokens gathered by index as they are read.

No permuted copy of keys or values is made. Codes and parameters are those of the reference, bit for bit: divisions and
roots are rounded as IEEE says, minima down and steps up to fp16, halves of a code to the even one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from infer_patch.kernels.kv_pack import Groups
from infer_patch.kernels.triton_common import OPTIONS, pad, rows_contiguous

_LARGEST = tl.constexpr(65504.0)  # of fp16
_LEAST_FACTOR = tl.constexpr(2.0**-14)
_ROUND = tl.constexpr(1.5 * 2**23)  # added and taken away again: fp32 rounds to whole numbers, halves to even


@triton.jit
def _clipped(x):
    return tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST)


@triton.jit
def _round_down(x):
    """The largest fp16 number that is not above x (fp32), within the range of fp16."""
    x = _clipped(x)
    nearest = x.to(tl.float16)
    bits = nearest.to(tl.int16, bitcast=True)
    # one number down: a smaller magnitude above zero, a larger one below, and from zero to the first negative number
    below = tl.where(nearest > 0, bits - 1, tl.where(nearest < 0, bits + 1, -32767)).to(tl.int16)
    bits = tl.where(nearest.to(tl.float32) > x, below, bits)
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def _parameters(low, high, LEVELS: tl.constexpr):
    """(step, low) in fp16 for numbers from `low` to `high` (fp32)."""
    low = _round_down(low)
    step = -_round_down(-tl.div_rn(high - low.to(tl.float32), LEVELS + tl.zeros_like(high)))
    return tl.where(step > 0, step, 1.0).to(tl.float16), low


@triton.jit
def _code(x, step, low, LEVELS: tl.constexpr):
    """Codes of x as int32."""
    code = (tl.div_rn(x - low, step + tl.zeros_like(x)) + _ROUND) - _ROUND
    return tl.minimum(tl.maximum(code, 0.0), LEVELS).to(tl.int32)


@triton.jit
def _factors(v):
    """c = sqrt(max |v|) of each channel of v [N, W] in fp16, 1 where that is 0."""
    most = tl.max(tl.abs(v), 0)
    root = tl.minimum(tl.maximum(tl.sqrt_rn(most), _LEAST_FACTOR), _LARGEST)
    return tl.where(most > 0, root, 1.0).to(tl.float16)


@triton.jit
def _scaled(v, factors):
    return _clipped(tl.div_rn(v, factors.to(tl.float32)[None, :] + tl.zeros_like(v)))


@triton.jit(do_not_specialize=["groups", "size", "rows_batch", "rows_head", "rows_group"])
def quantise_kernel(
    k_ptr, v_ptr, rows_ptr, k_codes_ptr, v_codes_ptr, k_step_ptr, k_low_ptr, v_step_ptr, v_low_ptr, channel_ptr,
    groups, size, k_batch, k_head, k_row, v_batch, v_head, v_row, rows_batch, rows_head, rows_group,
    HEADS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    PAD: tl.constexpr,
):  # fmt: skip
    """All of one group: codes [B, HEADS, groups, size, bytes], parameters by channel or row; grid (groups, B x HEADS).

    PAD bytes of each row at a time, and one field of them after the other: with f fields to a byte, byte i holds
    channels i, i + DIM / f, ...
    """
    FIELDS: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = DIM // FIELDS
    PIECES: tl.constexpr = (WIDTH + PAD - 1) // PAD
    LEVELS: tl.constexpr = 2**BITS - 1
    V_FIELDS: tl.constexpr = 8 // VALUE_BITS
    V_WIDTH: tl.constexpr = DIM // V_FIELDS
    V_PIECES: tl.constexpr = (V_WIDTH + PAD - 1) // PAD
    V_LEVELS: tl.constexpr = 2**VALUE_BITS - 1
    group, pair = tl.program_id(0), tl.program_id(1)
    batch, head = (pair // HEADS).to(tl.int64), (pair % HEADS).to(tl.int64)
    row = tl.arange(0, ROWS)
    taken = batch * rows_batch + head * rows_head + group.to(tl.int64) * rows_group + tl.minimum(row, size - 1)
    source = tl.load(rows_ptr + taken).to(tl.int64)  # past the last row: the last row again
    k_at = (k_ptr + batch * k_batch + head * k_head + source * k_row)[:, None]
    v_at = (v_ptr + batch * v_batch + head * v_head + source * v_row)[:, None]
    place = pair.to(tl.int64) * groups + group
    code_row = (place * size + row)[:, None]
    of_channel = place * DIM

    for piece in range(PIECES):
        byte = piece * PAD + tl.arange(0, PAD)
        there = byte < WIDTH
        packed = tl.zeros([ROWS, PAD], tl.int32)
        for j in range(FIELDS):
            channel = j * WIDTH + byte
            k = _clipped(tl.load(k_at + channel, mask=there, other=0.0).to(tl.float32))
            step, low = _parameters(tl.min(k, 0), tl.max(k, 0), LEVELS)
            packed |= _code(k, step.to(tl.float32)[None, :], low.to(tl.float32)[None, :], LEVELS) << (BITS * j)
            tl.store(k_step_ptr + of_channel + channel, step, mask=there)
            tl.store(k_low_ptr + of_channel + channel, low, mask=there)
        tl.store(k_codes_ptr + code_row * WIDTH + byte, packed.to(tl.uint8), mask=(row < size)[:, None] & there)

    least = tl.full([ROWS], float("inf"), tl.float32)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    for j in range(V_PIECES * V_FIELDS):
        byte = j // V_FIELDS * PAD + tl.arange(0, PAD)
        there = byte < V_WIDTH
        channel = j % V_FIELDS * V_WIDTH + byte
        v = tl.load(v_at + channel, mask=there, other=0.0).to(tl.float32)
        factor = _factors(v)
        tl.store(channel_ptr + of_channel + channel, factor, mask=there)
        x = _scaled(v, factor)
        least = tl.minimum(least, tl.min(tl.where(there, x, float("inf")), 1))
        most = tl.maximum(most, tl.max(tl.where(there, x, float("-inf")), 1))
    step, low = _parameters(least, most, V_LEVELS)
    tl.store(v_step_ptr + place * size + row, step, mask=row < size)
    tl.store(v_low_ptr + place * size + row, low, mask=row < size)
    for piece in range(V_PIECES):
        byte = piece * PAD + tl.arange(0, PAD)
        there = byte < V_WIDTH
        packed = tl.zeros([ROWS, PAD], tl.int32)
        for j in range(V_FIELDS):
            v = tl.load(v_at + j * V_WIDTH + byte, mask=there, other=0.0).to(tl.float32)
            x = _scaled(v, _factors(v))
            packed |= _code(x, step.to(tl.float32)[:, None], low.to(tl.float32)[:, None], V_LEVELS) << (VALUE_BITS * j)
        tl.store(v_codes_ptr + code_row * V_WIDTH + byte, packed.to(tl.uint8), mask=(row < size)[:, None] & there)


def constants(
    heads: int, size: int, bits: int, dim: int, value_bits: int | None = None
) -> tuple[dict[str, Any], dict[str, int]]:
    """(constants of `quantise_kernel`, launch options) for groups of `size` rows of `dim` numbers."""
    value_bits = bits if value_bits is None else value_bits
    width = dim * min(bits, value_bits) // 8
    named = {"HEADS": heads, "ROWS": pad(size), "DIM": dim, "BITS": bits, "VALUE_BITS": value_bits}
    named["PAD"] = min(pad(width), 32)
    warps = max(4, named["ROWS"] // 16)  # with fewer, some registers spill
    return named, {"num_warps": warps, "num_stages": 1, **OPTIONS}


def quantise_and_pack(keys: Tensor, values: Tensor, rows: Tensor, bits: int, value_bits: int | None = None) -> Groups:
    """The groups of kv_pack.quantise_and_pack, in 8, 4 or 2 bits: keys and values [B, H_kv, S, D]."""
    batch, heads, _, dim = keys.shape
    n, size = rows.shape[2:]
    keys, values = rows_contiguous(keys), rows_contiguous(values)
    rows = rows_contiguous(rows).expand(batch, heads, -1, -1)

    def empty(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return torch.empty(batch, heads, n, *shape, dtype=dtype, device=keys.device)

    widths = bits, bits if value_bits is None else value_bits
    key_codes, value_codes = (empty(size, dim * width // 8, dtype=torch.uint8) for width in widths)
    parameters = empty(dim), empty(dim), empty(size), empty(size), empty(dim)
    named, options = constants(heads, size, bits, dim, value_bits)
    with torch.cuda.device_of(keys):
        quantise_kernel[(n, batch * heads)](
            keys, values, rows, key_codes, value_codes, *parameters, n, size, *keys.stride()[:3], *values.stride()[:3],
            *rows.stride()[:3], **named, **options,
        )  # fmt: skip
    return Groups(bits, key_codes, value_codes, None, *parameters, value_bits)
