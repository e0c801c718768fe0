"""Plot of `bench recall`: attention mass that each plan keeps, layer by layer, one panel per budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infer_patch.availability import require
from infer_patch.errors import PatchError

# Okabe and Ito's colours, which stay apart for colour-blind eyes and in print; markers tell the lines apart without any
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
REFERENCES = {"oracle": ("#000000", "--"), "random": ("#7F7F7F", ":")}
FORMATS = (".png", ".svg", ".pdf")


def check(path: str | Path) -> None:
    """Raise before anything is measured if the plot could not be made."""
    if Path(path).suffix.lower() not in FORMATS:
        raise PatchError(f"a plot is a file that ends in {', '.join(FORMATS)}; got {path}")
    require("matplotlib", "Plotting")


def save(results: Sequence[dict[str, Any]], path: str | Path, title: str = "") -> None:
    """Write the plot; the suffix of `path` decides on PNG, SVG or PDF."""
    check(path)
    import matplotlib
    from matplotlib.figure import Figure

    budgets = list(dict.fromkeys(r["budget"] for r in results))
    styles = _styles(list(dict.fromkeys(r["plan"] for r in results)))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "recall", "font.size": 9}):
        figure = Figure(figsize=(1.2 + 3.6 * len(budgets), 3.6), layout="constrained")
        panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
        for panel, budget in zip(panels, budgets):
            for result in (r for r in results if r["budget"] == budget and r["by_layer"]):
                layers = sorted(result["by_layer"], key=int)
                values = [result["by_layer"][layer]["recall"] for layer in layers]
                panel.plot([int(i) for i in layers], values, label=result["plan"], **styles[result["plan"]])
            panel.set_title(f"{budget:,} tokens per query block")
            panel.set_xlabel("layer")
            panel.set_ylim(0, 1.02)
            panel.grid(axis="y", linewidth=0.5, alpha=0.4)
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("attention mass in the blocks read")
        handles, labels = panels[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
        if title:
            figure.suptitle(title, fontsize=10)
        metadata: dict[str, Any] = {"Date": None} if Path(path).suffix.lower() == ".svg" else {}
        figure.savefig(path, dpi=150, metadata=metadata)


def _styles(names: list[str]) -> dict[str, dict[str, Any]]:
    """Line styles of all plans; the references are drawn without markers."""
    styles: dict[str, dict[str, Any]] = {}
    for name in names:
        if name in REFERENCES:
            colour, line = REFERENCES[name]
            styles[name] = {"color": colour, "linestyle": line, "linewidth": 1.2}
            continue
        place = len([n for n in styles if n not in REFERENCES])
        styles[name] = {
            "color": COLOURS[place % len(COLOURS)],
            "marker": MARKERS[place % len(MARKERS)],
            "linestyle": "-" if place < len(COLOURS) else "-.",
            "markersize": 3.5,
            "linewidth": 1.4,
        }
    return styles
