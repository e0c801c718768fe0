"""How much the end of a prompt attends to each token, recomputed from queries and keys of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from infer_patch.tokens import Tokens

UNSEEN = -1.0  # score of a token that the judging layer did not hold: below every attention weight
_LARGEST = 2**24  # attention weights held at once


def last_rows_attention(q: Tensor, k: Tensor, scale: float, rows: int = 1) -> Tensor:
    """Causal attention of the last `rows` queries, mean over them and over heads, fp32.

    q [b, H, T, D], k [b, H_kv, S, D], the last T keys belong to the queries -> [b, S].
    """
    keys = k.float()[:, :, None].transpose(-1, -2)
    batch, heads, _, _ = q.shape
    length = k.shape[2]
    step = max(_LARGEST // (batch * heads * length), 1)
    total = torch.zeros(batch, length, device=q.device)
    for first in range(length - rows, length, step):
        stop = min(first + step, length)
        part = q[:, :, q.shape[2] - length + first : q.shape[2] - length + stop].float().unflatten(1, (k.shape[1], -1))
        scores = part @ keys * scale
        if stop - first > 1 or stop < length:
            place = torch.arange(length, device=q.device)
            scores = scores.masked_fill(place > place[first:stop, None], float("-inf"))
        total = total + scores.softmax(-1).mean((1, 2)).sum(1)
    return total / rows


def text_after_pictures(tokens: Tokens) -> list[int]:
    """Number of tokens behind the last visual token of each sample: its instruction. 0 for a sample without pictures,
    and for one whose last token is visual."""
    if (counts := tokens.shared.get("text after pictures")) is None:
        visual = cast(Tensor, tokens.image) >= 0
        last_visual = tokens.length - 1 - visual.flip(1).int().argmax(1)
        after = torch.where(visual.any(1), tokens.last_index - last_visual, 0)
        counts = tokens.shared["text after pictures"] = [int(n) for n in after.tolist()]
    return counts


def scores_of(call: Any, rows: Sequence[int], into: Tensor) -> None:
    """Write the scores of one layer's keys to where their tokens stand in the call.

    Parameters
    ----------
    call : AttentionCall
    rows : sequence of int
        For each sample of `call`, how many of its last queries judge; nothing is written for 0.
    into : float32 Tensor [B, T]
    """
    new = call.positions - call.tokens.past  # which token of this call each key is; earlier ones are not judged
    for count in sorted(set(rows) - {0}):
        members = [row for row, wanted in enumerate(rows) if wanted == count]
        here: Any = slice(None) if len(members) == len(rows) else members
        seen = last_rows_attention(call.q[here], call.k[here], call.scale, count)
        for row, weights in zip(members, seen):
            held = (new[row] >= 0) & (new[row] < call.tokens.length)
            into[call.samples[row], new[row][held]] = weights[held]


def blank_scores(tokens: Tokens) -> Tensor:
    """float32 [B, T] in which no token has been seen."""
    return torch.full((tokens.batch, tokens.length), UNSEEN, device=tokens.device)
