"""Heat maps and the accuracy-against-cost plot of an evaluation, as SVG that sits in the page and takes its colours."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from infer_patch.availability import is_available
from infer_patch.report.plots import BAR, INK, for_page

SCORES, DIFFERENCE = "cividis", "RdBu"  # both readable without red-green vision


def heat_map(
    title: str, grid: Sequence[Sequence[float | None]], axes: dict[str, list[Any]], signed: bool
) -> str | None:
    """Mean score per cell with its number in it; `signed` for patched minus unpatched, from -1 to 1."""
    if not is_available("matplotlib"):
        return None
    with _drawing(title, (3.6, 0.9 + 0.42 * len(grid))) as (drawing, panel):
        import matplotlib
        from matplotlib.patches import Rectangle

        colours = matplotlib.colormaps[DIFFERENCE if signed else SCORES]
        for y, row in enumerate(grid):
            for x, cell in enumerate(row):
                if cell is not None:
                    colour = colours((cell + 1) / 2 if signed else cell)
                    panel.add_patch(Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, color=colour, linewidth=0))
                    light = abs(cell) > 0.6 if signed else cell < 0.6
                    text = f"{cell:+.2f}" if signed and cell else f"{cell:.2f}"
                    panel.text(x, y, text, ha="center", va="center", color="white" if light else "#1c2330", fontsize=9)
        panel.set_xlim(-0.5, len(axes["x"]) - 0.5)
        panel.set_ylim(len(grid) - 0.5, -0.5)
        panel.set_xticks(range(len(axes["x"])), [str(label) for label in axes["x"]])
        panel.set_yticks(range(len(axes["y"])), [str(label) for label in axes["y"]])
        panel.set_xlabel(axes.get("x_title", ["x"])[0], color=INK)
        panel.set_ylabel(axes.get("y_title", ["y"])[0], color=INK)
        return _finished(drawing, panel, title)


def pareto(title: str, points: Sequence[tuple[str, float, float]], headline: str) -> str | None:
    """Runs as (name, time ratio, score): upper left is better."""
    if not is_available("matplotlib"):
        return None
    with _drawing(title, (6.4, 3.0)) as (drawing, panel):
        for i, (name, ratio, score) in enumerate(
            points
        ):  # a letter as the mark: real marks are references, which `for_page` cuts out
            panel.update_datalim([(ratio, score)])
            panel.text(ratio, score, "●", ha="center", va="center", color=BAR, fontsize=11)
            panel.annotate(name, (ratio, score), **_LABELS[i % 2], color=INK, fontsize=9)
        panel.autoscale_view()
        panel.set_xlabel("time to first token, ratio to unpatched", color=INK)
        panel.set_ylabel(headline, color=INK)
        panel.margins(x=0.25, y=0.2)
        panel.axvline(1, color=INK, linewidth=0.6, linestyle=":")
        return _finished(drawing, panel, title)


_LABELS: Any = (  # by turns above right and below left, so that neighbours stay readable
    {"xytext": (8, 5), "textcoords": "offset points"},
    {"xytext": (-8, -14), "textcoords": "offset points", "ha": "right"},
)


class _drawing:
    """A figure with one panel, inside matplotlib settings that give equal SVG for equal values."""

    def __init__(self, title: str, size: tuple[float, float]):
        self._title, self._size = title, size

    def __enter__(self) -> tuple[Any, Any]:
        import matplotlib
        from matplotlib.figure import Figure

        settings: Any = {
            "svg.fonttype": "none",
            "svg.hashsalt": self._title,
            "font.family": "sans-serif",
            "font.size": 10,
        }
        self._context = matplotlib.rc_context(settings)
        self._context.__enter__()
        drawing = Figure(figsize=self._size, layout="constrained")
        return drawing, drawing.add_subplot()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


def _finished(drawing: Any, panel: Any, title: str) -> str:
    panel.tick_params(colors=INK, length=0)
    for side in panel.spines.values():
        side.set_visible(False)
    text = io.StringIO()
    drawing.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return for_page(text.getvalue(), title)
