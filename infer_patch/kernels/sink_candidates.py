"""ACT on the newest row of one sample, by the few keys that can be sinks: what decoding costs on a CPU.

A key that n rows see is a sink if what it received, s, is above threshold n. One more row adds at most 1 to s and
never lowers threshold n. So a key with s + ROWS <= threshold n stays no sink for ROWS more rows, and needs no
look until then. Keys, values and sums of all others are kept side by side, and a row costs a few products with them:

    a_j = exp(z_j - LSE)        s += a        S' = {j : s_j > threshold n_j} without the spared sink
    b = sum of a over S',  c = 1 + (1 - beta) b / (1 - b)        o' = c o + (beta - c) sum over S' of a_j v_j

numpy: a dozen small operations, each several times cheaper than in torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infer_patch.kernels.calibrated_attention import EPSILON

ROWS = 32  # rows that one choice of candidates serves


def are_few(threshold: float, keys: int) -> bool:
    """Whether most keys lack more than `ROWS` to be sinks, so that a choice among them is worth making."""
    return threshold * keys > 2 * ROWS


@dataclass(frozen=True)
class SinkRule:
    """Which of the keys above the threshold are sinks, and the share of its attention that one keeps."""

    beta: float
    spare: str = "first_detected"
    min_queries: int = 1


class SinkCandidates:
    """Keys of one sample that can be sinks within the next `ROWS` rows, in h heads.

    Parameters
    ----------
    sums : float32 Tensor [h, S]
        What each key received from all rows so far.
    k, v : Tensor [H_kv, S or more, D]
    kv : tuple of int
        Key head of each of the h query heads.
    threshold : float
        Of the last row. It may fall from row to row as 1 / S does, no faster.
    """

    def __init__(self, sums: Tensor, k: Tensor, v: Tensor, kv: tuple[int, ...], threshold: float):
        heads, self.rows = sums.shape
        self._heads, self._ones, self._sinks = np.arange(heads), np.ones(heads), np.zeros((heads, 0), bool)
        received, seen = sums.numpy(), np.arange(self.rows, 0, -1)
        columns = np.flatnonzero((received + ROWS > threshold * seen).any(0))
        self.count, room = len(columns), len(columns) + ROWS
        self.columns, self.seen = np.zeros(room, np.int64), np.zeros(room, np.int64)
        self.columns[: self.count], self.seen[: self.count] = columns, seen[columns]
        self.sums = np.zeros((heads, room), np.float32)
        self.sums[:, : self.count] = received[:, columns]
        self.keys, self.values = (np.empty((heads, room, x.shape[-1]), np.float32) for x in (k, v))
        at = torch.tensor(kv)[:, None], torch.from_numpy(columns)
        for mine, theirs in ((self.keys, k), (self.values, v)):
            mine[:, : self.count] = theirs.detach()[at].float().numpy()

    @property
    def is_used_up(self) -> bool:
        return self.count == len(self.columns)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.columns, self.seen, self.sums, self.keys, self.values))

    def lowered_row(
        self,
        output: np.ndarray,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        lse: np.ndarray,
        threshold: float,
        rule: SinkRule,
    ) -> np.ndarray:
        """Take in one more row and its key, and correct the row in place.

        Parameters
        ----------
        output : float32 [h, D_v]
            Plain attention of the row; written into.
        q, k, v : float32 [h, D]
            Its query, scaled; its own key and value, for each query head.
        lse : float32 [h]

        Returns
        -------
        The factors c [h], 1 where nothing changed. The plain output may be too coarse to be multiplied by a large one
        (`LARGEST_FACTOR`); `listed` names the keys, to compute such a row afresh.
        """
        n = self.count
        self.columns[n], self.keys[:, n], self.values[:, n] = self.rows, k, v
        self.count, self.rows = n + 1, self.rows + 1
        n += 1
        a = np.exp((self.keys[:, :n] @ q[..., None])[..., 0] - lse[:, None])
        sums, seen = self.sums[:, :n], self.seen[:n]
        sums += a
        seen += 1
        self._sinks = sinks = sums > threshold * seen
        if rule.min_queries > 1:
            sinks &= seen >= rule.min_queries
        if rule.spare == "first_token":
            sinks &= self.columns[:n] > 0
        else:
            sinks[self._heads, sinks.argmax(1)] = False
        if not sinks.any():
            return self._ones
        a *= sinks
        mass = a.sum(1)
        c = 1 + (1 - rule.beta) * mass / np.maximum(1 - mass, EPSILON)
        part = (a[:, None] @ self.values[:, :n])[:, 0]
        output *= c[:, None]
        output += (rule.beta - c)[:, None] * part
        return np.asarray(c)

    def listed(self, head: int) -> Tensor:
        """The keys that the last row of a head lowered: bool [S]."""
        marked = torch.zeros(self.rows, dtype=torch.bool)
        marked[torch.from_numpy(self.columns[: self.count][self._sinks[head]])] = True
        return marked
