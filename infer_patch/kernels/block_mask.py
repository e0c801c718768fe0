"""The contract between block selection and block-sparse attention.

Notation: B batch, H query heads, H_kv key heads, G = H / H_kv, T queries, S keys (the last T keys belong to the
queries), D head size. Query blocks are aligned to absolute positions: query block i of a call covers positions
[(first + i) * block_q, (first + i + 1) * block_q) with first = (S - T) // block_q, so that a prompt gives the same
lists whether it arrives whole or in block-aligned chunks, and the causal triangle always lies in the last entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockMask:
    """Which key blocks each query block reads.

    Parameters
    ----------
    idx : int64 Tensor [B, M, n_q, W]
        Key-block numbers, ascending, no repeats; entries past the count are ignored. M is H_kv (one list per key
        head, shared by its query heads), 1 (one list for all), or H. Expanded (stride 0) dimensions are fine.
    count : int64 Tensor [B, M, n_q]
        Number of valid entries of each list, at least 1.
    block_q, block_k : int
        Block sizes in tokens; block_q is a multiple of block_k.
    """

    idx: Tensor
    count: Tensor
    block_q: int = 64
    block_k: int = 64

    def diagonal(self, queries: int, keys: int) -> tuple[int, int]:
        """(number of the first query block, number of query blocks) of a call with T queries and S keys."""
        first = (keys - queries) // self.block_q
        return first, -(-keys // self.block_q) - first

    def blocks_read(self, batch: int, kv_heads: int) -> Tensor:
        """Key blocks read in all (0-dim tensor: no host copy); lists shared by samples or heads count for each."""
        copies = batch * kv_heads / (self.count.shape[0] * self.count.shape[1])
        return self.count.sum() * copies

    def check(self, queries: int, keys: int) -> None:
        """Verify every invariant of the contract (slow; set INFER_PATCH_DEBUG=1 to run it on each call).

        Raises
        ------
        ValueError
            Naming the first invariant that does not hold.
        """
        first, n_q = self.diagonal(queries, keys)
        if self.block_q % self.block_k or self.block_k % 16:
            raise ValueError(f"block sizes {self.block_q}/{self.block_k}: need multiples of 16, block_q of block_k")
        if self.idx.shape[:3] != self.count.shape or self.count.shape[-1] != n_q:
            raise ValueError(
                f"lists {tuple(self.idx.shape)} and counts {tuple(self.count.shape)} for {n_q} query blocks"
            )
        per = self.block_q // self.block_k
        n_k = -(-keys // self.block_k)
        for i in range(n_q):
            end = min((first + i + 1) * per, n_k)
            diagonal = set(range((first + i) * per, end))
            for lists, counts in zip(self.idx[:, :, i].flatten(0, 1).tolist(), self.count[:, :, i].flatten().tolist()):
                if not 1 <= counts <= len(lists):
                    raise ValueError(f"query block {i}: count {counts} outside 1..{len(lists)}")
                entries = lists[:counts]
                if entries != sorted(set(entries)):
                    raise ValueError(f"query block {i}: entries are not ascending and unique: {entries}")
                if entries[0] < 0 or entries[-1] >= end:
                    raise ValueError(f"query block {i}: blocks {entries} outside the visible 0..{end - 1}")
                if not diagonal <= set(entries):
                    raise ValueError(f"query block {i}: the diagonal {sorted(diagonal)} is not listed in {entries}")


def causal_blocks(queries: int, keys: int, block_q: int, block_k: int) -> int:
    """Key blocks a dense causal pass would read, summed over the query blocks (one head)."""
    first, last = (keys - queries) // block_q, -(-keys // block_q)
    per, n_k = block_q // block_k, -(-keys // block_k)
    return sum(min((i + 1) * per, n_k) for i in range(first, last))


def blocks_of_window(window: int, block: int = 64) -> int:
    """Blocks that hold the last `window` tokens of every row of a query block, its own block included."""
    return -(-(window - 1) // block) + 1


def sink_window_blocks(
    queries: int, keys: int, sinks: int, windows: Sequence[int], block: int = 64, device: torch.device | str = "cpu"
) -> BlockMask:
    """Lists for attention sinks plus a recent window, by arithmetic alone: one for each of `windows`.

    Holds for storage with whole blocks missing between sinks and window too: both ends of a window move alike.

    Parameters
    ----------
    sinks : int
        First tokens that are read, rounded up to whole blocks.
    windows : sequence of int
        Blocks up to the query block's own that are read (`blocks_of_window`).

    Returns
    -------
    BlockMask with B = 1 and M = len(windows)
    """
    first, last = (keys - queries) // block, -(-keys // block)
    n_sink = -(-sinks // block)
    row = torch.arange(first, last, device=device)
    lowest = (row - torch.tensor(list(windows), device=device)[:, None] + 1).clamp(min=n_sink)
    entry = torch.arange(min(n_sink + max(windows), last), device=device)
    idx = torch.where(entry < n_sink, entry, lowest[..., None] + entry - n_sink)
    count = torch.minimum(row + 1, n_sink + (row - lowest + 1).clamp(min=0))
    return BlockMask(idx[None], count[None], block, block)
