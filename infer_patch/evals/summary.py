"""From samples, distances and measurements to the rows of a summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from infer_patch.evals.cost import Measurement, costs
from infer_patch.evals.drift import Distances, pool
from infer_patch.evals.schema import SCHEMA, Count, Effect, Row, Sample, Summary
from infer_patch.evals.verdict import verdict
from infer_patch.plan import Plan
from infer_patch.stats import Report
from infer_patch.stats import describe as describe_figures

UNPATCHED = "unpatched"
REPEATED = "unpatched again"
OTHER_BACKEND = "unpatched, math SDPA"


@dataclass
class Findings:
    """What the runs of a comparison brought, by name of the run: the unpatched one first, then the plans."""

    plans: dict[str, Plan | None]
    may_stay_dense: list[str]
    measurements: list[Measurement] = field(default_factory=list)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    reports: dict[str, list[tuple[int, Report]]] = field(default_factory=dict)  # with the length of the prompt
    distances: dict[str, list[Distances]] = field(default_factory=dict)
    no_other_backend: str | None = None

    @property
    def names(self) -> list[str]:
        return list(self.plans)

    def add(self, sample: Sample, report: Report | None) -> None:
        self.samples.setdefault(sample["plan"], []).append(sample)
        if report is not None:
            self.reports.setdefault(sample["plan"], []).append((sample["prompt_tokens"], report))

    def add_distances(self, found: dict[str, Distances]) -> None:
        for name, distances in found.items():
            self.distances.setdefault(name, []).append(distances)


def summarise(title: str, findings: Findings, rounds: int, drift_prompts: int, rough: bool) -> Summary:
    """All rows: unpatched, plans, controls. `rough`: peak memory was read off the process, not off the allocator."""
    rows = [_row(name, findings) for name in findings.names]
    for name, cost in costs(findings.measurements, findings.names, rough).items():
        next(row for row in rows if row["name"] == name)["cost"] = cost
    unpatched = rows[0]
    for row in rows[1:]:
        row["verdict"] = verdict(row, unpatched)
    prompts = len(findings.samples[UNPATCHED])
    return {
        "schema": SCHEMA,
        "title": title,
        "prompts": prompts,
        "rounds": rounds,
        "drift_prompts": drift_prompts,
        "rows": rows + (_controls(findings) if drift_prompts else []),
    }


def _row(name: str, findings: Findings) -> Row:
    samples, effect = findings.samples[name], _effects(findings.reports.get(name, []))
    silent = any(e["fired"]["count"] == 0 for e in effect)
    row = _empty(name)
    row["what"] = in_a_line(findings.plans[name])
    differences = [s["first_difference"] for s in samples if s["first_difference"] is not None]
    if name != UNPATCHED:
        row["role"] = "plan"
        row["status"] = "ok" if not silent else "dense" if name in findings.may_stay_dense else "failed"
        row["identical"] = _count([s["flags"]["identical"] for s in samples])
        row["earliest_difference"] = min(differences, default=None)
        row["drift"] = pool(findings.distances.get(name, []))
        row["effect"] = effect
    if all(s["flags"]["found"] is not None for s in samples):
        row["found"] = _count([bool(s["flags"]["found"]) for s in samples])
    return row


def effects(reports: Sequence[tuple[int, Mapping[str, Any]]]) -> list[Effect]:
    """What each method of a plan did over its prompts, from (tokens of the prompt, `Report.methods`).

    Figures are those of the longest prompt on which the method fired.
    """
    found: list[Effect] = []
    for method in reports[0][1] if reports else ():
        entries: list[tuple[bool, int, dict[str, Any]]] = [
            (methods[method]["fired"], tokens, methods[method]) for tokens, methods in reports
        ]
        _, _, figures = max(entries, key=lambda entry: entry[:2])
        fired = _count([entry[0] for entry in entries])
        found.append({"method": method, "fired": fired, "words": describe_figures(figures), "figures": figures})
    return found


def _effects(reports: Sequence[tuple[int, Report]]) -> list[Effect]:
    return effects([(tokens, report.methods) for tokens, report in reports])


def _controls(findings: Findings) -> list[Row]:
    repeated, other = _empty(REPEATED), _empty(OTHER_BACKEND)
    for row in (repeated, other):
        row["role"], row["drift"] = "control", pool(findings.distances.get(row["name"], []))
    exact = repeated["drift"] is not None and repeated["drift"]["max_logit_gap"] == 0
    repeated["note"] = (
        "no drift at all, as it must be"
        if exact
        else "NOT zero: this model does not repeat itself on this machine, so drift below this means nothing"
    )
    other["note"] = "the same attention computed another way; drift of this size is rounding"
    if findings.no_other_backend is not None:
        other["note"] = f"not run on every prompt: {findings.no_other_backend}"
    return [repeated, other]


def _empty(name: str) -> Row:
    return {
        "name": name,
        "what": "",
        "role": "unpatched",
        "status": "reference",
        "verdict": "",
        "note": "",
        "found": None,
        "identical": None,
        "earliest_difference": None,
        "drift": None,
        "cost": [],
        "effect": [],
    }


def in_a_line(plan: Plan | None) -> str:
    """sink_window(window=64, evict=True): each method with the options that are not defaults."""
    if plan is None:
        return "as loaded"
    words = []
    for method in plan:
        options = [f"{name}={value}" for name, value in method.to_dict().items() if name != "method"]
        words.append(f"{method.name}({', '.join(options)})")
    return " + ".join(words) or "no method"


def _count(values: Sequence[bool]) -> Count:
    return {"count": sum(values), "of": len(values)}
