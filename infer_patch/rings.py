"""Storage of key heads that have equal spans: sinks, and a ring that always holds the newest tokens.

Slot u holds token u of the sample while u lies in the sinks; later tokens go round, token u in slot
sinks + (u - sinks) mod capacity. Keys are stored after the rotary embedding, so their order means nothing to softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RingSpec:
    """What a ring is made from.

    Parameters
    ----------
    heads : tuple of int
        Key heads of the layer, ascending.
    windows : tuple of int
        Blocks in the window, for each sample: a shorter text may have shorter spans.
    capacity : int
        Slots after the sinks; more than the windows, so that a rejected draft can be taken back.
    sinks, block : int
        Tokens at the start, in whole blocks, and the size of a block.
    """

    heads: tuple[int, ...]
    windows: tuple[int, ...]
    capacity: int
    sinks: int
    block: int


class Ring:
    """Keys and values [B, heads, sinks + capacity, D] of the heads of `spec`.

    Parameters
    ----------
    like : Tensor
        Its dtype, device and last dimension are those of the buffers.
    oldest : tuple of int
        For each sample the first token, from the sinks on, that there can be: those before it were lost earlier.
    """

    def __init__(self, spec: RingSpec, like: Tensor, oldest: tuple[int, ...] = ()):
        self.spec = spec
        self.oldest = oldest or (spec.sinks,) * len(spec.windows)
        shape = (len(spec.windows), len(spec.heads), spec.sinks + spec.capacity, like.shape[-1])
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)

    @property
    def heads(self) -> list[int]:
        return list(self.spec.heads)

    @property
    def slots(self) -> int:
        return self.keys.shape[2]

    def slots_of(self, tokens: range) -> Tensor:
        """Slot of each token, int64 [len(tokens)]."""
        token = torch.arange(tokens.start, max(tokens.start, tokens.stop), device=self.keys.device)
        sinks = self.spec.sinks
        return torch.where(token < sinks, token, sinks + (token - sinks) % self.spec.capacity)

    def write(self, samples: list[int], first: int, keys: Tensor, values: Tensor) -> None:
        """Put tokens first, first + 1, ... of some samples into their slots; keys, values [samples, heads, n, D]."""
        self._own(keys)
        sinks, stop = self.spec.sinks, first + keys.shape[2]
        rows = torch.tensor(samples, device=keys.device)[:, None]
        for low, high in ((first, min(stop, sinks)), (max(first, sinks, stop - self.spec.capacity), stop)):
            if low < high:
                slots = self.slots_of(range(low, high))
                for buffer, new in ((self.keys, keys), (self.values, values)):
                    buffer[rows, :, slots] = new[:, :, low - first : high - first].transpose(1, 2)

    def write_one(self, slot: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put one token of every sample into slot [B]; keys, values [B, heads, D]."""
        self._own(keys)
        rows = torch.arange(len(slot), device=slot.device)
        self.keys[rows, :, slot], self.values[rows, :, slot] = keys, values

    def _own(self, new: Tensor) -> None:
        if torch.is_grad_enabled() and new.requires_grad:  # the graph of an earlier step holds the buffers
            self.keys, self.values = self.keys.clone(), self.values.clone()

    def window_start(self, sample: int, position: int) -> int:
        """The first token, from the sinks on, that the query at `position` reads; on a block border."""
        first = position // self.spec.block - self.spec.windows[sample] + 1
        return max(first * self.spec.block, self.spec.sinks, self.oldest[sample])

    def held_from(self, sample: int, written: int) -> int:
        """The first token, from the sinks on, that is here after tokens 0 to `written` - 1 were."""
        return max(self.spec.sinks, self.oldest[sample], written - self.spec.capacity)

    def read_one(self, positions: tuple[int, ...], written: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """For a query at positions[b] of each sample, whose token is being written: its slot [B], and which slots it
        reads, bool [B, slots in use]. `written`: the most tokens there have been."""
        sinks, capacity, device = self.spec.sinks, self.spec.capacity, self.keys.device
        position = torch.tensor(positions, device=device)[:, None]
        slot = torch.where(position < sinks, position, sinks + (position - sinks) % capacity)[:, 0]
        newest = [max(w - 1, p) for w, p in zip(written, positions)]
        slots = torch.arange(min(max(newest) + 1, self.slots), device=device)
        latest = torch.tensor(newest, device=device)[:, None]
        token = latest - (latest - slots) % capacity  # the newest one that belongs into a slot
        first = torch.tensor([self.window_start(b, p) for b, p in enumerate(positions)], device=device)[:, None]
        visible = (token >= first) & (token <= position)
        visible[:, :sinks] = slots[:sinks] <= position
        return slot, visible

    def blocks_read(self, positions: tuple[int, ...]) -> int:
        """Key blocks that `read_one` makes visible, summed over samples and heads."""
        block, read = self.spec.block, 0
        for sample, position in enumerate(positions):
            last, lowest = position // block, self.window_start(sample, position) // block
            read += min(last + 1, self.spec.sinks // block + last - lowest + 1)
        return read * len(self.spec.heads)

    def tokens(self, sample: int, count: int) -> tuple[Tensor, int]:
        """Slots of what the tokens from `count` on may read, oldest first, and how many tokens are left out of it.

        What is left out lies between sinks and window and makes whole blocks.
        """
        sinks, first = self.spec.sinks, self.window_start(sample, count)
        slots = [self.slots_of(span) for span in (range(min(sinks, count)), range(first, count))]
        return torch.cat(slots), first - sinks if count > sinks else 0

    def copy_from(self, other: Ring, head: int, sample: int, count: int) -> None:
        """Take over the tokens that both rings have slots for of one sample of one key head."""
        to, of = self.heads.index(head), other.heads.index(head)
        for first, stop in ((0, min(self.spec.sinks, count)), (self.oldest[sample], count)):
            span = range(max(first, stop - self.spec.capacity), stop)
            mine, theirs = self.slots_of(span), other.slots_of(span)
            self.keys[sample, to, mine] = other.keys[sample, of, theirs]
            self.values[sample, to, mine] = other.values[sample, of, theirs]

    def take(self, index: list[int]) -> None:
        """Let sample i become the old sample index[i]."""
        rows = torch.tensor(index, device=self.keys.device)
        windows = tuple(self.spec.windows[i] for i in index)
        self.spec = RingSpec(self.spec.heads, windows, self.spec.capacity, self.spec.sinks, self.spec.block)
        self.oldest = tuple(self.oldest[i] for i in index)
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def nbytes(self, tokens: int) -> int:
        """Bytes of the slots that a text of so many tokens has filled."""
        return (self.keys.nbytes + self.values.nbytes) // self.slots * min(tokens, self.slots)

    def layout(self, positions: tuple[int, ...], written: tuple[int, ...]) -> Any:
        """What `read_one` depends on: rings with equal layouts share its answer."""
        return self.spec.windows, self.spec.capacity, self.spec.sinks, self.oldest, positions, written, self.keys.device
