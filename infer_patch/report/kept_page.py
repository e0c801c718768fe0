"""The part of an evaluation's page that shows, for a few examples, what each plan kept of the picture."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infer_patch.evals.eval_schema import EvalSample, EvalSummary, KeptTokens
from infer_patch.evals.summary import UNPATCHED
from infer_patch.report.token_pictures import Colour, layer_colours

PAGE_BYTES = 1_800_000  # of pictures on one page, however many runs it joins; as text they take a third more
_SWATCHES = 8  # layers that a legend names one by one; beyond, it is a gradient


@dataclass
class Pictures:
    """Pictures of a page as data URIs; those past `left` bytes, and missing ones, are None."""

    left: int = PAGE_BYTES

    def uri(self, name: str | None, files: Mapping[str, bytes]) -> str | None:
        data = files.get(name) if name is not None else None
        if data is None or len(data) > self.left:
            return None
        self.left -= len(data)
        kind = "jpeg" if str(name).endswith("jpg") else "png"
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def kept_examples(
    summary: EvalSummary, samples: Sequence[EvalSample], files: Mapping[str, bytes], pictures: Pictures
) -> list[dict[str, Any]]:
    """Examples with a view per run: its pictures, what was kept in words, its answer. Empty for older results."""
    rows = {(row["plan"], row["item"]): row for row in samples}
    shown = []
    for example in summary["examples"]:
        base = rows[UNPATCHED, example["item"]]
        views = [_view(UNPATCHED, "the picture as the model sees it", example["pictures"], base, files, pictures)]
        for plan, kept in example["plans"].items():
            view = _view(plan, _kept_words(kept), kept["pictures"], rows[plan, example["item"]], files, pictures)
            views.append({**view, "no_grid": None in kept["pictures"]})
        shown.append({**example, "views": views, "reference": base["reference"]})
    return shown


def legends(summary: EvalSummary) -> list[dict[str, Any]]:
    """For plans that drop tokens at several layers: which colour stands for which layer."""
    found = []
    layers: dict[str, set[int]] = {}
    for example in summary["examples"]:
        for plan, kept in example["plans"].items():
            layers.setdefault(plan, set()).update(map(int, kept["left"]))
    for plan, dropping in layers.items():
        colours = layer_colours(dropping)
        if len(colours) > 1:
            css = {layer: _css(colour) for layer, colour in colours.items()}
            gradient = f"linear-gradient(90deg, {', '.join(css.values())})" if len(css) > _SWATCHES else None
            found.append({"plan": plan, "colours": css, "gradient": gradient})
    return found


def _view(
    name: str, words: str, names: Sequence[str | None], row: EvalSample, files: Mapping[str, bytes], pictures: Pictures
) -> dict[str, Any]:
    correct = row["score"].get("correct")
    many = len(names) > 1
    images = [
        {
            "file": file,
            "uri": pictures.uri(file, files),
            "alt": f"Picture {i}, {name}: {words}" if many else f"{name}: {words}",
        }
        for i, file in enumerate(names, 1)
    ]
    return {
        "name": name,
        "words": words,
        "images": images,
        "no_grid": False,
        "output": row["output"],
        "right": None if correct is None else correct >= 0.5,
    }


def _kept_words(kept: KeptTokens) -> str:
    """kept 128 of 256 visual tokens, 128 left at layer 2."""
    left = [f"{count:,} left at layer {layer}" for layer, count in kept["left"].items()]
    if len(left) > 3:
        left = [f"the others left at layers {min(map(int, kept['left']))} to {max(map(int, kept['left']))}"]
    return ", ".join([f"kept {kept['kept']:,} of {kept['tokens']:,} visual tokens", *left])


def _css(colour: Colour) -> str:
    return "#" + "".join(f"{channel:02x}" for channel in colour)
