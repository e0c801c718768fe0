"""Attention in which some heads do not read some keys: those heads' rows are worked out over the other keys alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from infer_patch.kernels.block_mask import causal_blocks
from infer_patch.kernels.dense_attention import dense_attention

BLOCK = 64  # what reports count in
_SCORES_AT_ONCE = 2**24


@dataclass(frozen=True)
class HiddenKeys:
    """Keys of one call that some of its query heads do not read.

    Parameters
    ----------
    blind : tuple of int
        The query heads, ascending; at least one.
    heads : int
        H, of all query heads.
    queries : int
        T; the last T keys belong to the queries.
    hidden : bool Tensor [B, S]
        The keys.
    loses_mass : bool
        False: the softmax of a blind head runs over the keys it reads, and rows of hidden tokens get zeros. True: over
        all keys, in all rows, and what falls on hidden ones is lost (rows do not sum to 1).
    counts : tuple of (int, int)
        Of each sample, how many queries and how many keys are not hidden.
    """

    blind: tuple[int, ...]
    heads: int
    queries: int
    hidden: Tensor
    loses_mass: bool
    counts: tuple[tuple[int, int], ...]

    def blocks_read(self, batch: int, kv_heads: int) -> int:
        """Causal key blocks of so many tokens, summed over samples, averaged over query heads, times key heads."""
        whole = causal_blocks(self.queries, self.hidden.shape[1], BLOCK, BLOCK)
        if self.loses_mass:
            return batch * kv_heads * whole
        share = len(self.blind) / self.heads
        seen = [causal_blocks(rows, keys, BLOCK, BLOCK) if rows else 0 for rows, keys in self.counts]
        return round(kv_heads * sum((1 - share) * whole + share * part for part in seen))


def hidden_keys_attention(q: Tensor, k: Tensor, v: Tensor, choice: HiddenKeys, scale: float) -> Tensor:
    """q [B, H, T, D], k and v [B, H_kv, S, D] -> [B, H, T, D]."""
    group, past = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    blind = torch.tensor(choice.blind, device=q.device)
    seeing = torch.tensor([h for h in range(q.shape[1]) if h not in choice.blind], device=q.device, dtype=torch.long)
    output = q.new_zeros(*q.shape[:3], v.shape[-1])
    if len(seeing):
        output[:, seeing] = dense_attention(q[:, seeing], k[:, seeing // group], v[:, seeing // group], scale)
    queries, keys, values = q[:, blind], k[:, blind // group], v[:, blind // group]
    for sample in range(len(q)):
        one = slice(sample, sample + 1)
        if choice.loses_mass:
            output[sample, blind] = _mass_lost(queries[one], keys[one], values[one], choice.hidden[sample], scale)[0]
            continue
        there = (~choice.hidden[sample]).nonzero()[:, 0]
        rows = there[there >= past] - past
        if len(rows):
            part = dense_attention(
                queries[one].index_select(2, rows),
                keys[one].index_select(2, there),
                values[one].index_select(2, there),
                scale,
            )
            output[sample, blind[:, None], rows] = part[0]
    return output


def _mass_lost(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """softmax over all keys, weights of hidden ones set to 0: q [1, h, T, D], k and v [1, h, S, D] -> [1, h, T, D]."""
    _, heads, count, _ = q.shape
    length = k.shape[2]
    place = torch.arange(length, device=q.device)
    output = torch.empty(1, heads, count, v.shape[-1], dtype=q.dtype, device=q.device)
    step = max(1, _SCORES_AT_ONCE // (heads * length))
    for first in range(0, count, step):
        rows = slice(first, min(first + step, count))
        own = place[length - count :][rows, None]
        scores = (q[:, :, rows].float() @ k.float().transpose(-1, -2) * scale).masked_fill(place > own, float("-inf"))
        output[:, :, rows] = (scores.softmax(-1).masked_fill(hidden, 0.0) @ v.float()).to(q.dtype)
    return output


def reference(q: Tensor, k: Tensor, v: Tensor, choice: HiddenKeys, scale: float) -> Tensor:
    """The same with the whole score matrix, in fp32."""
    group, queries, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    causal = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    blind = torch.zeros(q.shape[1], dtype=torch.bool, device=q.device)
    blind[list(choice.blind)] = True
    unread = blind[None, :, None, None] & choice.hidden[:, None, None]
    scores = q.float() @ k.mT * scale
    if choice.loses_mass:
        weights = scores.masked_fill(~causal, float("-inf")).softmax(-1).masked_fill(unread, 0.0)
    else:
        weights = scores.masked_fill(~causal | unread, float("-inf")).softmax(-1)
        own = choice.hidden[:, None, keys - queries :, None]
        weights = weights.masked_fill(blind[None, :, None, None] & own, 0.0)
    return (weights @ v).to(q.dtype)
