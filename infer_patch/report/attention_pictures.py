"""One head before and after: its attention matrix unpatched, under a plan, and the difference."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infer_patch.visual_grid import Grid

CELLS = 160  # a side of a drawn matrix, at most
SHOWN = 8  # tokens in the table of changes
_LEAST = 1e-4  # shares below have the darkest colour


def binned(matrix: Tensor, cells: int = CELLS) -> Tensor:
    """A matrix [T, T] drawn small: the share of attention that goes from one group of queries to one of keys, the mean
    over the queries: [n, n] with n <= cells."""
    tokens = matrix.shape[0]
    count = min(tokens, cells)
    group = torch.arange(tokens) * count // tokens
    size = torch.bincount(group, minlength=count)
    rows = torch.zeros(count, tokens).index_add_(0, group, matrix) / size[:, None]
    return torch.zeros(count, count).index_add_(1, group, rows)


def moved(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Share of the attention that went elsewhere: the mean over all rows, and of the last one."""
    rows = (before - after).abs().sum(1) / 2
    return float(rows.mean()), float(rows[-1])


def changes(before: Tensor, after: Tensor, pieces: Sequence[str]) -> list[dict[str, Any]]:
    """The tokens whose share of the last row's attention changed most."""
    difference = (after[-1] - before[-1]).abs()
    order = difference.argsort(descending=True, stable=True)[:SHOWN].tolist()
    return [
        {"token": i, "text": pieces[i], "before": float(before[-1, i]), "after": float(after[-1, i])}
        for i in order
        if difference[i] > 0
    ]


@dataclass(frozen=True)
class Seen:
    """A picture of the prompt (PIL), the grid of its tokens, and their places in the prompt, in order."""

    picture: Any
    grid: Grid
    places: Tensor


def drawn(before: Tensor, after: Tensor, seen: Seen | None = None) -> bytes:
    """PNG of three panels, all logarithmic: before, after, and after minus before.

    With a picture, a second row shows the last token's attention to it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.2, 3.5 if seen is None else 6.6), layout="constrained")
    parts: Any = [figure] if seen is None else figure.subfigures(2, 1, height_ratios=(3.5, 3.1))
    _matrices(parts[0], before, after)
    if seen is not None:
        _over_picture(parts[1], before[-1], after[-1], seen)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=80)
    return stream.getvalue()


def _matrices(figure: Any, before: Tensor, after: Tensor) -> None:
    from matplotlib.colors import LogNorm, SymLogNorm

    panels = [binned(before), binned(after)]
    difference = panels[1] - panels[0]
    axes = figure.subplots(1, 3, sharey=True)
    tokens = before.shape[0]
    extent = (0, tokens, tokens, 0)
    most = max(float(panel.max()) for panel in panels)
    for axis, panel, title in zip(axes, panels, ("unpatched", "with the plan")):
        norm = LogNorm(_LEAST, max(most, 10 * _LEAST))
        image = axis.imshow(panel.clamp(min=_LEAST).numpy(), cmap="cividis", norm=norm, extent=extent, aspect="auto")
        axis.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes[:2], label="share of the query's attention")
    limit = max(float(difference.abs().max()), _LEAST)
    signed = SymLogNorm(10 * _LEAST, vmin=-limit, vmax=limit)
    image = axes[2].imshow(difference.numpy(), cmap="RdBu", norm=signed, extent=extent, aspect="auto")
    axes[2].set_title("difference", fontsize=10)
    figure.colorbar(image, ax=axes[2], label="more (blue) or less (red)")
    axes[0].set_ylabel("query token")
    for axis in axes:
        axis.set_xlabel("key token")


def _over_picture(figure: Any, before: Tensor, after: Tensor, seen: Seen) -> None:
    """What one row reads of a picture: the picture, its cells before and after, and the difference."""
    from matplotlib.colors import PowerNorm, SymLogNorm

    size = seen.grid.rows, seen.grid.columns
    rows = [row[seen.places] for row in (before, after)]
    cells = [row[seen.grid.leading :].view(size) for row in rows]
    difference = cells[1] - cells[0]
    axes = figure.subplots(1, 4)
    axes[0].imshow(seen.picture, extent=(0, seen.grid.columns, seen.grid.rows, 0))
    axes[0].set_title("picture 1", fontsize=10)
    norm = PowerNorm(0.5, 0, max(float(part.max()) for part in cells) or 1)
    for axis, part, row, title in zip(axes[1:], cells, rows, ("unpatched", "with the plan")):
        image = axis.imshow(part.numpy(), cmap="cividis", norm=norm)
        axis.set_title(f"{title}: {float(row.sum()):.1%}\nof the last token's attention", fontsize=9)
    figure.colorbar(image, ax=axes[1:3], label="share of attention", shrink=0.8)
    limit = max(float(difference.abs().max()), _LEAST)
    signed = SymLogNorm(limit / 10, vmin=-limit, vmax=limit)
    image = axes[3].imshow(difference.numpy(), cmap="RdBu", norm=signed)
    axes[3].set_title("difference", fontsize=10)
    figure.colorbar(image, ax=axes[3], label="more (blue) or less (red)", shrink=0.8)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
