"""Examples of what plans that drop visual tokens keep of a picture: a few items of a run, drawn when it ends.

Which tokens left, and at which layer, is recorded for these items only and stands in their rows, so a run can be
interrupted and shared between processes. The first process draws the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from infer_patch.evals.eval_schema import EvalSample, Example, KeptTokens
from infer_patch.evals.prompts import encode
from infer_patch.evals.results import file_name
from infer_patch.evals.task import Item
from infer_patch.report.token_pictures import darkened, encoded, fitted, layer_colours
from infer_patch.visual_grid import picture_grids

EXAMPLES = 3
PICTURES = 4  # of one item; further ones are counted and not drawn


def example_items(items: Sequence[Item], count: int = EXAMPLES) -> list[Item]:
    """The first item on each of the first `count` pictures; items of one group share theirs."""
    found: dict[str, Item] = {}
    for item in items:
        if item.prompt.images and len(found) < count:
            found.setdefault(item.group or item.name, item)
    return list(found.values())


def draw_examples(
    items: Sequence[Item], samples: Sequence[EvalSample], processor: Any, model: Any, chat: bool | None
) -> tuple[list[Example], dict[str, bytes]]:
    """Entries for the summary, and the pictures by the names of their files in the result folder.

    Items without a recorded row are left out: no plan drops visual tokens, or an older version made the rows.
    """
    recorded: dict[str, list[EvalSample]] = {}
    for row in samples:
        if row.get("left_at"):
            recorded.setdefault(row["item"], []).append(row)
    every_row = [row for rows in recorded.values() for row in rows]
    examples: list[Example] = []
    files: dict[str, bytes] = {}

    def saved(name: str, picture: Any) -> str:
        data, ending = encoded(picture)
        while (file := f"kept/{name}.{ending}") in files:  # two names of plans may give one name of a file
            name += "-"
        files[file] = data
        return file

    for item in items:
        if item.name not in recorded:
            continue
        inputs = encode(item.prompt, processor, model, chat)
        pictures, grids = as_seen(inputs, item.prompt.images, processor), picture_grids(inputs, model.config)
        if len(grids) != len(pictures):
            grids = [None] * len(pictures)
        name, shown = f"{len(examples) + 1}", list(zip(pictures, grids))[:PICTURES]
        plain = [saved(f"{name}-{i}", fitted(picture, grid)) for i, (picture, grid) in enumerate(shown, 1)]
        plans: dict[str, KeptTokens] = {}
        for row in recorded[item.name]:
            plan, left_at = row["plan"], row["left_at"] or []
            colours = layer_colours(layer for r in every_row if r["plan"] == plan for layer in _layers(r))
            drawn: list[str | None] = []
            for i, (picture, grid) in enumerate(shown):
                fits = grid is not None and len(left_at) == len(pictures) and grid.tokens == len(left_at[i])
                name_ = f"{name}-{i + 1}-{file_name(plan)}"
                drawn.append(saved(name_, darkened(picture, grid, left_at[i], colours)) if fits and grid else None)
            layers = _layers(row)
            tokens = sum(map(len, left_at))
            left = {str(layer): layers.count(layer) for layer in sorted(set(layers))}
            plans[plan] = {"kept": tokens - len(layers), "tokens": tokens, "left": left, "pictures": drawn}
        examples.append(
            {
                "item": item.name,
                "group": item.group or item.name,
                "question": item.prompt.text,
                "pictures": plain,
                "not_shown": len(pictures) - len(shown),
                "plans": plans,
            }
        )
    return examples, files


def _layers(row: EvalSample) -> list[int]:
    """For every visual token that left: the layer where it did."""
    return [layer for picture in row["left_at"] or [] for layer in picture if layer is not None]


def as_seen(inputs: Mapping[str, Any], images: Sequence[Any], processor: Any) -> list[Any]:
    """PIL images: what the model sees where its input holds whole pictures (cropped, for LLaVA), else as given."""
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[:2] != (len(images), 3):
        return list(images)
    from PIL import Image

    made_by = processor.image_processor
    mean = getattr(made_by, "image_mean", None) if getattr(made_by, "do_normalize", True) else None
    std = getattr(made_by, "image_std", None) if mean is not None else None
    values = pixels.float().cpu().permute(0, 2, 3, 1).numpy()
    values = values * np.array(1.0 if std is None else std) + np.array(0.0 if mean is None else mean)
    values = values * (255 if getattr(made_by, "do_rescale", True) else 1)
    return [Image.fromarray(picture) for picture in values.round().clip(0, 255).astype(np.uint8)]
