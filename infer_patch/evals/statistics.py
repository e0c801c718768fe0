"""Paired statistics of two runs over the same items.

Both runs answer the same questions, so only the questions on which they differ say anything (McNemar, 1947), and items
that share a picture or a text count as one draw (bootstrap by cluster).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from infer_patch.availability import require

RESAMPLES = 10_000


@dataclass(frozen=True)
class Paired:
    """How a run differs from the reference on the same items.

    Parameters
    ----------
    difference : float
        Mean score of the run minus that of the reference.
    low, high : float
        95 % bootstrap interval of the difference, resampling whole groups.
    lost, won : int
        Items right in the reference and wrong in the run, and the other way round.
    p_value : float
        Exact McNemar test (two-sided binomial over lost and won); 1 where nothing flipped.
    groups : int
        Independent groups behind the interval.
    """

    difference: float
    low: float
    high: float
    lost: int
    won: int
    p_value: float
    groups: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def paired(
    reference: Sequence[float],
    other: Sequence[float],
    groups: Sequence[str],
    seed: int = 0,
    resamples: int = RESAMPLES,
    weights: Sequence[float] | None = None,
    right: Sequence[tuple[bool, bool]] | None = None,
) -> Paired:
    """Compare scores (0 to 1) of the same items in the same order.

    `weights` count in the difference and its interval (an item that stands for several rows); flips are of items.
    `right` says which items were right in the reference and in the run, where a score from 0.5 on does not.
    """
    if not len(reference) == len(other) == len(groups) or not len(reference):
        raise ValueError(
            f"paired scores need equal, non-zero lengths, got {len(reference)}, {len(other)}, {len(groups)}"
        )
    before, after = np.asarray(reference, float), np.asarray(other, float)
    flips = list(zip(before >= 0.5, after >= 0.5)) if right is None else right
    lost = sum(bool(was and not now) for was, now in flips)
    won = sum(bool(now and not was) for was, now in flips)
    weight = np.ones_like(before) if weights is None else np.asarray(weights, float)
    low, high = cluster_bootstrap(after - before, groups, seed, resamples, weight)
    return Paired(
        float(np.average(after - before, weights=weight)), low, high, lost, won, mcnemar(lost, won), len(set(groups))
    )


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p: how likely so uneven a split of the discordant pairs is when both runs are equally good."""
    require("scipy", "The exact McNemar test")
    from scipy.stats import binomtest

    return 1.0 if lost + won == 0 else float(binomtest(lost, lost + won, 0.5).pvalue)


def cluster_bootstrap(
    values: np.ndarray,
    groups: Sequence[str],
    seed: int = 0,
    resamples: int = RESAMPLES,
    weights: np.ndarray | None = None,
) -> tuple[float, float]:
    """95 % percentile interval of the (weighted) mean of `values`, drawing whole groups with replacement."""
    weights = np.ones(len(values)) if weights is None else weights
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    sums, sizes = np.bincount(index, values * weights), np.bincount(index, weights)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 1000):  # a thousand at a time bounds the memory
        drawn = rng.integers(len(sums), size=(min(1000, resamples - start), len(sums)))
        means[start : start + len(drawn)] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
