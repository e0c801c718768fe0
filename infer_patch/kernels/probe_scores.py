"""How much attention a few probe queries pay to each key: softmax rows summed over the probes, never T x T.

Two passes over blocks of keys: the log-sum-exp of every probe row, then the column sums of exp(score - log-sum-exp).
Where all scores of a key head fit one block, they are computed once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infer_patch.kernels.dispatch import choose

_SCORES_PER_BLOCK = 1 << 22


def probe_scores(
    q: Tensor,
    k: Tensor,
    scale: float,
    probe_positions: Tensor,
    key_positions: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Attention mass of each key, summed over the probes and over the query heads of its key head.

    Parameters
    ----------
    q : Tensor [B, H, m, D]
        The probe queries.
    k : Tensor [B, H_kv, n, D]
    probe_positions : int64 Tensor [B, m]
        A probe sees the keys at or before its position; -1 for a place without a probe, which adds nothing.
    key_positions : int64 Tensor [B, n], optional
        Later than every probe for a key that nobody sees. None: 0, 1, ..., n - 1.

    Returns
    -------
    Tensor [B, H_kv, n], fp32
        Sums to H / H_kv times the number of probes that see any key.
    """
    run = IMPLEMENTATIONS[choose(implementation, IMPLEMENTATIONS, q, k)]
    return run(q, k, scale, probe_positions, _positions(k, key_positions))


def probes_that_see(probe_positions: Tensor, key_positions: Tensor) -> Tensor:
    """c_j, the number of probes at or after each key: [B, m] and [B, n] -> int64 [B, n]."""
    ordered = probe_positions.sort(1).values
    return ordered.shape[1] - torch.searchsorted(ordered, key_positions.contiguous())


def _reference(q: Tensor, k: Tensor, scale: float, probes: Tensor, positions: Tensor) -> Tensor:
    heads = k.shape[1]
    scores = q.float().unflatten(1, (heads, -1)) @ k.float()[:, :, None].mT * scale  # [B, H_kv, G, m, n]
    visible = (positions[:, None] <= probes[:, :, None])[:, None, None]
    probabilities = scores.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num(0.0)
    return probabilities.sum((2, 3))


def _blockwise(q: Tensor, k: Tensor, scale: float, probes: Tensor, positions: Tensor) -> Tensor:
    """One key head at a time, its scores in a buffer of bounded size."""
    (batch, heads, n, _), group = k.shape, q.shape[1] // k.shape[1]
    mass = q.new_zeros(batch, heads, n, dtype=torch.float32)
    step = min(n, max(256, _SCORES_PER_BLOCK // max(group * q.shape[2], 1)))
    for b in range(batch):
        seen = probes[b] >= positions[b].min()
        hidden = [positions[b, j : j + step] > probes[b][seen, None] for j in range(0, n, step)]
        for h in range(heads):
            rows = q[b, h * group : (h + 1) * group, seen].float() * scale  # [G, m, D]
            blocks = [k[b, h, j : j + step] for j in range(0, n, step)]
            if len(blocks) == 1:
                mass[b, h] = _scores(rows, blocks[0], hidden[0]).softmax(-1).sum((0, 1))
                continue
            lse = torch.stack([_scores(rows, *block).logsumexp(-1) for block in zip(blocks, hidden)]).logsumexp(0)
            for j, block in zip(range(0, n, step), zip(blocks, hidden)):
                mass[b, h, j : j + step] = _scores(rows, *block).sub_(lse[..., None]).exp_().sum((0, 1))
    return mass


def _triton(q: Tensor, k: Tensor, scale: float, probes: Tensor, positions: Tensor) -> Tensor:
    """The same two passes in GPU kernels, which hold scores in registers."""
    from infer_patch.kernels import probe_scores_triton

    return probe_scores_triton.probe_scores(q, k, scale, probes, positions)


IMPLEMENTATIONS = {"reference": _reference, "cpu": _blockwise, "triton": _triton}


def _scores(rows: Tensor, keys: Tensor, hidden: Tensor) -> Tensor:
    return (rows @ keys.float().mT).masked_fill_(hidden, float("-inf"))


def _positions(k: Tensor, positions: Tensor | None) -> Tensor:
    if positions is not None:
        return positions.expand(k.shape[0], -1)
    return torch.arange(k.shape[2], device=k.device).expand(k.shape[0], -1)
