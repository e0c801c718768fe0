"""Small plots of what a method did, layer by layer, as SVG that sits in the page and takes its colours."""

from __future__ import annotations

import html
import io
import re
from dataclasses import dataclass
from typing import Any

from infer_patch.availability import is_available

# colours that stand for the page's own: replaced by CSS after drawing
INK, BAR, TRACK = "#010203", "#040506", "#070809"
_CSS = {INK: "currentColor", BAR: "var(--accent)", TRACK: "var(--track)"}


@dataclass(frozen=True)
class LayerFigure:
    """One number per layer between 0 and 1, with what it means."""

    title: str
    unit: str
    values: dict[int, float]


def layer_figures(figures: dict[str, Any]) -> list[LayerFigure]:
    """What there is to plot in one method's part of a report."""
    found = []
    if figures.get("share_read"):
        found.append(LayerFigure("Share of key blocks read, per layer", "of the causal blocks", figures["share_read"]))
    if figures.get("visual_tokens"):
        kept, total = figures["visual_tokens_kept"], figures["visual_tokens"]
        shares = {layer: kept[layer] / total[layer] for layer in total if total[layer]}
        found.append(LayerFigure("Visual tokens kept, from this layer on", "of the visual tokens", shares))
    if figures.get("rows_held"):
        seen = figures["tokens_seen"]
        held = {layer: rows / seen for layer, rows in figures["rows_held"].items()}
        found.append(LayerFigure("Tokens held in the cache, per layer", "of the tokens seen", held))
    return [LayerFigure(f.title, f.unit, {int(k): v for k, v in f.values.items()}) for f in found]


def svg(figure: LayerFigure) -> str | None:
    """The bars as an inline SVG; None where matplotlib is not installed."""
    if not is_available("matplotlib"):
        return None
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": figure.title, "font.family": "sans-serif", "font.size": 10}
    with matplotlib.rc_context(settings):
        drawing = Figure(figsize=(4.3, 1.5), layout="constrained")
        axes = drawing.add_subplot()
        layers = sorted(figure.values)
        axes.bar(layers, [1] * len(layers), width=0.72, color=TRACK)
        axes.bar(layers, [figure.values[i] for i in layers], width=0.72, color=BAR)
        _plain(axes, layers)
        text = io.StringIO()
        drawing.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return for_page(text.getvalue(), figure.title)


def _plain(axes: Any, layers: list[int]) -> None:
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    axes.set_xlim(min(layers) - 0.8, max(layers) + 0.8)
    step = -(-(max(layers) - min(layers) + 1) // 10)
    axes.set_xticks(range(min(layers), max(layers) + 1, step))
    axes.set_xlabel("layer", color=INK)
    axes.tick_params(colors=INK, length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def for_page(text: str, title: str) -> str:
    """Cut what belongs to a file of its own: name spaces, size, fonts, style rules, and ids, which a page has once."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<(metadata|defs)>.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r' (id|clip-path|xmlns(:\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text)
    text = re.sub(r"font-family: [^;\"]*; ?", "", text)
    for placeholder, colour in _CSS.items():
        text = text.replace(placeholder, colour)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
