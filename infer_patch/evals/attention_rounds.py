"""Rounds of `bench prefill` and `bench decode` at one length: every side once a round, side by side."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from infer_patch.evals.attention_sides import (
    Dense,
    Flex,
    PlanSide,
    Side,
    flash_attn,
    folded_sdpa,
    sdpa,
    why_no_flash_attn,
)
from infer_patch.evals.cost import MemoryMeter, turned
from infer_patch.evals.overhead import spread, verdict
from infer_patch.evals.stopwatch import Stopwatch
from infer_patch.evals.transformers_caches import CacheSide, quantised_sides
from infer_patch.plan import Plan

if TYPE_CHECKING:
    from infer_patch.evals.attention_bench import Settings

DENSE, CONTROL = "dense", "dense again"


class Rounds:
    """All sides at one length: `round` times each once, `results` sums up."""

    def __init__(
        self,
        settings: Settings,
        length: int,
        plans: list[PlanSide],
        watch: Stopwatch,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.settings, self.length, self.watch, self.device = settings, length, watch, device
        self.decode = settings.phase == "decode"
        rows = length + settings.steps + 1 if self.decode else length
        queries = settings.steps + 1 if self.decode else length
        generator = torch.Generator().manual_seed(settings.seed)

        def random(heads: int, count: int) -> Tensor:
            return torch.randn(settings.batch, heads, count, settings.head_dim, generator=generator).to(device, dtype)

        self.q = random(settings.heads, queries)
        self.k, self.v = random(settings.kv_heads, rows), random(settings.kv_heads, rows)
        self.skipped: dict[str, str] = {}
        self.sides: list[Side] = [Dense(DENSE, sdpa), Dense(CONTROL, sdpa, "control")]
        if settings.with_cache:
            self.sides = [CacheSide(DENSE), CacheSide(CONTROL, kind="control")]
        for plan in plans:
            self._add(plan, torch.OutOfMemoryError)
        if settings.with_cache:
            quantised, self.skipped = quantised_sides()
            for side in quantised:
                self._add(side)
        elif self.decode:
            self.sides.append(Dense("dense, folded", folded_sdpa))
        reason = why_no_flash_attn(self.q)
        if reason is None:
            self._add(Dense("flash-attn", flash_attn))
        else:
            self.skipped["flash-attn"] = reason
        if settings.flex and not self.decode:
            for plan in [side for side in self.sides if isinstance(side, PlanSide)]:
                self._add(Flex(plan))  # over the lists chosen in the attempt above
        else:
            self.skipped["flex_attention"] = (
                "every step has another length, and each would be compiled" if self.decode else "ask for it with --flex"
            )
        self.times: dict[str, list[float]] = {side.name: [] for side in self.sides}
        self.selection: dict[str, list[float]] = {side.name: [] for side in self.sides}
        self.first: dict[str, list[float]] = {side.name: [] for side in self.sides}

    def _add(self, side: Side, expected: type[Exception] = Exception) -> None:
        """Take in a side if it runs. Errors of foreign compilers and kernels have no common class; what a plan raises,
        other than for memory, is a mistake that must show."""
        try:
            self._begin(side)
            if self.decode:
                side.extend(self.k, self.v, self.length + 1)
            side.attend(self.q[:, :, :1] if self.decode else self.q)
        except expected as error:
            self.skipped[side.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            self.sides.append(side)

    def _begin(self, side: Side) -> None:
        side.start()
        side.extend(self.k, self.v, self.length)

    def round(self, turn: int) -> None:
        """Time every side once; turn 0 warms up."""
        order = turned(self.sides, turn)
        for side in order:
            self._begin(side)
        seconds = self._decode(order) if self.decode else self._prefill(order)
        for side in self.sides if turn else ():
            for held, value in zip((self.times, self.selection, self.first), seconds[side.name]):
                if value is not None:
                    held[side.name].append(value)

    def _prefill(self, order: list[Side]) -> dict[str, tuple[float | None, ...]]:
        return {side.name: (*self._timed(side, self.q), None) for side in order}

    def _decode(self, order: list[Side]) -> dict[str, tuple[float | None, ...]]:
        """The first step, which may build what later ones refresh, apart; the others summed, side by side."""
        steps: dict[str, list[tuple[float, float | None]]] = {side.name: [] for side in order}
        for step in range(self.settings.steps + 1):
            for side in turned(order, step):
                steps[side.name].append(self._timed(side, self.q[:, :, step : step + 1], self.length + step + 1))
        found: dict[str, tuple[float | None, ...]] = {}
        for name, ((first, _), *later) in steps.items():
            chosen = [selection for _, selection in later if selection is not None]
            found[name] = (sum(total for total, _ in later), sum(chosen) if chosen else None, first)
        return found

    def _timed(self, side: Side, q: Tensor, keys: int | None = None) -> tuple[float, float | None]:
        """Seconds in all, and of them for the choice of blocks; first the cache grows to so many keys."""
        if isinstance(side, PlanSide):
            side.selection = []
        if keys is not None and not self.settings.with_cache:
            side.extend(self.k, self.v, keys)
        self.watch.settle()
        begin = self.watch.mark()
        if keys is not None and self.settings.with_cache:
            side.extend(self.k, self.v, keys)
        side.attend(q)
        end = self.watch.mark()
        seconds = self.watch.seconds(begin, end)
        if not isinstance(side, PlanSide) or not side.selection:
            return seconds, None
        return seconds, sum(self.watch.seconds(*marks) for marks in side.selection)

    def results(self) -> list[dict[str, Any]]:
        scale = 1000 / (self.settings.steps if self.decode else 1)
        control = _ratios(self.times[CONTROL], self.times[DENSE])
        results = []
        for side in self.sides:
            seconds, chosen, first = (held[side.name] for held in (self.times, self.selection, self.first))
            ratios = _ratios(seconds, self.times[DENSE])
            ratio = spread(ratios, 4)
            kept, reason, peak = self._kept(side)  # the last call of a side: what it holds is looked at next
            results.append(
                {
                    "length": self.length,
                    "side": side.name,
                    "kind": side.kind,
                    "plan": Plan(tuple(m for m, _, _ in side.engine.methods), side.name).to_dict()
                    if isinstance(side, PlanSide)
                    else None,
                    "ran_dense": reason,
                    "milliseconds": spread([scale * s for s in seconds], 4),
                    "selection_ms": _median(chosen, scale),
                    "attention_ms": _median([t - c for t, c in zip(seconds, chosen)], scale),
                    "first_step_ms": _median(first, 1000),
                    "ratio": ratio,
                    "kept_share": kept,
                    "efficiency": None if kept is None else round(kept / ratio["median"], 3),
                    "peak_extra_bytes": peak,
                    "cache_bytes": side.cache_bytes(),
                    "verdict": None if side.name in (DENSE, CONTROL) else verdict(ratios, control, None),
                    "gb_per_s": self._bandwidth(kept, statistics.median(seconds)),
                    "raw_milliseconds": [round(scale * s, 4) for s in seconds],
                }
            )
        return results

    def _bandwidth(self, kept: float | None, seconds: float) -> float | None:
        """Decode: gigabytes of keys and values read per second, to hold against the device's memory bandwidth."""
        if not self.decode or kept is None:
            return None
        size = self.k[:, :, : self.length].numel() + self.v[:, :, : self.length].numel()
        return round(kept * size * self.k.element_size() * self.settings.steps / seconds / 1e9, 3)

    def _kept(self, side: Side) -> tuple[float | None, str | None, int | None]:
        """Share of causal blocks read, why it ran dense if it did, and peak memory: of one more call."""
        self._begin(side)
        q = self.q
        if self.decode:
            side.extend(self.k, self.v, self.length + 1)
            side.attend(q[:, :, :1])  # after it a quantised cache is packed
            side.extend(self.k, self.v, self.length + 2)
            q = q[:, :, 1:2]
            if isinstance(side, PlanSide):
                side.choice = None
        self.watch.settle()
        with MemoryMeter(self.device) as memory:
            side.attend(q)
            self.watch.settle()
        if isinstance(side, Flex):
            return side.kept_share, None, memory.peak_bytes
        if not isinstance(side, PlanSide):
            return None if side.kind == "transformers" else 1.0, None, memory.peak_bytes
        reason = side.choice if isinstance(side.choice, str) else None
        return 1.0 if reason else side.kept_share(), reason, memory.peak_bytes


def _ratios(seconds: list[float], dense: list[float]) -> list[float]:
    return [s / d for s, d in zip(seconds, dense)]


def _median(seconds: list[float], scale: float) -> float | None:
    return round(scale * statistics.median(seconds), 4) if seconds else None
