"""Keys and values in 8, 4 or 2 bits: quantise and pack with gather, unpack, dequantise.

Tokens come in groups. A key has a step and a minimum per channel of its group: channel outliers dominate keys, while
neighbouring tokens look alike. A value is divided by its channel's factor c = sqrt(max |v|) over the group and then has
a step and a minimum per token. All parameters are fp16: minima rounded down and steps rounded up, and codes taken from
the rounded parameters, so that every element is within half a stored step:
    |k' - k| <= key_step / 2        |v' - v| <= channel * value_step / 2
Keys beyond the range of fp16 (65504) are clipped to it. Bytes are planar: with f = 8 / bits, byte i of a row
of D holds the channels i, i + D / f, i + 2 D / f, ..., the first in its lowest bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from infer_patch.kernels.dispatch import choose

BITS = (2, 4, 8)
PLAIN = 16  # "bits" of groups that are kept as they are, in the dtype of the model
_LARGEST = 65504.0  # of fp16
_LEAST_FACTOR = 2.0**-14  # the smallest normal fp16 number
_MOST_ROWS = 256  # of a group that the Triton kernel takes
_ELEMENTS_PER_CALL = 1 << 20


@dataclass(frozen=True)
class Groups:
    """n groups of `a` tokens each, keys and values, for B samples and H_kv heads.

    Parameters
    ----------
    bits, value_bits : int
        Of keys and of values (None: those of keys): 8, 4, 2; or 16 for both: codes are the numbers themselves, and the
        parameters are None.
    key_codes, value_codes : uint8 Tensor [B, H_kv, n, a, D bits / 8], or [B, H_kv, n, a, D] of the model's dtype
    key_step, key_low : fp16 Tensor [B, H_kv, n, D]
    value_step, value_low : fp16 Tensor [B, H_kv, n, a]
    channel : fp16 Tensor [B, H_kv, n, D]
        c of the values.
    valid : int32 Tensor [B, H_kv, n], optional
        Tokens in each group; the rows after them are fillers. None: there are no fillers.
    """

    bits: int
    key_codes: Tensor
    value_codes: Tensor
    valid: Tensor | None = None
    key_step: Tensor | None = None
    key_low: Tensor | None = None
    value_step: Tensor | None = None
    value_low: Tensor | None = None
    channel: Tensor | None = None
    value_bits: int | None = None

    @property
    def bits_of_values(self) -> int:
        return self.bits if self.value_bits is None else self.value_bits

    @property
    def size(self) -> int:
        """a, the rows of a group."""
        return self.key_codes.shape[3]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without those that are None."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def map(self, function: Callable[[Tensor], Tensor]) -> Groups:
        """The same groups with `function` applied to every tensor."""
        return replace(self, **{name: function(value) for name, value in self.tensors().items()})  # type: ignore[arg-type]


def quantise_and_pack(
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    bits: int,
    valid: Tensor | None = None,
    implementation: str | None = None,
    value_bits: int | None = None,
) -> Groups:
    """Gather tokens into groups, quantise and pack them.

    Parameters
    ----------
    keys, values : Tensor [B, H_kv, S, D]
    rows : int64 Tensor [B, H_kv or 1, n, a]
        Which of the S rows each place of each group holds; repeats of a token of the group in the fillers, so that they
        widen no range.
    bits : int
        8, 4 or 2; 16 gathers only.
    valid : int32 Tensor [B, H_kv, n], optional
        Tokens in each group, handed on.
    value_bits : int, optional
        8, 4 or 2 for values, where they are not those of keys; without effect at 16.
    """
    if bits == PLAIN:
        return Groups(bits, _gather(keys, rows), _gather(values, rows), valid)
    refusal = None
    if rows.shape[3] > _MOST_ROWS:
        refusal = f"groups have {rows.shape[3]} tokens, and {_MOST_ROWS} are the most"
    name = choose(implementation, IMPLEMENTATIONS, keys, values, refusal=refusal)
    return replace(IMPLEMENTATIONS[name](keys, values, rows, bits, value_bits), valid=valid)


def _reference(keys: Tensor, values: Tensor, rows: Tensor, bits: int, value_bits: int | None = None) -> Groups:
    k, v = _gather(keys, rows).float(), _gather(values, rows).float()
    key_codes, key_step, key_low = quantise(k, bits, 3)
    channel = channel_factors(v)
    width = bits if value_bits is None else value_bits
    value_codes, value_step, value_low = quantise(v / channel.float()[..., None, :], width, 4)
    parameters = (key_step, key_low, value_step, value_low, channel)
    return Groups(bits, pack(key_codes, bits), pack(value_codes, width), None, *parameters, value_bits)


def _blockwise(keys: Tensor, values: Tensor, rows: Tensor, bits: int, value_bits: int | None = None) -> Groups:
    """The reference a few groups at a time: nothing of the size of all keys is made in fp32."""
    heads, (_, _, n, size) = keys.shape[1], rows.shape
    step = max(1, _ELEMENTS_PER_CALL // (size * keys.shape[3]))
    parts = []
    for head in range(heads):
        at = slice(head, head + 1)
        chosen = rows if rows.shape[1] == 1 else rows[:, at]
        cuts = (chosen[:, :, i : i + step] for i in range(0, n, step))
        blocks = [_reference(keys[:, at], values[:, at], some, bits, value_bits) for some in cuts]
        parts.append(_cat(blocks, 2))
    return _cat(parts, 1)


def _triton(keys: Tensor, values: Tensor, rows: Tensor, bits: int, value_bits: int | None = None) -> Groups:
    """One GPU program for each group, which gathers the rows as it reads them."""
    from infer_patch.kernels import kv_pack_triton

    return kv_pack_triton.quantise_and_pack(keys, values, rows, bits, value_bits)


IMPLEMENTATIONS = {"reference": _reference, "cpu": _blockwise, "triton": _triton}


def dequantise(groups: Groups, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H_kv, n, a, D] of all groups, fillers included."""
    if groups.key_step is None or groups.key_low is None or groups.value_step is None or groups.value_low is None:
        return groups.key_codes.to(dtype), groups.value_codes.to(dtype)
    k = unpack(groups.key_codes, groups.bits) * groups.key_step.float()[..., None, :]
    v = unpack(groups.value_codes, groups.bits_of_values) * groups.value_step.float()[..., None]
    k += groups.key_low.float()[..., None, :]
    v += groups.value_low.float()[..., None]
    if groups.channel is not None:
        v *= groups.channel.float()[..., None, :]
    return k.to(dtype), v.to(dtype)


def quantise(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, step, low) with one step and one minimum for all elements along `dim`: x ~ codes * step + low.

    Codes are uint8 of the shape of x (fp32), step and low fp16 without `dim`. Where all elements are one fp16 number,
    step is 1 and the codes are 0.
    """
    levels, x = 2**bits - 1, x.clamp(-_LARGEST, _LARGEST)
    low = round_down(x.amin(dim, keepdim=True))
    step = -round_down(-(x.amax(dim, keepdim=True) - low.float()) / levels)
    step = torch.where(step > 0, step, 1.0)
    codes = ((x - low.float()) / step.float()).round_().clamp_(0, levels).to(torch.uint8)
    return codes, step.squeeze(dim), low.squeeze(dim)


def channel_factors(values: Tensor) -> Tensor:
    """c = sqrt(max |v|) over the tokens of each group, 1 where that is 0: [..., a, D] -> fp16 [..., D]."""
    most = values.abs().amax(-2)
    return torch.where(most > 0, most.sqrt().clamp(_LEAST_FACTOR, _LARGEST), 1.0).half()


def round_down(x: Tensor) -> Tensor:
    """The largest fp16 number that is not above x (fp32), within the range of fp16."""
    x = x.clamp(-_LARGEST, _LARGEST)
    nearest = x.half()
    bits = nearest.view(torch.int16)
    # one number down: a smaller magnitude above zero, a larger one below, and from zero to the first negative number
    below = torch.where(nearest > 0, bits - 1, torch.where(nearest < 0, bits + 1, -32767))
    return torch.where(nearest.float() > x, below, bits).to(torch.int16).view(torch.float16)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., D] -> planar bytes [..., D bits / 8]."""
    planes = codes.chunk(8 // bits, -1)
    packed = planes[0].clone()
    for j, plane in enumerate(planes[1:], 1):
        packed |= plane << bits * j
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Planar bytes [..., D bits / 8] -> codes as fp32 [..., D]."""
    planes = [(packed >> bits * j) & (2**bits - 1) for j in range(8 // bits)]
    return torch.cat(planes, -1).float()


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, H or 1, n, a] of x [B, H, S, D] -> [B, H, n, a, D]."""
    flat = rows.flatten(2).expand(-1, x.shape[1], -1)[..., None].expand(-1, -1, -1, x.shape[3])
    return x.gather(2, flat).unflatten(2, rows.shape[2:])


def _cat(parts: list[Groups], dim: int) -> Groups:
    """One set of groups from several, along a dimension."""
    if len(parts) == 1:
        return parts[0]
    found = [part.tensors() for part in parts]
    joined = {name: torch.cat([part[name] for part in found], dim) for name in found[0]}
    return replace(parts[0], **joined)  # type: ignore[arg-type]
