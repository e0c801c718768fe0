"""Attention spans that differ from head to head: how long each is.

A span of S tokens is kept as a sink part at the start of the text and a window at its end, both in whole blocks. The
window of query block i holds the blocks i - w + 1 to i, its own included, so a token reads between
(w - 1) * block + 1 and w * block recent tokens. The same blocks are read with and without a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_SET_AT = "spans were set at this length"


@dataclass(frozen=True)
class Horizon:
    """How long a text is taken to become: the N that spans are worked out for.

    Parameters
    ----------
    new_tokens : int
        Added to the prompt that fills the cache. When a text outgrows the sum, N is set again, in the same way.
    length : int, optional
        A fixed N instead.
    """

    new_tokens: int = 1024
    length: int | None = None

    def of(self, notes: dict[Any, Any], total: int, real: int) -> int:
        """N of a sample.

        Parameters
        ----------
        notes : dict
            Of the cache layer; remembers when N was set.
        total, real : int
            Columns of the batch so far and real tokens of the sample among them, both with this call's.
        """
        if self.length is not None:
            return self.length
        if total > notes.get(_SET_AT, -1) + self.new_tokens or _SET_AT not in notes:
            notes[_SET_AT] = total
        return real - total + int(notes[_SET_AT]) + self.new_tokens


def window_blocks(alpha: float, beta: float, length: int, sinks: int = 64, block: int = 64) -> int:
    """Blocks in the window of a head with the span alpha + beta N, N = length, for cache and prefill alike.

    The span is cut to whole tokens, to at most N and at least `sinks + block`, and rounded up to blocks; the sinks are
    part of it.
    """
    span = max(min(int(alpha + beta * length), length), sinks + block)
    return -(-span // block) - sinks // block
