"""A picture with one cell for each head of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def head_map(
    values: Sequence[Sequence[float | None]], chosen: Mapping[str, Sequence[int]], path: Path, label: str
) -> Path:
    """Write values [layer][head] as a heat map around 0, blue above; None is hatched, chosen heads carry a dot.

    Needs matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grid = np.array([[np.nan if x is None else x for x in row] for row in values], float)
    bound = max(float(np.nanmax(np.abs(grid))) if np.isfinite(grid).any() else 0.0, 1e-9)
    figure = Figure(figsize=(2 + 0.3 * grid.shape[1], 1.5 + 0.2 * grid.shape[0]), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.patch.set(facecolor="0.85", edgecolor="0.7", hatch="///")  # shows where nothing is drawn
    image = axes.imshow(grid, cmap="RdBu", vmin=-bound, vmax=bound, aspect="auto", interpolation="nearest")
    for layer, heads in chosen.items():
        axes.scatter(heads, [int(layer)] * len(heads), s=8, c="black")
    axes.set(xlabel="head", ylabel="layer")
    figure.colorbar(image, label=label)
    figure.savefig(path, dpi=120)
    return path
