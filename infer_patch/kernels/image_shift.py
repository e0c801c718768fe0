"""VAR's rows: from the plain output and exact corrections (arXiv 2503.03321).

In rows that read much of the images and little of it at visual sinks, a share of the mass of all sinks goes to the
other visual tokens in proportion. With O_S, m_S the part and mass of sinks and O_N, m_N those of visual tokens that
are no sinks:

    o'_i = o_i - move O_S,i + move (m_S,i / m_N,i) O_N,i

Faces: `reference` (fp32, writes the T x S probabilities out), `cpu` (fast torch, any device, rows in blocks) and
`triton` (NVIDIA GPUs; no gradients). An argument or INFER_PATCH_KERNELS overrides the choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from infer_patch.kernels import row_attention as rows_of
from infer_patch.kernels.calibrated_attention import EPSILON, TINY, reference_probabilities
from infer_patch.kernels.dispatch import choose


@dataclass(frozen=True)
class ImageRule:
    """Which rows `shift_to_images` edits and how far.

    Parameters
    ----------
    sink_portion : float
        Largest share of the image mass that may lie on visual sinks.
    least_mass : float
        Smallest image mass.
    move : float
        Share of the sinks' mass that is moved.
    """

    sink_portion: float
    least_mass: float
    move: float


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
    lse: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`output` with attention of chosen rows moved from sinks to the other visual tokens, and which rows were chosen.

    Parameters
    ----------
    output : Tensor [b, H, T, D_v]
        Plain causal attention of q [b, H, T, D] over k, v [b, H_kv, S, D]; the queries are those of the last T keys.
    sinks, visual : bool Tensor [b, S]
        Keys that are sinks, and keys that are visual tokens.
    asked : bool Tensor [b, T]
        Rows that may be chosen at all.
    lse : Tensor [b, H, T], optional
        Log-sum-exp of the rows, where it is known: then listed keys alone are scored.

    Returns
    -------
    Tensor like `output`, and bool [b, H, T]. Rows not chosen are as they were.
    """
    face = choose(implementation, rows_of.FACES, q, k, v, output)
    if face == "triton":
        from infer_patch.kernels import image_shift_triton

        return image_shift_triton.shift_to_images(output, q, k, v, sinks, visual, asked, rule, scale)
    if face == "cpu":
        return _shift_to_images(output, q, k, v, sinks, visual, asked, rule, scale, lse)
    kv = rows_of.key_heads(q.shape[1], k.shape[1])
    a = reference_probabilities(q, k, kv, scale)
    changed, chosen = reference_shifted(a, sinks, visual, asked, rule)
    new = rows_of.per_key_head(changed, v.float(), kv).to(output.dtype)
    return torch.where(chosen[..., None], new, output), chosen


class VisualKeys(NamedTuple):
    """Which keys of one sample matter to its rows: the span from the first visual token to the last, and sinks outside
    it. `marks` [3, n] fp32 says of each key of the span whether it is visual, a visual sink, a sink (1 or 0)."""

    span: slice
    marks: Tensor
    outside: Tensor

    @classmethod
    def of(cls, sinks: Tensor, visual: Tensor) -> VisualKeys:
        """From bool [S] each, with at least one visual token. Waits for the device."""
        places = visual.nonzero()
        span = slice(int(places[0]), int(places[-1]) + 1)
        marks = torch.stack([visual[span], (visual & sinks)[span], sinks[span]]).float()
        rest = sinks.clone()
        rest[span] = False
        return cls(span, marks, rest.nonzero().squeeze(1))


def shift_row(
    output: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, known: VisualKeys, rule: ImageRule, scale: float
) -> tuple[Tensor, Tensor]:
    """What `shift_to_images` does to one row of one sample that sees all keys: decode steps, which bring no picture.

    output, q [1, H, 1, D], k, v [1, H_kv, S, D], lse [1, H, 1] -> like output, and the heads chosen, bool [1, H, 1].
    Keys and values of the span are read in place.
    """
    kv = rows_of.key_heads(q.shape[1], k.shape[1])
    query = scale * q.float()

    def probabilities(keys: Tensor) -> Tensor:
        return (rows_of.per_key_head(query, keys.transpose(-1, -2), kv) - lse[..., None]).exp()

    p, beyond = probabilities(k[:, :, known.span]), probabilities(k[:, :, known.outside])
    image, visual_sinks, sinks = (p @ known.marks.T).unbind(-1)
    tokens = known.marks[0].sum()
    chosen = _chosen(image, visual_sinks, tokens, torch.ones_like(image, dtype=torch.bool), rule)
    if not bool(chosen.any()):
        return output, chosen
    gain = ((sinks + beyond.sum(-1)) / (image - visual_sinks).clamp(min=TINY))[..., None]
    moved = rule.move * p * (gain * (known.marks[0] - known.marks[1]) - known.marks[2])
    new = output.float() + rows_of.per_key_head(moved, v[:, :, known.span], kv)
    new = new - rule.move * rows_of.per_key_head(beyond, v[:, :, known.outside], kv)
    return torch.where(chosen[..., None], new.to(output.dtype), output), chosen


def reference_shifted(
    a: Tensor, sinks: Tensor, visual: Tensor, asked: Tensor, rule: ImageRule
) -> tuple[Tensor, Tensor]:
    """A' [b, H, T, S] from A, and the chosen rows [b, H, T]; sinks, visual [b, S] and asked [b, T] are bool."""
    is_sink, is_visual = sinks[:, None, None], visual[:, None, None]
    keys, count = a.shape[-1], a.shape[2]
    seen = torch.arange(keys, device=a.device) <= torch.arange(keys - count, keys, device=a.device)[:, None]
    chosen = _chosen(
        (a * is_visual).sum(-1),
        (a * (is_visual & is_sink)).sum(-1),
        (is_visual & seen).sum(-1),
        (is_visual & is_sink & seen).any(-1) & asked[:, None],
        rule,
    )
    return torch.where(chosen[..., None], shifted_probabilities(a, sinks, visual, rule.move), a), chosen


def shifted_probabilities(a: Tensor, sinks: Tensor, visual: Tensor, move: float) -> Tensor:
    """A' of rows that were chosen, from A [b, H, T, S]; sinks, visual [b, S]."""
    is_sink, is_visual = sinks[:, None, None], visual[:, None, None]
    others = a * (is_visual & ~is_sink)
    budget = move * (a * is_sink).sum(-1, keepdim=True)
    share = others / others.sum(-1, keepdim=True).clamp(min=TINY)
    return torch.where(is_sink, (1 - move) * a, a) + budget * share


def _chosen(image: Tensor, sink: Tensor, tokens: Tensor, asked: Tensor, rule: ImageRule) -> Tensor:
    """Rows to edit, from their mass on visual tokens, on visual sinks, and the number of visual tokens they see."""
    portion = sink / (image + EPSILON * tokens)
    return asked & (portion <= rule.sink_portion) & (image >= rule.least_mass) & (image - sink > EPSILON)


def _shift_to_images(
    output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    visual: Tensor,
    asked: Tensor,
    rule: ImageRule,
    scale: float,
    lse: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, heads, count, _ = q.shape
    keys, chosen = k.shape[2], torch.zeros(batch, heads, count, dtype=torch.bool, device=q.device)
    some = asked.any(0).nonzero()
    if not len(some) or not bool((visual & sinks).any()):
        return output, chosen
    first = int(some[0])  # rows before it are asked of no sample
    kv = rows_of.key_heads(heads, k.shape[1])
    index = rows_of.key_lists(visual | sinks)
    held = index >= 0
    is_sink, is_visual = ((x.gather(1, index.clamp(min=0)) & held)[:, None, None] for x in (sinks, visual))
    each, listed = tuple(range(v.shape[1])), index[:, None].expand(-1, v.shape[1], -1)
    listed_k = rows_of.listed_rows(k, listed, each).float().transpose(-1, -2)
    values = rows_of.listed_rows(v, listed, each).float()
    known = lse if lse is not None and not (torch.is_grad_enabled() and q.requires_grad) else None
    parts = [output[:, :, :first]]
    for part in rows_of.row_blocks(batch, heads, count - first, keys if known is None else len(index[0]), q.device):
        here = slice(part.start + first, part.stop + first)
        past = keys - count + here.start
        if known is None:
            row_lse = rows_of.row_lse(q[:, :, here], k[:, :, : past + here.stop - here.start], kv, scale)
        else:
            row_lse = known[:, :, here]
        row = torch.arange(past, past + here.stop - here.start, device=q.device)[:, None]
        seen = (held[:, None] & (index[:, None] <= row))[:, None]
        z = scale * rows_of.per_key_head(q[:, :, here].float(), listed_k, kv) - row_lse[..., None]
        p = z.masked_fill(~seen, float("-inf")).exp()
        image, sink = (p * is_visual).sum(-1), (p * (is_visual & is_sink)).sum(-1)
        may = asked[:, None, here] & (is_visual & is_sink & seen).any(-1)
        taken = _chosen(image, sink, (is_visual & seen).sum(-1), may, rule)
        others = p * (is_visual & ~is_sink)
        gain = (p * is_sink).sum(-1, keepdim=True) / others.sum(-1, keepdim=True).clamp(min=TINY)
        moved = rule.move * (gain * others - p * is_sink)
        new = output[:, :, here].float() + rows_of.per_key_head(moved, values, kv)
        parts.append(torch.where(taken[..., None], new.to(output.dtype), output[:, :, here]))
        chosen[:, :, here] = taken
    return torch.cat(parts, 2), chosen
