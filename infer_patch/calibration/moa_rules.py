"""Elastic rules that a head may get, what each costs in density, and what it loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infer_patch.spans import window_blocks

Rule = tuple[float, float]  # alpha in tokens, beta as a share of the length
BETAS = tuple(i / 8 for i in range(9))
_ALPHA_STEPS = 8  # even steps in the longest profiled length: 1,024 tokens for the published 8,192


def candidates(lengths: Sequence[int], others: Sequence[int] = (), sinks: int = 64, block: int = 64) -> list[Rule]:
    """All rules alpha + beta N with alpha from minus the shortest to the longest profiled length and beta 0, 1/8 .. 1.

    Left out are rules longer than the text at the longest profiled length, those that come to nothing at the shortest,
    and those whose blocks are another rule's at every length, `others` included (the first is kept).
    """
    step = max(block, max(lengths) // _ALPHA_STEPS // block * block)
    alphas = range(-(min(lengths) // step) * step, max(lengths) + 1, step)
    kept: dict[tuple[int, ...], Rule] = {}
    for beta in BETAS:
        for alpha in alphas:
            if alpha + beta * max(lengths) > max(lengths) or alpha + beta * min(lengths) <= 0:
                continue
            blocks = tuple(window_blocks(alpha, beta, n, sinks, block) for n in (*lengths, *others))
            kept.setdefault(blocks, (float(alpha), beta))
    return list(kept.values())


def densities(rules: Sequence[Rule], lengths: Sequence[int], sinks: int = 64, block: int = 64) -> NDArray[np.float64]:
    """Share of the key blocks that a row reads at most, which is what a head holds in memory: [lengths, rules]."""
    found = [
        [min((sinks // block + window_blocks(*rule, n, sinks, block)) / -(-n // block), 1.0) for rule in rules]
        for n in lengths
    ]
    return np.array(found)


def key_heads(influence: Tensor, kv_heads: int, reduce: Literal["sum", "max"]) -> Tensor:
    """Block influence of key heads [L, H_kv, n, n] from that of their query heads [L, H, n, n].

    Query head h reads key head h // G. "sum" adds up what the group loses; "max" takes the most of any one, as the
    published code does (which, however, groups heads of equal number modulo H_kv).
    """
    groups = influence.unflatten(1, (kv_heads, -1))
    return groups.sum(2) if reduce == "sum" else groups.amax(2)


def rule_losses(
    influence: Tensor, rules: Sequence[Rule], length: int, sinks: int = 64, block: int = 64
) -> NDArray[np.float64]:
    """Influence that every rule masks at a length: [L, heads, rules] from block influence [L, heads, n, n].

    A window of w blocks masks, in row i, the blocks from the sinks' end to i - w.
    """
    n, n_sink = influence.shape[-1], sinks // block
    distance = torch.arange(n)[:, None] - torch.arange(n)
    by_distance = torch.zeros(*influence.shape[:2], n + 1, dtype=torch.float64)
    for d in range(n):
        masked = (distance == d) & (torch.arange(n) >= n_sink)
        by_distance[..., d] = influence[..., masked].double().sum(-1)
    beyond = by_distance.flip(-1).cumsum(-1).flip(-1)  # what a window of w blocks masks
    windows = [min(window_blocks(*rule, length, sinks, block), n) for rule in rules]
    return beyond[..., windows].numpy()
