"""A cache layer that lets go of old tokens: attention sinks and a recent window stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from infer_patch.cache import IndexedLayer
from infer_patch.errors import UnsupportedCallError
from infer_patch.tokens import Tokens


class WindowedLayer(IndexedLayer):
    """Keeps the first tokens (sinks) and a recent window; evicts what lies between, in whole blocks.

    Parameters
    ----------
    sinks, window : int
        Tokens kept at the start and at the end. Both reach out to block borders.
    block : int
        Eviction granule; blocks are counted from each sample's first real token.
    margin : int
        Blocks kept beyond the window, so that a rejected draft (assisted decoding) can be taken back.
    """

    def __init__(self, sinks: int, window: int, block: int = 64, margin: int = 1):
        self.sinks, self.window, self.block, self.margin = -(-sinks // block) * block, window, block, margin
        super().__init__()

    def reset(self) -> None:
        super().reset()
        self.evicted: tuple[int, ...] = ()
        self.record_past = False  # transformers sets it back under this name

    def activate_past_recording(self) -> None:
        """Hold back eviction (transformers calls this before decoding that may roll back)."""
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        tokens = self._tokens
        check_padding(tokens)
        keys, values = super().update(key_states, value_states)
        batch = keys.shape[0]
        if self._positions is None:
            self.start = first_rows(batch, tokens)
        self.evicted = self.evicted or (0,) * batch
        self.view.start, self.view.evicted = self.start, self.evicted
        self._evict()
        return keys, values

    def _evict(self) -> None:
        """Drop the blocks that no later query can see, once there are enough of them to be worth a copy."""
        surplus, starts = [], self.start or ()
        for start, evicted in zip(starts, self.evicted):
            seen = self.rows - start + evicted
            oldest = (seen // self.block * self.block - self.window + 1) // self.block - self.margin
            surplus.append(max(0, oldest * self.block - self.sinks - evicted))
        still_padding = any(start == self.rows for start in starts)
        if self.record_past or still_padding or max(surplus) < max(self.block, self.window // 4):
            return
        row = torch.arange(self.rows, device=self.device)
        first = torch.tensor(starts, device=self.device)[:, None]
        gap = torch.tensor(surplus, device=self.device)[:, None]
        keep = (row >= first) & ((row < first + self.sinks) | (row >= first + self.sinks + gap))
        self._pack(keep)
        self.evicted = tuple(e + s for e, s in zip(self.evicted, surplus))

    def _take_host(self, index: list[int]) -> None:
        super()._take_host(index)
        self.evicted = tuple(self.evicted[i] for i in index)


def check_padding(tokens: Tokens | None) -> None:
    """Raise `UnsupportedCallError` unless each sample of the call is padded on the left alone."""
    if tokens is None or tokens.bounds is None:
        return
    if tokens.has_holes or any(stop != tokens.past + tokens.length for _, stop in tokens.bounds):
        raise UnsupportedCallError("eviction needs prompts padded on the left; this batch is padded elsewhere.")


def first_rows(batch: int, tokens: Tokens | None) -> tuple[int, ...]:
    """The first real token of each sample."""
    if tokens is None or tokens.bounds is None:
        return (0,) * batch
    return tuple(first for first, _ in tokens.bounds)
