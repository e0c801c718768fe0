"""A needle among pictures: which of several images, and which cell of it, shows an object; or none does.

After MMNeedle (Wang et al. 2024, "Multimodal Needle in a Haystack", arXiv 2406.11230), re-created with drawn scenes: no
file of it is used, so scores are not comparable with published ones. Unlike its code, every item counts in every
denominator, and answers of the wrong form are counted by themselves.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

from infer_patch.errors import PatchError
from infer_patch.evals.pope import check_pictures
from infer_patch.evals.prompts import Prompt
from infer_patch.evals.scenes import COLORS, SHAPES, SIZE, Scene, make_scene
from infer_patch.evals.task import Item, Scored, Task

LAYOUTS = {1: "free", 2: "mosaic2", 4: "mosaic4"}
WORDINGS = ("general", "demo")
_OBJECTS = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
_ORDINALS = ("first", "second")

Place = tuple[int, int, int]  # image, row, column, from 1


@dataclass(frozen=True)
class MMNeedle(Task):
    """Items for every number of images M and grid N x N; in half of them no picture shows the object.

    Parameters
    ----------
    images, grids : tuple of int
        M, and N of 1, 2 or 4 cells a side; M = 1 with N = 1 asks nothing and is left out.
    samples : int
        Items per M and N.
    seed : int
    wording : str
        "general": image, row and column as numbers, or -1. "demo": the sentences that the demo model knows, which are
        the place in one picture, or which of two pictures (there an object is always in one of them).
    """

    name: ClassVar[str] = "mm_needle"
    title: ClassVar[str] = "Multimodal needle"
    headline: ClassVar[str] = "index_accuracy"
    images: tuple[int, ...] = (1, 2)
    grids: tuple[int, ...] = (1, 2, 4)
    samples: int = 40
    seed: int = 0
    wording: str = "general"
    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        if self.wording not in WORDINGS:
            raise PatchError(f"wording must be one of {', '.join(WORDINGS)}, got {self.wording!r}")
        if not self.images or min(self.images) < 1 or not self.grids or not set(self.grids) <= set(LAYOUTS):
            raise PatchError(
                f"images are numbers from 1 on and grids of {list(LAYOUTS)}; got {self.images}, {self.grids}"
            )
        if self.wording == "demo" and max(self.images) > 2:
            raise PatchError(f"the demo model knows one or two images, got {max(self.images)}; use wording general.")
        if self.samples < 2 or not self._settings():
            raise PatchError("give at least 2 samples, and more than one picture or more than one cell.")

    def items(self, processor: Any, model: Any) -> list[Item]:
        check_pictures(processor)
        return [self._item(images, grid, number) for images, grid in self._settings() for number in range(self.samples)]

    def score(self, item: Item, output: str) -> dict[str, Any]:
        """Existence (is -1 used rightly), index, and all three fields; `lenient` takes the first three integers.

        None where the question does not ask for it: the demo model is asked for the image alone when there are two.
        """
        fields: Place | None = None if item.reference is None else tuple(item.reference)
        said = parse_demo(output, item.facts["images"]) if self.wording == "demo" else parse(output)
        lenient = said if self.wording == "demo" else parse_lenient(output)
        truth = fields or (-1, -1, -1)
        index = said is not None and said[0] == truth[0]
        whole = self.wording != "demo" or item.facts["images"] == 1
        return {
            "correct": index,
            "existence": (said is not None and (said[0] == -1) == (fields is None)) if whole else None,
            "index": index,
            "exact": said == truth if whole else None,
            "lenient": lenient == truth if whole else None,
            "format_error": said is None,
        }

    def metrics(self, rows: Sequence[Scored]) -> dict[str, float]:
        """Accuracies over the items that ask for it, the share of unreadable answers, and each M and N by itself."""
        found = _means(rows)
        for images, grid in self._settings():
            part = [row for row in rows if (row["facts"]["images"], row["facts"]["grid"]) == (images, grid)]
            if part:
                found |= {f"M {images}, N {grid}/{name}": value for name, value in _means(part).items()}
        return found

    def grid(self, rows: Sequence[Scored]) -> tuple[dict[str, list[Any]], list[list[float | None]]] | None:
        """Share of exact answers by the cell of the needle, for the finest grid in one picture."""
        size = max((grid for images, grid in self._settings() if images == 1), default=1)
        if size == 1:
            return None
        cells: dict[tuple[int, int], list[float]] = {}
        for row in rows:
            if (row["facts"]["images"], row["facts"]["grid"]) == (1, size) and row["reference"] is not None:
                cells.setdefault(tuple(row["reference"][1:]), []).append(float(row["score"]["exact"]))
        sides = range(1, size + 1)
        axes: dict[str, list[Any]] = {"x": [*sides], "y": [*sides], "x_title": ["column"], "y_title": ["row"]}
        return axes, [[fmean(cells[y, x]) if (y, x) in cells else None for x in sides] for y in sides]

    def _settings(self) -> list[tuple[int, int]]:
        return [(m, n) for m in self.images for n in self.grids if (m, n) != (1, 1)]

    def _item(self, images: int, grid: int, number: int) -> Item:
        rng = random.Random(f"mm needle {self.seed} {images} {grid} {number}")
        present = number % 2 == 0 or (self.wording == "demo" and images > 1)
        while True:
            scenes = [make_scene(rng.randrange(2**31), LAYOUTS[grid]) for _ in range(images)]
            found = [thing.name for scene in scenes for thing in scene.things]
            choices = sorted(n for n in found if found.count(n) == 1) if present else sorted({*_OBJECTS} - {*found})
            if choices:
                break
        needle = rng.choice(choices)
        place = _place(scenes, needle, grid) if present else None
        name = f"M {images}, N {grid}, {number}"
        prompt = Prompt(self._question(needle, images, grid), name, tuple(scene.image() for scene in scenes))
        facts = {"images": images, "grid": grid, "needle": needle}
        return Item(name, prompt, None if place is None else list(place), name, facts)

    def _question(self, needle: str, images: int, grid: int) -> str:
        if self.wording == "demo":
            return f"which {'row and column' if images == 1 else 'image'} has the {needle} ?"
        what = "image" if images == 1 else f"{images} images"
        cells = "" if grid == 1 else f", a grid of {grid} x {grid} pictures" + ("" if images == 1 else " each")
        return (
            f"You see {what}{cells}. One picture may show this: {needle}. Answer with its image number, row and "
            "column, counted from 1 and separated by commas, or with -1 if no picture shows it, and nothing else."
        )


def parse(output: str) -> Place | None:
    """The strict form "1, 2, 3" or "-1", around which only line breaks and full stops are forgiven."""
    text = output.replace("\n", "").strip().strip(".").strip()
    if text == "-1":
        return (-1, -1, -1)
    found = re.fullmatch(r"(\d+)\s*,\s*(\d+)\s*,\s*(\d+)", text)
    return None if found is None else (int(found[1]), int(found[2]), int(found[3]))


def parse_lenient(output: str) -> Place | None:
    """The first three integers of an output; -1 first says that there is none."""
    found = [int(number) for number in re.findall(r"-?\d+", output)]
    if found[:1] == [-1]:
        return (-1, -1, -1)
    return (found[0], found[1], found[2]) if len(found) >= 3 else None


def parse_demo(output: str, images: int) -> Place | None:
    """The demo model's "row 2 column 3" and "none", or "first" and "second"; row and column 0 where it names none."""
    words = output.lower().split()
    if "none" in words:
        return (-1, -1, -1)
    if images > 1:
        return next(((i + 1, 0, 0) for i, word in enumerate(_ORDINALS) if word in words), None)
    found = re.search(r"row (\d+) column (\d+)", " ".join(words))
    return None if found is None else (1, int(found[1]), int(found[2]))


def _place(scenes: Sequence[Scene], needle: str, grid: int) -> Place:
    """Image, row and column of the only object of that name."""
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            if thing.name == needle:
                return i + 1, int(thing.y * grid // SIZE) + 1, int(thing.x * grid // SIZE) + 1
    raise ValueError(f"no scene shows a {needle}")


def _means(rows: Sequence[Scored]) -> dict[str, float]:
    names = {
        "index_accuracy": "index",
        "existence_accuracy": "existence",
        "exact_accuracy": "exact",
        "lenient_exact_accuracy": "lenient",
        "format_error_rate": "format_error",
    }
    asked = {name: [row["score"][key] for row in rows if row["score"][key] is not None] for name, key in names.items()}
    return {name: fmean(map(float, values)) for name, values in asked.items() if values}
