"""The page of `infer-patch report sinks`: a map over the text, overlays on the pictures, a table layer by layer."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from infer_patch.availability import installed_version
from infer_patch.evals.sinks import MIN_QUERIES, Sinks
from infer_patch.report.head_scores_map import FORMATS, save
from infer_patch.report.kept_page import Pictures
from infer_patch.report.page import environment
from infer_patch.report.token_pictures import encoded, heated
from infer_patch.visual_grid import Grid

SHOWN = 12  # sinks in the table, tokens of a layer that are named
TEXT = 600  # tokens of the map at the start and at the end of a long prompt


def document(sinks: Sinks, pieces: Sequence[str], model: dict[str, Any]) -> dict[str, Any]:
    """Everything that was found, as plain values: the JSON beside the page."""
    layers, heads = sinks.received.shape[:2]
    return {
        "model": model,
        "threshold": sinks.threshold,
        "min_queries": MIN_QUERIES,
        "layers": layers,
        "heads": heads,
        "tokens": list(pieces),
        "image": sinks.image.tolist(),
        "mean_received": [round(float(x), 6) for x in sinks.mean_received()],
        "heads_per_token": sinks.heads_per_token().tolist(),
        "sinks_are": ["layer", "head", "token", "received"],
        "sinks": sinks.to_list(),
    }


def render(
    sinks: Sinks,
    pieces: Sequence[str],
    pictures: Sequence[tuple[Any, Grid | None]],
    title: str,
    layer: int | None = None,
    head: int | None = None,
) -> str:
    """The page as text.

    Parameters
    ----------
    pieces : sequence of str
        The text of every token; what a picture's tokens decode to is not shown.
    pictures : sequence of (PIL image, Grid or None)
        In the order of the prompt.
    layer, head : int, optional
        Map and pictures of this layer, and head, instead of the mean over all.
    """
    values, per_token = sinks.mean_received(layer, head), sinks.heads_per_token()
    left = Pictures()
    page: str = (
        environment()
        .get_template("sinks.html.jinja")
        .render(
            title=title,
            version=installed_version("infer_patch"),
            sinks=sinks,
            min_queries=MIN_QUERIES,
            shape=list(sinks.received.shape),
            with_sinks=int(sinks.is_sink.any(-1).sum()),
            found=int((per_token > 0).sum()),
            whose=_whose(layer, head),
            table=_table(sinks, pieces, per_token),
            tokens=_map(sinks, pieces, values, per_token),
            heads=_head_map(sinks, left),
            pictures=_pictures(sinks, pictures, values, left),
            rows=_rows(sinks, pieces),
        )
    )
    return page


def _whose(layer: int | None, head: int | None) -> str:
    if layer is None:
        return "mean over all layers and heads" if head is None else f"mean over all layers, head {head}"
    return f"layer {layer}, " + ("mean over its heads" if head is None else f"head {head}")


def _table(sinks: Sinks, pieces: Sequence[str], per_token: Tensor) -> list[dict[str, Any]]:
    best = sorted((i for i in per_token.nonzero()[:, 0].tolist()), key=lambda i: (-int(per_token[i]), i))[:SHOWN]
    every = sinks.mean_received()
    return [
        {
            "token": i,
            "text": _shown(pieces[i], int(sinks.image[i])),
            "heads": int(per_token[i]),
            "layers": int(sinks.is_sink[:, :, i].any(1).sum()),
            "mean": float(every[i]),
            "most": float(sinks.received[:, :, i].max()),
        }
        for i in best
    ]


def _map(sinks: Sinks, pieces: Sequence[str], values: Tensor, per_token: Tensor) -> list[dict[str, Any] | int]:
    """Tokens with their share of the strongest colour; a number stands for as many that are left out."""
    strength = (values / values.max().clamp(min=1e-12)).sqrt()  # the first token would outshine all others
    count = len(pieces)
    shown = list(range(count)) if count <= 2 * TEXT else [*range(TEXT), *range(count - TEXT, count)]
    found: list[dict[str, Any] | int] = []
    for place, i in enumerate(shown):
        if place and shown[place - 1] != i - 1:
            found.append(i - shown[place - 1] - 1)
        picture = int(sinks.image[i])
        if picture >= 0 and i and int(sinks.image[i - 1]) == picture:
            continue  # pictures are drawn; one mark stands for each
        text = f"[picture {picture + 1}]" if picture >= 0 else pieces[i]
        percent = 0 if picture >= 0 else round(100 * float(strength[i]))
        told = f"token {i}: receives {float(values[i]):.3f}; sink in {int(per_token[i])} heads"
        found.append({"text": text, "percent": percent, "told": told, "sink": bool(per_token[i]) and picture < 0})
    return found


def _head_map(sinks: Sinks, left: Pictures) -> str | None:
    """How much attention the sinks of each head receive from a query, on average: a picture as a data URI."""
    strongest = sinks.received.masked_fill(~sinks.is_sink, 0).amax(-1)
    stream = io.BytesIO()
    save(strongest.tolist(), stream, "Strongest sink of each head", "attention received", FORMATS[0])
    return left.uri("heads.png", {"heads.png": stream.getvalue()})


def _pictures(
    sinks: Sinks, pictures: Sequence[tuple[Any, Grid | None]], values: Tensor, left: Pictures
) -> list[dict[str, Any]]:
    found = []
    for number, (picture, grid) in enumerate(pictures):
        here = sinks.image == number
        of_picture, count = values[here], int(here.sum())
        fits = grid is not None and grid.tokens == count
        uri = None
        if fits and grid is not None:
            framed = (sinks.heads_per_token()[here] > 0).tolist()
            data, ending = encoded(heated(picture, grid, of_picture.tolist(), framed))
            uri = left.uri(f"x.{ending}", {f"x.{ending}": data})
        total = int((sinks.heads_per_token()[here] > 0).sum())
        most = float(of_picture.max()) if count else 0.0
        words = f"picture {number + 1}: {total} of {count} tokens are a sink in some head; at most {most:.4f} received"
        found.append({"uri": uri, "words": words})
    return found


def _rows(sinks: Sinks, pieces: Sequence[str]) -> list[dict[str, Any]]:
    """For each layer: heads with sinks, and the tokens that are sinks there with the number of heads."""
    rows = []
    for layer in range(sinks.received.shape[0]):
        here = sinks.is_sink[layer]
        counts = here.sum(0)
        order = torch.argsort(counts, descending=True, stable=True)[:SHOWN]
        named = [
            f"{_shown(pieces[i], int(sinks.image[i]))} ({i}): {int(counts[i])}" for i in order.tolist() if counts[i] > 0
        ]
        more = int((counts > 0).sum()) - len(named)
        heads = here.any(-1).nonzero()[:, 0].tolist()
        rows.append({"layer": layer, "heads": heads, "tokens": named, "more": more})
    return rows


def _shown(piece: str, picture: int) -> str:
    """A token in a table: spaces and line breaks made visible."""
    return f"[picture {picture + 1}]" if picture >= 0 else piece.replace("\n", "↵").replace(" ", "·") or "(nothing)"
