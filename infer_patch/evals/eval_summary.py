"""From the rows of an evaluation to its summary: metrics, paired statistics, cost and a verdict for every run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infer_patch.evals.cost import interval
from infer_patch.evals.eval_schema import EvalCost, EvalRow, EvalSample, EvalSummary, PairedDifference
from infer_patch.evals.schema import SCHEMA, Interval
from infer_patch.evals.statistics import paired
from infer_patch.evals.summary import OTHER_BACKEND, REPEATED, UNPATCHED, effects, in_a_line
from infer_patch.evals.task import Scored, Task
from infer_patch.evals.verdict import FEW, never_took_effect
from infer_patch.plan import Plan

SIGNIFICANT = 0.05
CONTROLS = (REPEATED, OTHER_BACKEND)


def summarise_eval(
    task: Task,
    plans: Mapping[str, Plan | None],
    samples: Sequence[EvalSample],
    model_id: str,
    question_last: bool,
    seed: int,
) -> EvalSummary:
    """Summary of all rows; `plans` maps the names of runs, the unpatched one first.

    `question_last`: the runs read the question after everything before it was in the cache.
    """
    by_plan = {name: [s for s in samples if s["plan"] == name] for name in plans}
    reference = by_plan[UNPATCHED]
    rows = [_row(task, name, plans[name], by_plan[name], reference, seed) for name in plans]
    for row in rows[1:]:
        if row["status"] == "ok" and is_worse(row, task.unit, task.tolerance):
            row["status"] = "worse"
        row["verdict"] = eval_verdict(row, rows[0], task, question_last)
    grids = {name: task.grid(_scored(by_plan[name])) for name in plans if name not in CONTROLS}
    drawn = {name: grid for name, grid in grids.items() if grid is not None}
    tokens = interval([s["prompt_tokens"] for s in reference])
    if tokens is None:
        raise ValueError("no rows to sum up")
    return {
        "schema": SCHEMA,
        "task": task.name,
        "title": f"{task.title} · {model_id}",
        "headline": task.headline,
        "unit": task.unit,
        "items": len(reference),
        "groups": len({s["group"] for s in reference}),
        "tokens": tokens,
        "cache_exercised": task.through_cache or question_last,
        "question_last": question_last,
        "rows": rows,
        "grids": {name: grid[1] for name, grid in drawn.items()} or None,
        "grid_axes": next((grid[0] for grid in drawn.values()), None),
        "examples": [],
    }


def eval_verdict(row: EvalRow, unpatched: EvalRow, task: Task, question_last: bool = False) -> str:
    """Quality first, then cost; claims nothing that the intervals do not carry."""
    if row["name"] == OTHER_BACKEND:
        return f"the same model, rounded differently: {task.quality(row, unpatched)}"
    if row["role"] == "control":
        same = row["identical"] or {"count": 0, "of": 0}
        if same["count"] == same["of"]:
            return f"{same['count']} of {same['of']} answers repeat exactly: the numerical floor is zero"
        differ = f"{same['of'] - same['count']} of {same['of']}"
        return f"NOT repeatable: {differ} answers differ from the first run, so differences of this size mean nothing"
    if row["status"] == "failed":
        return never_took_effect(row["effect"])
    usual = _loss(row, unpatched) if task.unit == "nats" else _quality(row, unpatched, task.headline)
    words = [task.quality(row, unpatched) or usual]
    if not (task.through_cache or question_last):
        words += ["answers come from the prefill, so what the cache keeps was not exercised"] if _stores(row) else []
    cost = row["cost"]
    low, high = cost["prompt_tokens"]
    at = f"at {low:,} tokens" if low == high else f"at {low:,} to {high:,} tokens"
    words.append(_speed("time to first token", cost["first_token_ratio"], at))
    if cost["per_token_ratio"] is not None:
        words.append(_speed("time per token", cost["per_token_ratio"], at))
    for effect in row["effect"]:
        fired = effect["fired"]
        if fired["count"] < fired["of"]:
            words.append(f"{effect['method']} took effect in {fired['count']} of {fired['of']} batches only")
    return "; ".join(words)


def is_worse(row: EvalRow, unit: str, tolerance: float = 0.0) -> bool:
    """Whether the interval, or McNemar's test, speaks for a loss of more than `tolerance`: either is enough to warn."""
    found = row["paired"]
    if found is None:
        return False
    if unit == "nats":
        return found["low"] > tolerance
    return found["high"] < -tolerance or (found["lost"] > found["won"] and _significant(found))


def _significant(found: PairedDifference) -> bool:
    return found["p_value"] is not None and found["p_value"] < SIGNIFICANT


def _quality(row: EvalRow, unpatched: EvalRow, headline: str) -> str:
    paired_, own, base = row["paired"], row["metrics"][headline], unpatched["metrics"][headline]
    text = f"{headline} {own:.1%}, unpatched {base:.1%}"
    if paired_ is None:
        return text
    low, high = 100 * paired_["low"], 100 * paired_["high"]
    flips = f"{paired_['lost']} lost, {paired_['won']} won, p = {paired_['p_value'] or 0:.2g}"
    span = f"{100 * paired_['difference']:+.1f} points [{low:+.1f}, {high:+.1f}]; {flips}"
    if paired_["lost"] == paired_["won"] == 0 and paired_["difference"] == 0:
        return f"no answer changes between right and wrong: {text}"
    if is_worse(row, "share"):
        return f"WORSE than unpatched: {text}: {span}"
    if low > 0 and _significant(paired_):
        return f"better than unpatched: {text}: {span}"
    worst = f"; a loss of up to {-low:.1f} points is not ruled out" if low < 0 else ""
    return f"no difference shown: {text}: {span}{worst}"


def _loss(row: EvalRow, unpatched: EvalRow) -> str:
    """For losses in nats per token: worse where the whole interval lies above zero."""
    found, text = row["paired"], f"ppl {row['metrics']['ppl']:.2f}, unpatched {unpatched['metrics']['ppl']:.2f}"
    if found is None or found["difference"] == found["low"] == found["high"] == 0:
        return f"the same loss to the last digit: {text}"
    span = f"{found['difference']:+.3f} nats per token [{found['low']:+.3f}, {found['high']:+.3f}]"
    if is_worse(row, "nats"):
        return f"WORSE than unpatched: {text}: {span}"
    return f"{'better than unpatched' if found['high'] < 0 else 'no difference shown'}: {text}: {span}"


def _speed(what: str, ratio: Interval | None, at: str) -> str:
    if ratio is None or ratio["n"] < FEW:
        return f"{what} {at}: too few batches to judge"
    if ratio["p20"] <= 1 <= ratio["p80"]:
        return f"no measurable difference in {what} {at}"
    slower = " (slower than unpatched)" if ratio["median"] > 1 else ""
    return f"{what} {ratio['median']:.2f}x {at}{slower}"


def _stores(row: EvalRow) -> bool:
    return any("rows_held" in effect["figures"] for effect in row["effect"])


def _row(
    task: Task,
    name: str,
    plan: Plan | None,
    samples: Sequence[EvalSample],
    reference: Sequence[EvalSample],
    seed: int,
) -> EvalRow:
    base = {row["item"]: row for row in reference}
    pairs = [(base[row["item"]], row) for row in samples]
    effect = effects([(s["prompt_tokens"], s["effect"]["methods"]) for s in samples if s["effect"] is not None])
    failed = any(e["fired"]["count"] == 0 for e in effect)
    role: Any = "unpatched" if name == UNPATCHED else "control" if name in CONTROLS else "plan"
    return {
        "name": name,
        "what": in_a_line(plan),
        "role": role,
        "status": "reference" if role != "plan" else "failed" if failed else "ok",
        "verdict": "",
        "items": len(samples),
        "metrics": task.metrics(_scored(samples)),
        "paired": None if name == UNPATCHED else _paired(task, pairs, seed),
        "identical": None
        if name == UNPATCHED
        else {"count": sum((a["output"], a["score"]) == (b["output"], b["score"]) for a, b in pairs), "of": len(pairs)},
        "cost": _cost(pairs, role != "unpatched"),
        "effect": effect,
    }


def _paired(task: Task, pairs: Sequence[tuple[EvalSample, EvalSample]], seed: int) -> PairedDifference:
    before, after = ([task.value(pair[i]["score"]) for pair in pairs] for i in (0, 1))
    weights = [task.weight(base["facts"]) for base, _ in pairs]
    flips = [(task.right(base["score"]), task.right(own["score"])) for base, own in pairs]
    judged = [(was, now) for was, now in flips if was is not None and now is not None]
    found: Any = paired(
        before, after, [base["group"] for base, _ in pairs], seed, weights=weights, right=judged
    ).to_dict()
    if not judged:  # nothing is right or wrong, so nothing flips
        found |= {"lost": 0, "won": 0, "p_value": None}
    return found


def _cost(pairs: Sequence[tuple[EvalSample, EvalSample]], with_ratio: bool) -> EvalCost:
    batches = {own["batch"]: (base, own) for base, own in pairs}.values()
    first = interval([own["first_token_s"] for _, own in batches])
    if first is None:
        raise ValueError("no rows to sum up")
    decoded = [(b["per_token_s"], o["per_token_s"]) for b, o in batches]
    ratios = [own["first_token_s"] / base["first_token_s"] for base, own in batches]
    return {
        "prompt_tokens": [f(own["prompt_tokens"] for _, own in pairs) for f in (min, max)],
        "batches": len(batches),
        "first_token_s": first,
        "first_token_ratio": interval(ratios) if with_ratio else None,
        "per_token_s": interval([own for _, own in decoded if own]),
        "per_token_ratio": interval([own / base for base, own in decoded if own and base]) if with_ratio else None,
        "cache_bytes": sum(own["cache_bytes"] for _, own in batches) / len(batches),
        "output_tokens": sum(own["output_tokens"] for _, own in pairs) / len(pairs),
    }


def _scored(samples: Sequence[EvalSample]) -> list[Scored]:
    keys = ("item", "group", "reference", "facts", "output", "score")
    rows: Any = [{key: sample[key] for key in keys} for sample in samples]  # type: ignore[literal-required]
    return rows
