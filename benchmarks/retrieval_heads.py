"""Needles found with retrieval heads masked, against as many random other heads: plans, and a table and a plot after.

    python benchmarks/retrieval_heads.py plans /tmp/plans
    infer-patch eval needle demo $(printf -- '--plan %s ' /tmp/plans/*.yaml) \\
        --length 600 --length 1000 --length 1400 --batch-size 1 --seed 1 --out /tmp/masked
    python benchmarks/retrieval_heads.py show /tmp/masked benchmarks/results/retrieval_heads
"""

import json
import sys
from pathlib import Path

from infer_patch import Plan
from infer_patch.patches import RetrievalHeads

SCORES = "retrieval_heads-demo.json"
COUNTS, SEEDS = (5, 10, 20, 30), (0, 1, 2)


def make_plans(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for top in COUNTS:
        Plan((RetrievalHeads(scores_file=SCORES, top=top),), name=f"top-{top:02}").save(folder / f"top-{top:02}.yaml")
        for seed in SEEDS:
            name = f"random-{top:02}-{seed}"
            method = RetrievalHeads(scores_file=SCORES, top=top, draw="random", seed=seed)
            Plan((method,), name=name).save(folder / f"{name}.yaml")


def found(run: Path) -> dict[str, dict[str, float]]:
    """For each plan and item: 1 for a needle that was found, 0 for one that was not. Of a run that was stopped, the
    items that all plans answered."""
    if (run / "samples.jsonl").is_file():
        samples = [json.loads(line) for line in (run / "samples.jsonl").read_text("utf-8").splitlines()]
    else:
        lines = (run / "rows-0.jsonl").read_text("utf-8").splitlines()
        samples = [row for line in lines for row in json.loads(line)]
    rows: dict[str, dict[str, float]] = {}
    for row in samples:
        if row["plan"] != "unpatched again":
            rows.setdefault(row["plan"], {})[row["item"]] = float(row["score"]["correct"])
    common = set.intersection(*(set(items) for items in rows.values()))
    return {plan: {item: items[item] for item in items if item in common} for plan, items in rows.items()}


def show(run: Path, out: Path) -> None:
    from matplotlib.figure import Figure

    rows = found(run)
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    share = {name: sum(scores.values()) / len(scores) for name, scores in rows.items()}
    unpatched, items = share["unpatched"], len(rows["unpatched"])
    table = {0: {"top": unpatched, "random": [unpatched]}}
    for k in COUNTS:
        table[k] = {"top": share[f"top-{k:02}"], "random": [share[f"random-{k:02}-{s}"] for s in SEEDS]}
    document = {
        "items": list(rows["unpatched"]),
        "whole_run": (run / "samples.jsonl").is_file(),  # else it was stopped: the items that all plans answered
        "found": {name: list(scores.values()) for name, scores in rows.items()},
        "accuracy_by_heads_masked": table,
        **{key: manifest[key] for key in ("started", "seed", "settings", "model", "machine")},
    }
    (out / "masked.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    panel = figure.add_subplot()
    counts = list(table)
    panel.plot(counts, [table[k]["top"] for k in counts], "o-", color="#D55E00", label="retrieval heads")
    means = [sum(table[k]["random"]) / len(table[k]["random"]) for k in counts]
    panel.plot(counts, means, "s--", color="#0072B2", label=f"random others, mean of {len(SEEDS)} draws")
    for k in counts:
        panel.plot([k] * len(table[k]["random"]), table[k]["random"], "_", color="#0072B2", markersize=9)
    panel.set(xlabel="heads masked, of 270", ylabel="needles found", ylim=(-0.03, 1.03), xticks=counts)
    panel.set_title(f"SmolLM2-135M-Instruct, {items} needles", fontsize=10)
    panel.grid(axis="y", linewidth=0.5, alpha=0.4)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    figure.savefig(out / "masked.png", dpi=150)
    for k in counts:
        drawn = ", ".join(f"{x:.2f}" for x in table[k]["random"])
        print(f"| {k} | {table[k]['top']:.2f} | {drawn} |")


if __name__ == "__main__":
    what, *folders = sys.argv[1:]
    {"plans": make_plans, "show": show}[what](*map(Path, folders))
