"""Attention alone, timed: dense SDPA against plans and other kernels, on random queries, keys and values.

Rounds are interleaved: each times every side once, in an order that changes from round to round, and gives each side
one ratio to the dense time of the same round. Dense attention runs a second time as the control: what its ratio differs
from 1 is the noise floor.

For every side: ratio = time / dense time; kept share = key blocks read / causal key blocks; efficiency = kept share /
ratio, so 1 where time falls as much as reading does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from infer_patch.errors import PatchError
from infer_patch.evals.attention_rounds import CONTROL, DENSE, Rounds
from infer_patch.evals.attention_sides import PlanSide, llama_parts
from infer_patch.evals.budgets import always_sparse, budget_for_share, with_budget
from infer_patch.evals.stopwatch import Stopwatch
from infer_patch.evals.verdict import megabytes
from infer_patch.plan import Plan
from infer_patch.progress import Progress

NEVER = "never within the measured lengths"


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Parameters
    ----------
    phase : {"prefill", "decode"}
        Prefill: T = S = length. Decode: one new token against `length` keys and more.
    lengths : tuple of int
    heads, kv_heads, head_dim, batch : int
        Shapes: q [batch, heads, T, head_dim], k and v [batch, kv_heads, S, head_dim].
    layers : int
        Decoder layers of the model that methods are told of; `layer` is the one they play (default: a middle one).
    rounds : int
        After one that warms up.
    steps : int
        Consecutive decode steps a round times together, so that what is refreshed now and then counts with its share.
    budget : int, optional
        Tokens that every plan reads per query block (see `budgets`); without it plans run as they are.
    keep : float, optional
        Instead: share of the causal key blocks to keep, from which each length gets its budget.
    force : bool
        Run sparse where methods would run dense because sparse cannot win.
    flex : bool
        Time flex_attention over the lists of each plan too (prefill). It compiles for each length.
    with_cache : bool
        Decode: time the cache's update with the attention. Dense attention then has transformers' growing cache, and
        transformers' quantised caches join where their packages are installed.
    clock : {"wall", "cpu"}
    seed : int
    """

    phase: str
    lengths: tuple[int, ...] = (2048, 8192, 32768)
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    batch: int = 1
    layers: int = 32
    layer: int | None = None
    rounds: int = 9
    steps: int = 16
    budget: int | None = None
    keep: float | None = None
    force: bool = False
    flex: bool = False
    with_cache: bool = False
    clock: str = "wall"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.phase not in ("prefill", "decode"):
            raise PatchError(f"phase must be prefill or decode, got {self.phase!r}")
        if not self.lengths or min(self.lengths) < 2 or len(set(self.lengths)) < len(self.lengths):
            raise PatchError(f"lengths must be one or more different numbers of tokens from 2 up, got {self.lengths}")
        if min(self.rounds, self.steps, self.batch) < 1:
            raise PatchError(f"need 1 or more, got rounds {self.rounds}, steps {self.steps}, batch {self.batch}")
        if self.with_cache and self.phase != "decode":
            raise PatchError("with_cache is for decode: a prompt's keys are written once, whatever the cache.")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise PatchError(f"keep must be a share above 0 and at most 1, got {self.keep}")
        if self.keep is not None and self.budget is not None:
            raise PatchError("give a budget in tokens or a share to keep, not both.")

    def plan_at(self, plan: Plan, length: int) -> Plan:
        """The plan as it runs at this length."""
        budget = self.budget
        if self.keep is not None:
            budget = budget_for_share(self.keep, length if self.phase == "prefill" else 1, length)
        plan = plan if budget is None else with_budget(plan, budget, clustered=False)
        return always_sparse(plan) if self.force else plan


@torch.no_grad()
def measure(
    plans: Sequence[Plan],
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype,
    on_round: Progress | None = None,
) -> dict[str, Any]:
    """{"results": one entry per length and side, "skipped": sides that could not run and why, "starts_to_win"}.

    Raises
    ------
    PatchError
        Before anything is timed: for shapes, budgets or plans that do not go together.
    """
    watch = Stopwatch(device, settings.clock)
    context = max(settings.lengths) + settings.steps + 1
    parts = llama_parts(settings.heads, settings.kv_heads, settings.head_dim, settings.layers, context)
    names = [plan.name for plan in plans]
    if len({DENSE, CONTROL, *names}) < len(names) + 2:
        raise PatchError(f"plans need different names, none of them {DENSE!r} or {CONTROL!r}; got {', '.join(names)}")
    pending = {
        length: [PlanSide(settings.plan_at(plan, length), parts, watch, settings.layer) for plan in plans]
        for length in settings.lengths
    }
    results: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    for number, length in enumerate(settings.lengths):
        bench = Rounds(settings, length, pending.pop(length), watch, device, dtype)
        skipped += [{"length": length, "side": side, "reason": reason} for side, reason in bench.skipped.items()]
        for turn in range(settings.rounds + 1):
            if on_round is not None:
                done = number * (settings.rounds + 1) + turn
                on_round(done, len(settings.lengths) * (settings.rounds + 1), f"{settings.phase}, {length:,} tokens")
            bench.round(turn)
        results += bench.results()
    return {"results": results, "skipped": skipped, "starts_to_win": starts_to_win(results)}


def starts_to_win(results: Sequence[dict[str, Any]]) -> dict[str, int | None]:
    """For each plan the shortest measured length from which on its median ratio stays below 1; None if there is none.

    Lengths at which a plan ran dense do not count as won.
    """
    found: dict[str, int | None] = {}
    for name in dict.fromkeys(r["side"] for r in results if r["kind"] == "plan"):
        found[name] = None
        for result in sorted((r for r in results if r["side"] == name), key=lambda r: -r["length"]):
            if result["ran_dense"] is not None or result["ratio"]["median"] >= 1:
                break
            found[name] = result["length"]
    return found


def smaller_caches(results: Sequence[dict[str, Any]]) -> list[str]:
    """Where a plan's cache layer holds fewer bytes than the keys and values it was given."""
    whole = {r["length"]: r["cache_bytes"] for r in results if r["side"] == DENSE}
    return [
        f"{r['side']} at {r['length']:,} tokens: a cache layer of {megabytes(r['cache_bytes'])} instead of "
        f"{megabytes(whole[r['length']])}."
        for r in results
        if r["kind"] == "plan" and r["cache_bytes"] < 0.95 * whole[r["length"]]
    ]


def warnings_of(results: Sequence[dict[str, Any]]) -> list[str]:
    """Where a plan is slower than dense attention."""
    return [
        f"{r['side']} is slower than dense at {r['length']:,} tokens ({r['ratio']['median']:.2f} times its time)"
        for r in results
        if r["kind"] == "plan" and r["ran_dense"] is None and r["ratio"]["median"] > 1
    ]
