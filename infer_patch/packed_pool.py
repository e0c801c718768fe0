"""Storage of packed tokens: pools of groups, one pool for each precision.

Tokens of a sample are numbered 0, 1, ... as they come in, padding left out. A pool takes them in groups of at most
`group` tokens, each with parameters of its own, and never touches a group again: nothing is quantised twice. A group of
n tokens has 16 ceil(n / 16) rows, and groups of equal height lie in one slab, so that no row is wasted and a slab is a
few large tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from infer_patch.kernels.kv_pack import PLAIN, Groups, dequantise, quantise_and_pack

ROWS = 16  # groups are padded to a multiple of this
_GROUPS_PER_READ = 64


class Slab:
    """Groups of equal height, for each sample in the order in which they came.

    `used[b]` counts the groups of sample b; places after them are free. `tokens` int32 [B, H_kv or 1, places, size]
    are token numbers, ascending in each group; without them, `first[b][g]` is the first of a run of numbers.
    """

    def __init__(self, batch: int, size: int):
        self.size = size
        self.used = [0] * batch
        self.first: list[list[int]] = [[] for _ in range(batch)]
        self.data: Groups | None = None  # with free places; `valid` is always there
        self.tokens: Tensor | None = None
        self.partial = False  # whether any group has fillers
        self._view: Groups | None = None
        self._group_bytes: int | None = None

    def append(self, samples: Sequence[int], groups: Groups, first: Sequence[int], tokens: Tensor | None) -> None:
        """Add n groups to each of the samples: groups [b, H_kv, n, ...], tokens [b, H_kv or 1, n, size]."""
        count = groups.key_codes.shape[2]
        self._reserve(max(self.used[b] for b in samples) + count, groups, tokens)
        parts = groups.tensors() | ({} if tokens is None else {"tokens": tokens})
        held = self._held()
        for place, sample in enumerate(samples):
            start = self.used[sample]
            for name, part in parts.items():
                held[name][sample, :, start : start + count] = part[place]
            self.used[sample] += count
            self.first[sample] += [first[place] + self.size * g for g in range(count)]

    def _held(self) -> dict[str, Tensor]:
        tokens = {} if self.tokens is None else {"tokens": self.tokens}
        return (self.data.tensors() if self.data is not None else {}) | tokens

    def _reserve(self, places: int, like: Groups, tokens: Tensor | None) -> None:
        self._view = None
        have = 0 if self.data is None or self.data.valid is None else self.data.valid.shape[2]
        if have >= places:
            return
        if have:
            places += max(2, places // 16)
        batch = len(self.used)

        def grown(name: str, x: Tensor) -> Tensor:
            with torch.inference_mode(False):  # an inference tensor could not be written to outside
                fresh = x.new_zeros(batch, x.shape[1], places, *x.shape[3:])
            if have:
                fresh[:, :, :have] = self._held()[name]
            return fresh

        data = replace(like, **{name: grown(name, x) for name, x in like.tensors().items()})  # type: ignore[arg-type]
        self.tokens = None if tokens is None else grown("tokens", tokens)
        self.data = data

    def view(self) -> Groups | None:
        """The groups in use, for attention; None when there are none."""
        most = max(self.used, default=0)
        if most == 0 or self.data is None:
            return None
        if self._view is None:
            groups = self.data.map(lambda x: x[:, :, :most])
            self._view = groups if self.partial or min(self.used) < most else replace(groups, valid=None)
        return self._view

    def numbers(self) -> Tensor:
        """Token numbers int64 [B, H_kv or 1, groups in use, size], meaningless in fillers and free places."""
        most = max(self.used)
        if self.tokens is not None:
            return self.tokens[:, :, :most].long()
        device = self.data.key_codes.device if self.data is not None else None
        first = torch.tensor([row + [0] * (most - len(row)) for row in self.first], device=device)
        return first[:, None, :, None] + torch.arange(self.size, device=device)

    def keep_below(self, limits: Sequence[int]) -> None:
        """Drop all tokens of sample b with numbers from limits[b] on."""
        if self.data is None or self.data.valid is None or not any(self.used):
            return
        most = max(self.used)
        valid = self.data.valid[:, :, :most]
        limit = torch.tensor(limits, device=valid.device)[:, None, None, None]
        left = (self.numbers() < limit).sum(-1).to(valid.dtype)
        valid.copy_(torch.minimum(valid, left))
        self.used = (valid.amax(1) > 0).sum(1).tolist()
        self.first = [first[:n] for first, n in zip(self.first, self.used)]
        self.partial, self._view = True, None

    def take(self, index: list[int]) -> None:
        """Let sample i become the old sample index[i]."""
        if self.data is not None:
            chosen = torch.tensor(index, device=self.data.key_codes.device)
            self.data = self.data.map(lambda x: x.index_select(0, chosen))
            self.tokens = None if self.tokens is None else self.tokens.index_select(0, chosen)
        self.used, self.first = [self.used[i] for i in index], [list(self.first[i]) for i in index]
        self._view = None

    def group_bytes(self) -> int:
        """Bytes of one group: always the same, and asked for at every step."""
        if self._group_bytes is None:
            held = [x for name, x in self._held().items() if name != "valid"]
            if not held:
                return 0
            self._group_bytes = sum(math.prod((x.shape[1], *x.shape[3:])) * x.element_size() for x in held)
        return self._group_bytes


class Pool:
    """All tokens of one precision.

    Parameters
    ----------
    bits : int
        8, 4 or 2; 16 keeps numbers as they are.
    group : int
        Most tokens to a group, a multiple of 16.
    value_bits : int, optional
        For values, where they take fewer than keys.
    """

    def __init__(self, batch: int, bits: int, group: int, value_bits: int | None = None):
        self.bits, self.group, self.batch = bits, group, batch
        self.value_bits = value_bits if value_bits is not None and value_bits < bits < PLAIN else None
        self.slabs: dict[int, Slab] = {}

    def append(
        self,
        samples: Sequence[int],
        keys: Tensor,
        values: Tensor,
        rows: Tensor,
        first: Sequence[int],
        tokens: Tensor | None = None,
    ) -> None:
        """Quantise tokens of the samples, as many of each, and keep them.

        Parameters
        ----------
        samples : sequence of int
        keys, values : Tensor [b, H_kv, S, D]
            Of these samples.
        rows : int64 Tensor [b, H_kv or 1, m]
            The rows to take, in the order of their token numbers.
        first : sequence of int
            The token number of the first row of each sample; the others follow it, unless `tokens` are given.
        tokens : Tensor [b, H_kv or 1, m], optional
            Token numbers, ascending.
        """
        count, start = rows.shape[2], 0
        while start < count:
            many = (count - start) // self.group
            n = self.group if many else count - start  # whole groups first, then one of the rest
            stop = start + n * max(many, 1)
            self._append(
                samples,
                keys,
                values,
                rows[:, :, start:stop].unflatten(2, (-1, n)),
                [f + start for f in first],
                None if tokens is None else tokens[:, :, start:stop].unflatten(2, (-1, n)),
            )
            start = stop

    def _append(
        self,
        samples: Sequence[int],
        keys: Tensor,
        values: Tensor,
        rows: Tensor,
        first: list[int],
        tokens: Tensor | None,
    ) -> None:
        count = rows.shape[3]
        size = -(-count // ROWS) * ROWS
        slab = self.slabs.setdefault(size, Slab(self.batch, size))
        if size > count:  # repeat the last token
            slab.partial = True
            rows = _filled_up(rows, size)
            tokens = None if tokens is None else _filled_up(tokens, size)
        valid = rows.new_full((len(samples), keys.shape[1], rows.shape[2]), count, dtype=torch.int32)
        groups = quantise_and_pack(keys, values, rows, self.bits, valid, value_bits=self.value_bits)
        slab.append(samples, groups, first, None if tokens is None else tokens.int())

    def groups(self) -> list[Groups]:
        """Everything in the pool, for attention."""
        views = [slab.view() for slab in self.slabs.values()]
        return [view for view in views if view is not None]

    def write_into(self, keys: Tensor, values: Tensor, columns: Tensor) -> None:
        """Dequantise into keys and values [B, H_kv, n + 1, D]; fillers land in the last column.

        columns int64 [B, N]: where token number u of a sample goes.
        """
        for slab in self.slabs.values():
            if (view := slab.view()) is None:
                continue
            numbers = slab.numbers().clamp(max=columns.shape[1] - 1)
            shape = view.key_codes.shape[:4]
            goal = columns[:, None].expand(-1, numbers.shape[1], -1).gather(2, numbers.flatten(2))
            goal = goal.unflatten(2, numbers.shape[2:]).expand(shape)
            if view.valid is not None:
                filler = torch.arange(slab.size, device=goal.device) >= view.valid[..., None]
                goal = goal.masked_fill(filler, keys.shape[2] - 1)
            for g in range(0, shape[2], _GROUPS_PER_READ):
                some = view.map(lambda x, g=g: x[:, :, g : g + _GROUPS_PER_READ])  # type: ignore[misc]
                index = goal[:, :, g : g + _GROUPS_PER_READ].flatten(2)[..., None]
                for out, new in zip((keys, values), dequantise(some, keys.dtype)):
                    out.scatter_(2, index.expand(-1, -1, -1, out.shape[3]), new.flatten(2, 3))

    def keep_below(self, limits: Sequence[int]) -> None:
        """Drop all tokens of sample b with numbers from limits[b] on."""
        for slab in self.slabs.values():
            slab.keep_below(limits)

    def take(self, index: list[int]) -> None:
        """Let sample i become the old sample index[i]."""
        self.batch = len(index)
        for slab in self.slabs.values():
            slab.take(index)

    def nbytes(self) -> int:
        """Bytes of the groups in use: codes, parameters and, where tokens stand out of order, their numbers.

        (Not counted: 4 bytes a group and head that tell how many of its rows are in use.)
        """
        return sum(slab.group_bytes() * sum(slab.used) for slab in self.slabs.values())

    def label(self, dtype: torch.dtype) -> str:
        """What reports call this precision."""
        if self.bits == PLAIN:
            return str(dtype).removeprefix("torch.")
        return f"{self.bits} bits" if self.value_bits is None else f"{self.bits} (values {self.value_bits}) bits"


def _filled_up(x: Tensor, size: int) -> Tensor:
    """The last dimension lengthened to `size` with copies of its last entry."""
    return torch.cat([x, x[..., -1:].expand(*x.shape[:-1], size - x.shape[-1])], -1)
