"""One head before and after: its attention matrix unpatched, under a plan, and the difference."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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


def drawn(before: Tensor, after: Tensor) -> bytes:
    """PNG of three panels, all logarithmic: before, after, and after minus before."""
    from matplotlib.colors import LogNorm, SymLogNorm
    from matplotlib.figure import Figure

    panels = [binned(before), binned(after)]
    difference = panels[1] - panels[0]
    figure = Figure(figsize=(10.2, 3.5), layout="constrained")
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
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=80)
    return stream.getvalue()
