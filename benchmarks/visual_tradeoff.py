"""Quality against visual tokens kept: every method that drops some, and random dropping, on drawn POPE questions.

    python benchmarks/visual_tradeoff.py --out examples/visual-tradeoff

calibrates what is missing (schedules, gates), answers every question unpatched and under every plan, and writes the
result folder of an evaluation with a table (`tradeoff.md`, `tradeoff.json`) and a plot (`tradeoff.svg`) beside it. The
same command goes on with an unfinished run. Pictures to calibrate on are others than those of the questions.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from infer_patch import Method, Plan, methods
from infer_patch.artifacts import save_artifact
from infer_patch.calibration.dyvte import GateSettings, calibrate_dyvte
from infer_patch.calibration.keep_schedules import calibrate_g_search, calibrate_p_sigmoid
from infer_patch.calibration.schedule_settings import SearchSettings, SigmoidSettings
from infer_patch.calibration.visual_questions import Source
from infer_patch.cli.calibrate.schedule_run import dumps
from infer_patch.evals.evaluate import Evaluation, evaluate
from infer_patch.evals.loading import load
from infer_patch.evals.pope_scenes import PopeScenes
from infer_patch.evals.statistics import paired
from infer_patch.evals.visual_cost import cost_ratio
from infer_patch.families import ModelParts, describe
from infer_patch.keep_schedule import ScheduledPruning, counts_of
from infer_patch.patches import DyVTE, FastV, GSearch, PSigmoid, RandomPruning
from infer_patch.pruning import LayerPruning

LAYER = 2  # where fastv and random drop, and the first layer that schedules may shorten
SHARES = (0.5, 0.25, 0.125, 0.0625)  # of the visual tokens, from LAYER on
THRESHOLDS = (0.3, 0.5, 0.7, 0.9)
CONTROLS = ("random", "g_search at random", "unpatched")  # drawn in grey
NEAR = 0.01  # of the visual tokens: so many fewer than random's are compared with it all the same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-vlm")
    parser.add_argument("--out", type=Path, required=True, help="result folder")
    parser.add_argument("--made", type=Path, help="folder of schedules and gates; made where missing [OUT/made]")
    parser.add_argument("--scenes", type=int, default=50, help="pictures, 6 questions a split each")
    parser.add_argument("--pictures", type=int, default=12, help="pictures to calibrate on")
    parser.add_argument("--iterations", type=int, default=20, help="of Bayesian optimisation, after 8 starts")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--few", action="store_true", help="one plan of each kind, to try the script")
    given = parser.parse_args()
    model, processor = load(given.model)
    parts = describe(model)
    made = given.made or given.out / "made"
    made.mkdir(parents=True, exist_ok=True)
    plans = Plans(model, processor, parts, made, given).all()
    found = evaluate(
        model,
        processor,
        PopeScenes(scenes=given.scenes),
        plans,
        batch_size=given.batch_size,
        control_batches=2,
        out=given.out / "eval",
        model_id=given.model,
        command="python benchmarks/visual_tradeoff.py --out OUT",
        on_progress=lambda done, total, what: print(f"{done} of {total}: {what}", flush=True),
    )
    rows = tabulate(found, {plan.name: plan for plan in plans}, parts)
    (given.out / "tradeoff.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (given.out / "tradeoff.md").write_text(as_text(rows, comparisons(found, rows)), encoding="utf-8")
    draw(rows, given.out / "tradeoff.svg")
    print((given.out / "tradeoff.md").read_text(encoding="utf-8"))


class Plans:
    """What is compared. Schedules and gates are read from a folder, and made where they are missing."""

    def __init__(self, model: Any, processor: Any, parts: ModelParts, made: Path, given: argparse.Namespace):
        self.model, self.processor, self.parts, self.made, self.given = model, processor, parts, made, given
        self.source = Source(pictures=given.pictures, held_out=given.pictures)

    def all(self) -> list[Plan]:
        shares = SHARES[1:2] if self.given.few else SHARES
        plans = []
        for share in shares:
            budget = (LAYER + share * (self.parts.num_layers - LAYER)) / self.parts.num_layers
            drop: dict[str, Any] = {"layer": LAYER, "drop_ratio": 1 - share}
            plans += [
                named("fastv", share, FastV(**drop)),
                named("random", share, RandomPruning(**drop)),
                named("linear", share, GSearch(keep_rate=linear(budget, self.parts.num_layers))),
                named("p_sigmoid", share, PSigmoid(schedule_file=str(self.curve(budget)))),
            ]
            if "vtc_cls" in methods():  # before the decoder: as many tokens on average as the others
                plans.append(named("vtc_cls", share, methods()["vtc_cls"](drop_ratio=round(1 - budget, 6))))  # type: ignore[call-arg]
        for eps in (0.01,) if self.given.few else (0.0, 0.01, 0.05):
            file = str(self.searched(eps))
            plans.append(named("g_search", eps, GSearch(schedule_file=file)))
            plans.append(named("g_search at random", eps, GSearch(schedule_file=file, query="random")))
        gates = str(self.gates())
        plans += [
            named("dyvte", t, DyVTE(gates=gates, threshold=t)) for t in ((0.5,) if self.given.few else THRESHOLDS)
        ]
        layers = (self.parts.num_layers // 2,) if self.given.few else range(1, self.parts.num_layers - 1)
        plans += [named("fixed exit", layer, DyVTE(policy="fixed", exit_layer=layer)) for layer in layers]
        return plans

    def searched(self, eps: float) -> Path:
        file = self.made / f"g_search-eps-{eps:g}.json"
        if not file.exists():
            settings = SearchSettings(source=self.source, eps=eps, first=LAYER)
            document = calibrate_g_search(self.model, self.processor, settings, self.made / "trace.jsonl", self._id)
            file.write_text(dumps(document), encoding="utf-8")
        return file

    def curve(self, budget: float) -> Path:
        file = self.made / f"p_sigmoid-{100 * budget:.0f}.json"
        if not file.exists():
            settings = SigmoidSettings(
                source=self.source, budget=budget, first=LAYER, starts=8, iterations=self.given.iterations
            )
            document = calibrate_p_sigmoid(self.model, self.processor, settings, self.made / "trace.jsonl", self._id)
            file.write_text(dumps(document), encoding="utf-8")
        return file

    def gates(self) -> Path:
        folder = self.made / "dyvte"
        if not (folder / "artifact.json").exists():
            settings = GateSettings(source=self.source, hidden=32)
            work = self.made / "dyvte.work"
            tensors, meta = calibrate_dyvte(self.model, self.processor, settings, work, self._id)
            save_artifact(folder, "dyvte", tensors, meta, self.model)
        return folder

    @property
    def _id(self) -> str:
        return str(self.given.model)


def named(kind: str, setting: float, method: Method) -> Plan:
    return Plan((method,), f"{kind} {setting:g}")


def linear(budget: float, layers: int) -> tuple[float, ...]:
    """Rates that fall evenly from LAYER on, with the budget as their mean; 0 once they reach it."""

    def rates(slope: float) -> tuple[float, ...]:
        return tuple(max(1 - slope * max(layer - LAYER + 1, 0), 0.0) for layer in range(layers))

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(rates(middle)) / layers > budget else (low, middle)
    return rates(high)


def counts_per_layer(plan: Plan, samples: Sequence[Any], parts: ModelParts, tokens: int) -> list[float]:
    """Visual tokens in each layer, on average over the samples."""
    (method,) = plan
    layers = parts.num_layers
    if isinstance(method, LayerPruning):
        kept = round(tokens * (1 - method.drop_ratio))
        return [tokens if layer < method.layer else kept for layer in range(layers)]
    if isinstance(method, ScheduledPruning):
        return [float(c) for c in counts_of(method.schedule(parts).rates, torch.tensor(tokens))]
    if isinstance(method, DyVTE):
        gone = [0] * layers
        for sample in samples:
            figures = (sample["effect"] or {"methods": {}})["methods"].get("dyvte", {})
            for layer, count in figures.get("samples_emptied", {}).items():
                for later in range(int(layer), layers):
                    gone[later] += count
        return [tokens * (1 - n / len(samples)) for n in gone]
    return [tokens * (1 - getattr(method, "drop_ratio"))] * layers


def tabulate(found: Evaluation, plans: dict[str, Plan], parts: ModelParts) -> list[dict[str, Any]]:
    """A row for each run: quality, tokens kept, work, and whether random dropping at as many tokens does as well."""
    if found.summary is None:
        raise SystemExit("this process only helped; the first one writes the table")
    tokens = int(getattr(parts.root.config, "image_seq_length"))
    config = parts.text_config
    rows = []
    for row in found.summary["rows"]:
        if row["role"] == "control":
            continue
        samples = [s for s in found.samples if s["plan"] == row["name"]]
        text = sum(s["prompt_tokens"] for s in samples) / len(samples) - tokens
        plan = plans.get(row["name"])
        counts = counts_per_layer(plan, samples, parts, tokens) if plan else [float(tokens)] * parts.num_layers
        first = row["cost"]["first_token_ratio"]
        rows.append(
            {
                "plan": row["name"],
                "kind": row["name"].rsplit(" ", 1)[0] if plan else "unpatched",
                "mean_kept": sum(counts) / len(counts) / tokens,
                "last_kept": counts[-1] / tokens,
                "work": cost_ratio(counts, text, tokens, config.hidden_size, config.intermediate_size),
                "counts": counts,
                "first_token_ratio": first and first["median"],
                **{name: row["metrics"][name] for name in ("accuracy", "f1", "yes_ratio")},
                "paired": row["paired"],
            }
        )
    control = sorted((r["mean_kept"], r["accuracy"]) for r in rows if r["kind"] in ("random", "unpatched"))
    for entry in rows:
        entry["random_accuracy"] = interpolated(control, entry["mean_kept"])
    return rows


def interpolated(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """On the line through the neighbouring points; that of the first point a little below it, None farther outside."""
    if points and points[0][0] - NEAR <= x < points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def comparisons(found: Evaluation, rows: Sequence[dict[str, Any]]) -> list[str]:
    """The claims that were to be shown, question by question on the same items."""
    by_plan: dict[str, dict[str, Any]] = {}
    for sample in found.samples:
        by_plan.setdefault(sample["plan"], {})[sample["item"]] = sample
    names = [row["plan"] for row in rows]

    def compared(one: str, other: str) -> str:
        pairs = [(by_plan[other][item], s) for item, s in by_plan[one].items()]
        result = paired(
            [float(a["score"]["correct"]) for a, _ in pairs],
            [float(b["score"]["correct"]) for _, b in pairs],
            [b["group"] for _, b in pairs],
            weights=[sum(b["facts"]["splits"].values()) for _, b in pairs],
        )
        return (
            f"{one} against {other}: {100 * result.difference:+.1f} points of accuracy "
            f"({100 * result.low:+.1f} to {100 * result.high:+.1f}), {result.won} won, {result.lost} lost, "
            f"p {result.p_value:.2g}"
        )

    lines = []
    for share in SHARES:
        for ours, others in (("p_sigmoid", ("fastv", "linear", "random")), ("vtc_cls", ("fastv", "random"))):
            one = f"{ours} {share:g}"
            lines += [compared(one, f"{other} {share:g}") for other in others if one in names]
    searched = [row["plan"] for row in rows if row["kind"] == "g_search"]
    lines += [compared(plan, plan.replace("g_search", "g_search at random")) for plan in searched]
    fixed = [row for row in rows if row["kind"] == "fixed exit"]
    for row in (row for row in rows if row["kind"] == "dyvte"):
        at_most = [other for other in fixed if other["mean_kept"] <= row["mean_kept"] + 1e-9]
        if at_most:
            best = max(at_most, key=lambda other: other["accuracy"])
            lines.append(compared(row["plan"], best["plan"]) + " (the best fixed exit of no more tokens)")
    return lines


def as_text(rows: Sequence[dict[str, Any]], lines: Sequence[str]) -> str:
    """The table and the comparisons as Markdown."""
    head = [
        "plan",
        "mean kept",
        "kept at the end",
        "work (F1)",
        "time to first token",
        "accuracy",
        "F1",
        "yes",
        "against unpatched",
        "random at as many tokens",
    ]
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in sorted(rows, key=lambda r: (r["kind"] != "unpatched", r["kind"], -r["mean_kept"])):
        change, control = row["paired"], row["random_accuracy"]
        against = f"{100 * change['difference']:+.1f} (p {change['p_value']:.2g})" if change else "-"
        chosen = row["kind"] not in ("random", "unpatched", "g_search at random")
        loses = chosen and control is not None and row["accuracy"] < control
        first = row["first_token_ratio"]
        cells = [
            row["plan"],
            *(f"{100 * row[name]:.1f} %" for name in ("mean_kept", "last_kept", "work")),
            "-" if first is None else f"{first:.2f} x",
            *(f"{100 * row[name]:.1f} %" for name in ("accuracy", "f1", "yes_ratio")),
            against,
            "-" if control is None else f"{100 * control:.1f} %" + (", **random is better**" if loses else ""),
        ]
        table.append("| " + " | ".join(cells) + " |")
    return "\n".join([*table, "", *(f"- {line}" for line in lines), ""])


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Accuracy over work, a line for each kind; the upper left is where one wants to be."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    best, front = -1.0, []
    for row in sorted(rows, key=lambda r: (r["work"], -r["accuracy"])):
        if row["accuracy"] > best:
            best = row["accuracy"]
            front.append((100 * row["work"], 100 * best))
    front.append((100 * max(row["work"] for row in rows), 100 * best))
    label = "Pareto front (best for its work)"
    axes.step(*zip(*front), where="post", color="0.8", linewidth=7, solid_joinstyle="round", label=label, zorder=0)
    kinds = dict.fromkeys(row["kind"] for row in rows)
    for number, kind in enumerate(sorted(kinds, key=lambda kind: kind in CONTROLS)):
        points = sorted((100 * row["work"], 100 * row["accuracy"]) for row in rows if row["kind"] == kind)
        control = {"color": "0.35", "linestyle": ":"} if kind in CONTROLS else {}
        axes.plot(*zip(*points), marker="osD^vPX<>*"[number % 10], label=kind, linewidth=1, markersize=5, **control)
    axes.set(xlabel="work of the decoder in prefill, % of unpatched (F1)", ylabel="accuracy, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
