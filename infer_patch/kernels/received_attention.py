"""How much attention each key receives, on average over the queries that may see it; no T x T matrix is ever held.

    c_j = sum over queries i that see j of A_ij / their number

as ACT defines it (arXiv 2406.15765). Queries are taken a block at a time; a block's rows are whole, so their softmax
is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 128  # queries of one block


def received_attention(
    q: Tensor, k: Tensor, scale: float, window: int | None = None, rows: int = ROWS
) -> tuple[Tensor, Tensor]:
    """Mean attention that every key receives.

    Parameters
    ----------
    q : Tensor [B, H, T, D]
        Their keys are the last T ones.
    k : Tensor [B, H_kv, S, D]
    scale : float
    window : int, optional
        A query sees the last so many keys only, its own included.
    rows : int
        Queries of one block; memory is B H rows S floats.

    Returns
    -------
    (float32 Tensor [B, H, S], int64 Tensor [S])
        The means, 0 for keys that no query sees, and the number of queries that see each key.
    """
    queries, keys = q.shape[2], k.shape[2]
    total = torch.zeros(*q.shape[:2], keys, device=q.device)
    seen_by = torch.zeros(keys, dtype=torch.long, device=q.device)
    for first in range(0, queries, rows):
        own = torch.arange(keys - queries + first, min(keys - queries + first + rows, keys), device=q.device)
        last, oldest = int(own[-1]) + 1, 0 if window is None else max(int(own[0]) - window + 1, 0)
        here = torch.arange(oldest, last, device=q.device)
        visible = here <= own[:, None]
        if window is not None:
            visible &= here > own[:, None] - window
        block = q[:, :, first : first + len(own)].float().unflatten(1, (k.shape[1], -1))
        scores = block @ k[:, :, None, oldest:last].float().transpose(-1, -2) * scale
        total[:, :, oldest:last] += scores.masked_fill(~visible, -torch.inf).softmax(-1).sum(-2).flatten(1, 2)
        seen_by[oldest:last] += visible.sum(0)
    return total / seen_by.clamp(min=1), seen_by


def reference(q: Tensor, k: Tensor, scale: float, window: int | None = None) -> tuple[Tensor, Tensor]:
    """The same from the whole matrix."""
    queries, keys = q.shape[2], k.shape[2]
    own, here = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    visible = (here <= own) & (here > own - (keys if window is None else window))
    scores = q.float() @ k.float().repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scale
    seen_by = visible.sum(0)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1).sum(-2) / seen_by.clamp(min=1), seen_by
