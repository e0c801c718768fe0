"""What a packed cache layer knows about its tokens, and the rows it keeps in full precision.

Tokens of a sample are numbered 0, 1, ... as they come in; padding and dropped tokens get no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infer_patch.tokens import INVALID, Reduction, Tokens

_ROOM = 64  # rows a buffer has to spare when it is made anew


@dataclass(frozen=True)
class NewTokens:
    """The tokens that one call brings to a layer.

    Parameters
    ----------
    rows : int
        Rows of the call, padding included.
    length : int
        By how many tokens the text grows (more than rows where tokens were dropped).
    real : bool Tensor [B, rows], optional
        False in rows of padding; None: there are none.
    counts : tuple of int
        Real rows of each sample.
    logical : int64 Tensor [B, rows], optional
        Logical index of each row, `INVALID` for padding; None: the rows are the next tokens of the text.
    """

    rows: int
    length: int
    real: Tensor | None
    counts: tuple[int, ...]
    logical: Tensor | None

    @classmethod
    def of(cls, tokens: Tokens, reduction: Reduction | None) -> NewTokens:
        """Those of a forward call; what costs a wait for the device is found out once for all its layers."""
        key = ("new tokens", id(reduction))
        if key not in tokens.shared:
            tokens.shared[key] = cls._of(tokens, reduction), reduction
        return tokens.shared[key][0]

    @classmethod
    def _of(cls, tokens: Tokens, reduction: Reduction | None) -> NewTokens:
        if reduction is not None:
            counts = tuple(reduction.rows - start for start in reduction.start)
            logical = reduction.positions(tokens.past)
            return cls(reduction.rows, reduction.length, reduction.filled, counts, logical)
        return cls.padded(tokens.is_new, tokens.past, tokens.batch, tokens.length)

    @classmethod
    def padded(cls, real: Tensor | None, past: int, batch: int, length: int) -> NewTokens:
        """`length` tokens after `past`, of which the ones marked in bool [B, length] are real."""
        if real is None or bool(real.all()):
            return cls(length, length, None, (length,) * batch, None)
        logical = torch.arange(past, past + length, device=real.device).expand(batch, -1).masked_fill(~real, INVALID)
        return cls(length, length, real, tuple(real.sum(1).tolist()), logical)


class TokenNumbers:
    """Which token of the text each numbered token is.

    `counts[b]` tokens of sample b have numbers. The first `_known_counts[b]` of them are listed in `_known`; those
    after them are simply the newest of the text. Unless something was padded or dropped, nothing is listed.
    """

    def __init__(self, batch: int):
        self.length = 0
        self.counts = [0] * batch
        self.dropped = False  # whether any token of the text has no number although it is not padding
        self._known: Tensor | None = None  # int64 [B, N], ascending, INVALID at the end
        self._known_counts = [0] * batch

    @property
    def plain(self) -> bool:
        """Whether token number u is token u of the text, in every sample."""
        return self._known is None

    def append(self, new: NewTokens, device: torch.device) -> None:
        if new.logical is not None:
            old = self.logical(device)
            self._known = torch.cat([old, new.logical.to(device)], 1).sort(1).values
        self.counts = [count + more for count, more in zip(self.counts, new.counts)]
        self.length += new.length
        if new.logical is not None and self._known is not None:
            self._known_counts = list(self.counts)
            self._known = self._known[:, : max(self.counts)]
            self.dropped |= new.real is None or new.rows < new.length

    def drop(self, sample: int, numbers: Tensor) -> None:
        """Take these tokens of a sample out: the ones after them move up."""
        if not len(numbers):
            return
        listed = self.logical(numbers.device).clone()
        listed[sample, numbers] = INVALID
        self.counts[sample] -= len(numbers)
        self._known, self.dropped = listed.sort(1).values[:, : max(self.counts)], True
        self._known_counts = list(self.counts)

    def logical(self, device: torch.device) -> Tensor:
        """Logical index of every numbered token, int64 [B, max(counts)], `INVALID` at the end of shorter samples."""
        most = max(self.counts)
        number = torch.arange(most, device=device).expand(len(self.counts), -1)
        if self._known is None:
            return number
        counts, known = (torch.tensor(x, device=device)[:, None] for x in (self.counts, self._known_counts))
        listed = torch.full_like(number, INVALID)
        listed[:, : self._known.shape[1]] = self._known[:, :most]
        newest = torch.where(number < counts, number + (self.length - counts), INVALID)
        return torch.where(number < known, listed, newest)

    def remove_newest(self, length: int, device: torch.device) -> None:
        """Forget the newest `length` tokens of the text."""
        kept = (self.logical(device) < self.length - length).sum(1).tolist()
        self.length -= length
        self.counts = kept
        self._known_counts = [min(known, count) for known, count in zip(self._known_counts, kept)]

    def take(self, index: list[int], device: torch.device) -> None:
        """Let sample i become the old sample index[i]."""
        self.counts, self._known_counts = ([x[i] for i in index] for x in (self.counts, self._known_counts))
        if self._known is not None:
            self._known = self._known.index_select(0, torch.tensor(index, device=device))


class Tail:
    """Rows in full precision, for each sample its first `filled[b]`: sinks first, then the newest tokens, in order.

    `keys` and `values` [B, H_kv, capacity, D]. A decode step writes one row and copies nothing.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        """Empty, for samples, heads and a dtype like these [B, H_kv, n, D]."""
        self.keys, self.values = keys[:, :, :0].detach(), values[:, :, :0].detach()
        self.filled = [0] * keys.shape[0]
        self._lent = True  # buffers are not ours to write to

    def append(self, keys: Tensor, values: Tensor, new: NewTokens) -> None:
        """Add the real ones of the rows [B, H_kv, T, D]."""
        keys, values, filled = keys.detach(), values.detach(), self.filled
        self.filled = [have + more for have, more in zip(filled, new.counts)]
        if new.real is None and max(filled) == 0 and new.rows > _ROOM:
            self.keys, self.values, self._lent = keys, values, True  # most of a prompt is packed before long
            return
        self._reserve(max(self.filled))
        for buffer, rows in ((self.keys, keys), (self.values, values)):
            if new.real is None and min(filled) == max(filled):
                buffer[:, :, filled[0] : self.filled[0]] = rows
                continue
            for sample, (start, stop) in enumerate(zip(filled, self.filled)):
                real = slice(None) if new.real is None else new.real[sample].to(rows.device)
                buffer[sample, :, start:stop] = rows[sample, :, real]

    def _reserve(self, rows: int) -> None:
        if not self._lent and self.keys.shape[2] >= rows:
            return
        with torch.inference_mode(False):  # an inference tensor could not be written to outside
            fresh = [x.new_empty(*x.shape[:2], rows + _ROOM, x.shape[3]) for x in (self.keys, self.values)]
        have = min(self.keys.shape[2], rows)
        for buffer, old in zip(fresh, (self.keys, self.values)):
            buffer[:, :, :have] = old[:, :, :have]
            buffer[:, :, have:] = 0  # rows of shorter samples are multiplied, though never seen
        (self.keys, self.values), self._lent = fresh, False

    def rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H_kv, max(filled), D]."""
        most = max(self.filled)
        return self.keys[:, :, :most], self.values[:, :, :most]

    def drop(self, start: int, counts: Sequence[int], room: int = 0) -> None:
        """Take out counts[b] rows of sample b from row `start` on; the buffers shrink to what is left, and `room`."""
        left = [have - gone for have, gone in zip(self.filled, counts)]
        most = max(left)
        row = torch.arange(most, device=self.keys.device)
        gone = torch.tensor(list(counts), device=row.device)[:, None]
        index = torch.where(row < start, row, row + gone).clamp(max=max(self.keys.shape[2] - 1, 0))
        self.keys, self.values = (
            x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
            for x in (self.keys, self.values)
        )
        self.filled, self._lent = left, True
        self._reserve(most + room)

    def settle(self) -> None:
        """Own the rows, so that nothing of the call that brought them is held."""
        if self._lent:
            self._reserve(max(self.filled))

    def visible(self, new: NewTokens) -> Tensor | None:
        """Which rows each query of the call that brought the newest ones sees, bool [B, T, r]; None: all."""
        if new.rows == 1 and new.real is None and min(self.filled) == max(self.filled):
            return None
        device = self.keys.device
        rank = torch.arange(1, new.rows + 1, device=device) if new.real is None else new.real.to(device).cumsum(1)
        before = torch.tensor([have - more for have, more in zip(self.filled, new.counts)], device=device)
        limit = (before[:, None] + rank)[..., None]
        return torch.arange(max(self.filled), device=device) < limit

    def take(self, index: list[int]) -> None:
        """Let sample i become the old sample index[i]."""
        chosen = torch.tensor(index, device=self.keys.device)
        self.keys, self.values = self.keys.index_select(0, chosen), self.values.index_select(0, chosen)
        self.filled, self._lent = [self.filled[i] for i in index], torch.is_inference_mode_enabled()

    def nbytes(self) -> int:
        """Bytes of the rows in use."""
        return sum(self.filled) * sum(x.shape[1] * x.shape[3] * x.element_size() for x in (self.keys, self.values))
