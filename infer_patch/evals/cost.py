"""What a run costs: time to the first token, time per token after it, peak memory, bytes of the cache.

Runs are interleaved, with an order that rotates, so that a slow spell of the machine hits all plans alike. Each figure
comes with its 20th and 80th percentile; a difference smaller than their overlap is not called one.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from infer_patch.availability import is_available
from infer_patch.evals.schema import Cost, Interval

SAME_LENGTH = 1.1  # prompts whose lengths differ by no more than this factor are summed up together
MANY = 10  # measurements from which on percentiles are steady enough to compare
_SAMPLE_EVERY_S = 0.01

T = TypeVar("T")


@dataclass(frozen=True)
class Measurement:
    """One timed run of one plan on one prompt."""

    plan: str
    prompt_tokens: int
    output_tokens: int
    first_token_s: float
    per_token_s: float | None
    peak_bytes: int | None
    cache_bytes: int


class MemoryMeter:
    """Peak memory inside a `with` block above what was in use at its start.

    On a GPU what PyTorch allocated. On a CPU the growth of the process, looked at every 10 ms: a rough figure, because
    memory that was freed may still count and may be used again. None where psutil is not installed.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._thread: threading.Thread | None = None
        self._done = threading.Event()
        self._process: Any = None
        self.peak_bytes: int | None = None

    def __enter__(self) -> MemoryMeter:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
        elif is_available("psutil"):
            import psutil

            _return_free_memory()
            self._process = psutil.Process()
            self._start = self._peak = self._process.memory_info().rss
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device) - self._start
        elif self._thread is not None:
            self._done.set()
            self._thread.join()
            self.peak_bytes = self._peak - self._start

    def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, self._process.memory_info().rss)
            if self._done.wait(_SAMPLE_EVERY_S):
                return


def _return_free_memory() -> None:
    """Ask glibc to give freed memory back to the system; it would hide what the next run needs."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def rotated(names: Sequence[T], turn: int) -> list[T]:
    """The same names, starting with another one each turn."""
    turn %= len(names)
    return [*names[turn:], *names[:turn]]


def turned(names: Sequence[T], turn: int) -> list[T]:
    """Another order each turn, with other neighbours too: what ran before leaves its traces in the caches."""
    order = rotated(names, turn)
    return order[::-1] if turn % 2 else order


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the sorted values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def interval(values: Sequence[float]) -> Interval | None:
    """Median, percentiles and range; None for no values."""
    if not values:
        return None
    low, middle, high = (quantile(values, share) for share in (0.2, 0.5, 0.8))
    return {"median": middle, "p20": low, "p80": high, "low": min(values), "high": max(values), "n": len(values)}


def overlap(a: Interval, b: Interval) -> bool:
    """Whether two spans touch: then no difference was measured.

    Spans go from p20 to p80, and over all values where there are few: of two equal sets of three, p20 to p80 lie apart
    every fourth time, all values every tenth.
    """
    if min(a["n"], b["n"]) < MANY:
        return a["low"] <= b["high"] and b["low"] <= a["high"]
    return a["p20"] <= b["p80"] and b["p20"] <= a["p80"]


def costs(measurements: Sequence[Measurement], plans: Sequence[str], rough: bool) -> dict[str, list[Cost]]:
    """For each plan one entry per prompt length, longest first; the first of `plans` is what ratios refer to."""
    table: dict[str, list[Cost]] = {plan: [] for plan in plans}
    for group in _by_length(measurements):
        reference: Cost | None = None
        for plan in plans:
            own = [m for m in group if m.plan == plan]
            if own:
                cost = _cost(own, reference, rough)
                reference = reference or cost
                table[plan].append(cost)
    return table


def _cost(own: Sequence[Measurement], reference: Cost | None, rough: bool) -> Cost:
    first = interval([m.first_token_s for m in own])
    per_token = interval([m.per_token_s for m in own if m.per_token_s is not None])
    if first is None:
        raise ValueError("no measurements to sum up")
    return {
        "prompt_tokens": round(statistics.median(m.prompt_tokens for m in own)),
        "output_tokens": round(statistics.median(m.output_tokens for m in own)),
        "first_token_s": first,
        "per_token_s": per_token,
        "first_token_ratio": _ratio(first, reference and reference["first_token_s"]),
        "per_token_ratio": _ratio(per_token, reference and reference["per_token_s"]),
        "peak_bytes": interval([m.peak_bytes for m in own if m.peak_bytes is not None]),
        "peak_is_rough": rough,
        "cache_bytes": round(statistics.median(m.cache_bytes for m in own)),
    }


def _ratio(own: Interval | None, reference: Interval | None) -> float | None:
    if own is None or reference is None or reference["median"] == 0:
        return None
    return own["median"] / reference["median"]


def _by_length(measurements: Sequence[Measurement]) -> list[list[Measurement]]:
    groups: list[list[Measurement]] = []
    for m in sorted(measurements, key=lambda m: -m.prompt_tokens):
        if groups and groups[-1][0].prompt_tokens <= SAME_LENGTH * m.prompt_tokens:
            groups[-1].append(m)
        else:
            groups.append([m])
    return groups
