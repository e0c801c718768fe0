"""Selecting methods at equal budgets: tokens read per block of 64 queries, whatever a method calls its options.

A budget counts everything a query block reads, sinks and window included, in whole blocks. Two methods find single keys
and read the blocks around them: how many that are depends on how the keys cluster, so their options are set to what
comes out near the budget on prose. On random tensors nothing clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from infer_patch.errors import PlanError
from infer_patch.method import Method
from infer_patch.plan import Plan, presets

BLOCK = 64


def _sink_window(method: Any, blocks: int, clustered: bool) -> Method:
    return replace(method, window=(blocks - _blocks(method.sinks) - 1) * BLOCK + 1)


def _envelope(method: Any, blocks: int, clustered: bool) -> Method:
    return replace(method, budget=blocks * BLOCK)


def _vertical_slash(method: Any, blocks: int, clustered: bool) -> Method:
    """First columns and nearest diagonals stay. Of prose, 6 more columns and 2 more diagonals take about one block
    (the demo model at 4,096 and 8,000 tokens); where nothing clusters, a column takes one and a diagonal two."""
    free = blocks - _blocks(method.first) - _blocks(method.nearest - 1) - 1
    columns, diagonals = (6 * free, 2 * free) if clustered else (free - 2 * (free // 4), free // 4)
    return replace(method, columns=method.first + columns, diagonals=method.nearest + diagonals)


def _hip(method: Any, blocks: int, clustered: bool) -> Method:
    """Sinks get at most an eighth, the window three eighths, pieces the rest: as many as touch so many blocks of prose
    (by trial on the demo model, which lies between pieces side by side and pieces apart). As many where nothing
    clusters, though more is read there: fewer would make the search too fast."""
    sinks = min(_blocks(method.sinks), max(1, blocks // 8))
    window = min(_blocks(method.window - 1) + 1, max(2, 3 * blocks // 8))
    method.require(blocks > sinks + window, f"sinks and window alone take {(sinks + window) * BLOCK} tokens")
    method = replace(
        method,
        sinks=min(method.sinks, sinks * BLOCK),
        window=min(method.window, (window - 1) * BLOCK + 1),
        refresh=min(method.refresh, (window - 2) * BLOCK + 1),
        stage_refresh=tuple(min(n, (window - 2) * BLOCK + 1) for n in method.stage_refresh),
    )
    found, piece = method.found
    tokens = (blocks - sinks - window) * (BLOCK if piece == BLOCK else 0.6 * math.sqrt(BLOCK * piece))
    if method.variant == "tree":
        return replace(method, budget=_multiple(tokens, piece))
    keep: list[int] = []
    for before, chunk in reversed([*zip(method.keep, method.chunks)]):
        least = -(-keep[0] // chunk) * chunk if keep else 0  # no stage keeps less than the one behind it
        keep.insert(0, max(_multiple(tokens * before / found, chunk), least))
    return replace(method, keep=tuple(keep))


# How a method is told to read so many blocks per query block: (method, blocks, whether keys cluster as in text).
BUDGETS: dict[str, Callable[[Any, int, bool], Method]] = {
    "envelope": _envelope,
    "hip": _hip,
    "sink_window": _sink_window,
    "vertical_slash": _vertical_slash,
}


def with_budget(plan: Plan, tokens: int, clustered: bool = True) -> Plan:
    """The plan with every selecting method set to read about `tokens` (a multiple of 64) per query block.

    Raises
    ------
    PlanError
        For a budget that is no multiple of 64 or that a method cannot keep to, and for a method without an entry in
        `BUDGETS`.
    """
    if tokens < BLOCK or tokens % BLOCK:
        raise PlanError(f"a budget is a multiple of {BLOCK} tokens, got {tokens}")
    changed: list[Method] = []
    for method in plan:
        if "select" not in method.active_ports():
            changed.append(method)
        elif method.name in BUDGETS:
            try:
                changed.append(BUDGETS[method.name](method, tokens // BLOCK, clustered))
            except PlanError as error:
                raise PlanError(f"{plan.name} cannot keep to a budget of {tokens} tokens: {error}") from error
        else:
            raise PlanError(
                f"{plan.name}: it is not known which option of {method.name} is its budget; methods with one: "
                f"{', '.join(BUDGETS)}. Give the plan without a budget."
            )
    return Plan(tuple(changed), name=plan.name)


def always_sparse(plan: Plan) -> Plan:
    """The plan without what makes it run dense where sparse cannot win, or in the first layers."""
    changed = []
    for method in plan:
        off: dict[str, Any] = {"dense_below": 0, "dense_above": 1.0, "max_share": 1.0}
        if method.layers is None:
            off["dense_layers"] = 0
        present = {f.name for f in fields(method)}
        changed.append(replace(method, **{name: value for name, value in off.items() if name in present}))
    return Plan(tuple(changed), name=plan.name)


def default_plans() -> list[str]:
    """Presets that do nothing but select, at a budget that can be set."""
    found = []
    for name in presets():
        plan = Plan.preset(name)
        if plan.methods and all(m.name in BUDGETS and m.active_ports() == ("select",) for m in plan):
            found.append(name)
    return found


def budget_for_share(share: float, queries: int, keys: int) -> int:
    """Tokens per query block at which as near to `share` of the causal key blocks is read as may be; at least 256."""
    first, last = (keys - queries) // BLOCK, -(-keys // BLOCK)

    def causal(most: int) -> int:
        """Blocks read when no query block reads more than `most`."""
        growing = min(max(most, first), last)  # query blocks up to here read all they see
        return (growing * (growing + 1) - first * (first + 1)) // 2 + most * (last - growing)

    blocks = range(min(4, last), last + 1)
    return min(blocks, key=lambda most: abs(causal(most) / causal(last) - share)) * BLOCK


def _blocks(tokens: int) -> int:
    """Whole blocks that hold so many tokens."""
    return -(-tokens // BLOCK)


def _multiple(tokens: float, of: int) -> int:
    """The nearest multiple, at least one."""
    return max(1, round(tokens / of)) * of
