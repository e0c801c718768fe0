"""Attention over packed groups and full-precision rows, without dequantising a key or a value.

Steps and minima are folded into what meets them. With integer codes x of the keys and y of the values of a group,
    scores   q . k = (q * key_step) . x + q . key_low
    output   sum_j p_j v_j = channel * ( (p * value_step) . y + p . value_low )
so codes go into matrix products as they are. Every part of the keys gives an output normalised for itself and the
log-sum-exp of its scores; `merge` joins parts as if all scores had gone through one softmax. The order of keys means
nothing to softmax, so groups may stand in any order.

On CPU the codes are widened to fp32 a block at a time, into a buffer that is used again. torch's packed int4 product
(`_weight_int4pack_mm_for_cpu`) is not used: folding makes the queries of every group of 128 tokens differ, and calls
that small were no faster than this and slower with two threads (docs/methods/kv_quant.md).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from infer_patch.kernels.dispatch import choose
from infer_patch.kernels.kv_pack import PLAIN, Groups, dequantise

Part = tuple[Tensor, Tensor]  # output [B, H_kv, R, D] and log-sum-exp [B, H_kv, R], fp32

HIDDEN = -1e30  # score of a key that is not there: finite, so that a row that sees nothing is no NaN
_CODES_PER_PRODUCT = 1 << 20  # widened at a time: few enough for the cache, enough to outweigh the call
_SCORES_PER_PASS = 1 << 24


def packed_attention(
    q: Tensor,
    packed: Sequence[Groups],
    keys: Tensor,
    values: Tensor,
    scale: float,
    visible: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Attention of queries to packed groups, all tokens of which they see, and to rows in full precision.

    Parameters
    ----------
    q : Tensor [B, H, T, D]
    packed : sequence of Groups
        With H_kv key heads; H is a multiple of it.
    keys, values : Tensor [B, H_kv, r, D]
        The rows in full precision.
    visible : bool Tensor [B, T, r], optional
        Which of these rows a query sees; None: all.

    Returns
    -------
    Tensor [B, H, T, D], of the dtype of q
    """
    plain = [codes for groups in packed if groups.bits == PLAIN for codes in (groups.key_codes, groups.value_codes)]
    name = choose(implementation, (*IMPLEMENTATIONS, "triton"), q, keys, values, *plain)
    if name == "triton":
        from infer_patch.kernels import packed_attention_triton

        return packed_attention_triton.attention(q, packed, keys, values, scale, visible)
    group = q.shape[1] // keys.shape[1]
    wide = q.float().unflatten(1, (-1, group)).flatten(2, 3) * scale  # [B, H_kv, G T, D]
    if visible is not None:
        visible = visible[:, None].repeat(1, 1, group, 1)
    output = IMPLEMENTATIONS[name](wide, packed, keys, values, visible)
    return output.unflatten(2, (group, -1)).flatten(1, 2).to(q.dtype)


def _reference(q: Tensor, packed: Sequence[Groups], keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
    """Everything dequantised, one softmax: q [B, H_kv, R, D] is scaled, visible [B, 1, R, r]."""
    rows = (*q.shape[:3], keys.shape[2])
    all_keys, all_values = [keys.float()], [values.float()]
    seen = [q.new_ones(rows, dtype=torch.bool) if visible is None else visible.expand(rows)]
    for groups in packed:
        k, v = dequantise(groups)
        all_keys.append(k.flatten(2, 3))
        all_values.append(v.flatten(2, 3))
        seen.append(~_fillers(groups).flatten(2)[:, :, None].expand(-1, -1, q.shape[2], -1))
    scores = (q @ torch.cat(all_keys, 2).mT).masked_fill(~torch.cat(seen, 3), HIDDEN)
    return scores.softmax(-1) @ torch.cat(all_values, 2)


def _blockwise(q: Tensor, packed: Sequence[Groups], keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
    most = max([groups.key_codes[..., 0].numel() for groups in packed], default=1)
    step = max(1, _SCORES_PER_PASS // most)
    outputs = []
    for start in range(0, q.shape[2], step):
        some, seen = q[:, :, start : start + step], visible
        if visible is not None:
            seen = visible[:, :, start : start + step]
        outputs.append(merge([attend_rows(some, keys, values, seen), *(attend_groups(some, g) for g in packed)]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


IMPLEMENTATIONS = {"reference": _reference, "cpu": _blockwise}


def merge(parts: Sequence[Part]) -> Tensor:
    """One output [B, H_kv, R, D] from attention over several sets of keys."""
    if len(parts) == 1:
        return parts[0][0]
    weights = torch.stack([lse for _, lse in parts]).softmax(0)[..., None]
    output = parts[0][0] * weights[0]
    for (part, _), weight in zip(parts[1:], weights[1:]):
        output.addcmul_(part, weight)
    return output


def attend_rows(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None = None) -> Part:
    """Attention to rows in full precision: q [B, H_kv, R, D] fp32 and scaled, keys and values [B, H_kv, r, D]."""
    scores = q @ keys.float().mT
    if visible is not None:
        scores.masked_fill_(~visible, HIDDEN)
    lse = scores.logsumexp(-1)
    return scores.sub_(lse[..., None]).exp_() @ values.float(), lse


def attend_groups(q: Tensor, groups: Groups) -> Part:
    """Attention to the valid tokens of packed groups: q [B, H_kv, R, D], fp32 and scaled."""
    shape, rows = q.shape[:2], q.shape[2]
    flat, q = groups.map(lambda x: x.flatten(0, 1)), q.flatten(0, 1)
    scores = _key_product(q, flat)  # [N, n, R, a] with N = B H_kv
    if flat.valid is not None:
        scores.masked_fill_(_fillers(flat)[:, :, None], HIDDEN)
    most = scores.amax((1, 3), keepdim=True)
    p = scores.sub_(most).exp_()
    total = p.sum((1, 3))
    output = _value_product(p, flat).div_(total[..., None])
    lse = total.log_().add_(most.view(-1, rows))
    return output.unflatten(0, shape), lse.unflatten(0, shape)


def _fillers(groups: Groups) -> Tensor:
    """bool [..., n, a]: True where a row holds no token."""
    place = torch.arange(groups.key_codes.shape[-2], device=groups.key_codes.device)
    valid = len(place) if groups.valid is None else groups.valid[..., None]
    return (place >= valid).expand(groups.key_codes.shape[:-1])


def _key_product(q: Tensor, flat: Groups) -> Tensor:
    """q . k of q [N, R, D] and groups [N, n, a, ...]: [N, n, R, a], in a buffer that the next call takes over."""
    (heads, n, size), rows = flat.key_codes.shape[:3], q.shape[1]
    scores = _buffer("scores", (heads, n, rows, size), q)
    for h, g in _blocks(flat.key_codes):
        codes, out, some = flat.key_codes[h, g], scores[h, g].view(-1, rows, size), q[h, None]
        if flat.key_step is None or flat.key_low is None:
            queries = some.expand(-1, codes.shape[1], -1, -1).flatten(0, 1)
            torch.bmm(queries, _widened(codes, q).mT, out=out)
            continue
        low = (flat.key_low[h, g].float() @ q[h].mT).flatten(0, 1)[..., None]  # [h g, R, 1]
        folded = (some * flat.key_step[h, g, None].float()).flatten(0, 1)
        if flat.bits < 8:  # fields are shifted down, not masked: field j still holds 2^bits times field j + 1
            width = codes.shape[-1]
            folded[..., width:] -= folded[..., :-width] * 2.0**flat.bits
        for j, part in enumerate(folded.split(codes.shape[-1], -1)):
            torch.baddbmm(low if j == 0 else out, part, _widened(codes, q, flat.bits * j).mT, out=out)
    return scores


def _value_product(p: Tensor, flat: Groups) -> Tensor:
    """sum_j p_j v_j of p [N, n, R, a], which is overwritten, and groups [N, n, a, ...]: [N, R, D]."""
    low = None
    if flat.value_step is not None and flat.value_low is not None:
        low = (p * flat.value_low[:, :, None]).sum(-1, keepdim=True)  # [N, n, R, 1]
        p.mul_(flat.value_step.float()[:, :, None])
    bits = flat.bits_of_values
    planes = max(8 // bits, 1)
    output = p.new_zeros(p.shape[0], p.shape[2], flat.value_codes.shape[-1] * planes)
    for h, g in _blocks(flat.value_codes):
        codes, weights = flat.value_codes[h, g], p[h, g].flatten(0, 1)
        fields = [torch.bmm(weights, _widened(codes, p, bits * j)) for j in range(planes)]
        for j in range(planes - 1):
            fields[j].sub_(fields[j + 1], alpha=2**bits)
        product = torch.cat(fields, -1).unflatten(0, codes.shape[:2])  # [h, g, R, D]
        if low is not None and flat.channel is not None:
            product.add_(low[h, g]).mul_(flat.channel[h, g, None].float())
        output[h] += product.sum(1)
    return output


def _blocks(codes: Tensor) -> Iterator[tuple[slice, slice]]:
    """Parts of [N, n, a, w] that are widened at a time: whole heads, or some groups of one head."""
    heads, n = codes.shape[:2]
    step = max(1, _CODES_PER_PRODUCT // max(codes[0, 0].numel(), 1))
    if step >= n:
        some = step // max(n, 1)
        yield from ((slice(h, h + some), slice(0, n)) for h in range(0, heads, some))
    else:
        yield from ((slice(h, h + 1), slice(g, min(g + step, n))) for h in range(heads) for g in range(0, n, step))


def _widened(codes: Tensor, like: Tensor, shift: int = 0) -> Tensor:
    """Codes [h, g, a, w], shifted down, as fp32 [h g, a, w] in a buffer that the next call takes over."""
    if codes.dtype != torch.float32:
        if shift:
            codes = torch.bitwise_right_shift(codes, shift, out=_buffer("bytes", codes.shape, codes))
        codes = _buffer("wide", codes.shape, like).copy_(codes)
    return codes.flatten(0, 1)


class _Buffers(threading.local):
    """On CPU, fresh memory of some size costs more (page faults) than what is written into it."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}


_buffers = _Buffers()


def _buffer(name: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory of a shape, dtype and device as `like`; on CPU the memory of the last call of this name."""
    size = torch.Size(shape)
    if like.device.type != "cpu":
        return like.new_empty(size)
    held = _buffers.held.get(name)
    if held is None or held.numel() < size.numel():
        with torch.inference_mode(False):  # an inference tensor could not be written to outside
            _buffers.held[name] = held = like.new_empty(size.numel())
    return held[: size.numel()].view(size)
