"""Heat map of one number per attention head: layers down, heads across."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from infer_patch.availability import require
from infer_patch.errors import PatchError

FORMATS = (".png", ".svg", ".pdf")


def check(path: str | Path) -> None:
    """Raise before anything is measured if the picture could not be made."""
    if Path(path).suffix.lower() not in FORMATS:
        raise PatchError(f"a heat map is a file that ends in {', '.join(FORMATS)}; got {path}")
    require("matplotlib", "Drawing heads")


def save(
    matrix: Sequence[Sequence[float]], to: str | Path | BinaryIO, title: str, label: str, suffix: str | None = None
) -> None:
    """Write the picture.

    Parameters
    ----------
    matrix : numbers [L, H]
    to : path or binary file
        A path's suffix decides on PNG, SVG or PDF; with a file, `suffix` does.
    label : str
        What the numbers are.
    """
    suffix = suffix or Path(str(to)).suffix.lower()
    check(f"heads{suffix}")
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers, heads = len(matrix), len(matrix[0])
    size = min(max(2.2 + 0.16 * heads, 4.2), 14), min(max(1.4 + 0.16 * layers, 2.4), 14)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "heads", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        panel = figure.add_subplot()
        shown = panel.imshow(matrix, aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
        panel.set_xlabel("query head")
        panel.set_ylabel("layer")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        panel.set_title(title, fontsize=10)
        figure.colorbar(shown, ax=panel, label=label)
        metadata: dict[str, Any] = {"Date": None} if suffix == ".svg" else {}
        figure.savefig(to, format=suffix.removeprefix("."), dpi=150, metadata=metadata)
