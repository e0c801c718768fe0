"""Drawn scenes of coloured shapes, from a seed: the pictures that the demo vision-language model was trained on.

They follow the recipe of its training data, drawn anew: equal seeds give equal pictures in every process, but not the
very pictures of that training. The recipe gives no RGB values and not every outline; heart and arrow were drawn in
several ways, and the forms that the model reads best were kept. With these scenes it finds 97 % of the objects in
pictures of 3 to 7, and says no to 99 % of the absent ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from infer_patch.availability import require
from infer_patch.errors import PatchError
from infer_patch.evals.scene_painting import cover, texture

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = 128
PATCH = 8
SHAPES: tuple[str, ...] = (
    "circle",
    "square",
    "triangle",
    "star",
    "cross",
    "heart",
    "ring",
    "moon",
    "arrow",
    "bar",
    "frame",
    "bolt",
)
COLORS: tuple[str, ...] = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
LAYOUTS: tuple[str, ...] = ("free", "mosaic2", "mosaic4")

_RGB = {
    "red": (220, 40, 40),
    "orange": (240, 135, 25),
    "yellow": (235, 220, 50),
    "green": (50, 170, 60),
    "cyan": (60, 205, 215),
    "blue": (50, 80, 220),
    "purple": (150, 60, 190),
    "white": (240, 240, 240),
}
_RADIUS = (7.5, 13.5)
_UPRIGHT = ("heart", "bolt")  # turned by at most 0.6 rad
_CELLS = {"free": 1, "mosaic2": 2, "mosaic4": 4}
_LEAST_COVER = 0.12
_PLACES, _APPEARANCE, _BACKGROUND = 1, 2, 3  # streams of random numbers of one scene


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Parameters
    ----------
    shape, color : str
        From `SHAPES` and `COLORS`.
    x, y : float
        Centre in pixels, from the left and from the top.
    radius : float
        Of the circle around the outline, in pixels.
    rotation : float
        Clockwise, in radians.
    """

    shape: str
    color: str
    x: float
    y: float
    radius: float
    rotation: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class PatchLabels:
    """What lies in each 8x8 patch: arrays of shape (16, 16), row by column.

    Parameters
    ----------
    shape, color : numpy.ndarray
        Index into `SHAPES` and `COLORS` of the object that covers most of the patch, at least 12 %; else -1.
    center : numpy.ndarray
        Whether the centre of an object lies in the patch.
    thing : numpy.ndarray
        Index of the covering object in the scene, or -1.
    """

    shape: np.ndarray
    color: np.ndarray
    center: np.ndarray
    thing: np.ndarray


@dataclass(frozen=True)
class Scene:
    """Objects with their places; the picture follows from them and from the seed."""

    seed: int
    layout: str
    things: tuple[Thing, ...]

    @property
    def names(self) -> set[str]:
        return {thing.name for thing in self.things}

    def image(self) -> Image:
        """The scene as a 128x128 RGB picture."""
        require("pillow", "Drawing a scene")
        from PIL import Image

        return Image.fromarray(self.pixels())

    def pixels(self) -> np.ndarray:
        """The picture as uint8, shape (128, 128, 3)."""
        canvas = _background(self.seed, self.layout)
        for index, thing in enumerate(self.things):
            rng = _rng(self.seed, self.layout, _APPEARANCE, index)
            rows, columns, share = cover(thing, SIZE)
            color = (np.array(_RGB[thing.color]) + rng.uniform(-14, 14, 3)) * rng.uniform(0.88, 1.03)
            paint = color + rng.normal(0, 5, (*share.shape, 1))
            canvas[rows, columns] += share[..., None] * (paint - canvas[rows, columns])
        return np.rint(canvas.clip(0, 255)).astype(np.uint8)

    def labels(self) -> PatchLabels:
        """Labels per patch."""
        side = SIZE // PATCH
        covers = np.zeros((len(self.things) + 1, SIZE, SIZE))
        center = np.zeros((side, side), dtype=bool)
        for index, thing in enumerate(self.things):
            rows, columns, share = cover(thing, SIZE)
            covers[:index, rows, columns] *= 1 - share
            covers[index, rows, columns] = share
            center[int(thing.y) // PATCH, int(thing.x) // PATCH] = True
        shares = covers.reshape(-1, side, PATCH, side, PATCH).mean(axis=(2, 4))
        best = shares.argmax(axis=0)
        best[shares.max(axis=0) < _LEAST_COVER] = -1
        shapes = np.array([SHAPES.index(thing.shape) for thing in self.things] + [-1])
        colors = np.array([COLORS.index(thing.color) for thing in self.things] + [-1])
        return PatchLabels(shape=shapes[best], color=colors[best], center=center, thing=best)


def make_scene(seed: int, layout: str = "free") -> Scene:
    """Draw the objects of a scene.

    Parameters
    ----------
    seed : int
        From 0 on.
    layout : str
        "free": 3 to 7 objects anywhere, at least 1 px apart. In two of five such scenes some objects share a shape or
        a colour, so that near misses exist. "mosaic4": 4x4 cells with up to one object each; "mosaic2": 2x2 cells
        with 1 to 3 objects each.
    """
    if layout not in LAYOUTS:
        raise PatchError(f"unknown layout {layout!r}; give one of {', '.join(LAYOUTS)}.")
    if seed < 0:
        raise PatchError(f"the seed of a scene is 0 or more, got {seed}.")
    rng = _rng(seed, layout, _PLACES)
    if layout == "free":
        count = int(rng.integers(3, 8))
        places = _scatter(rng, count, 0, 0, SIZE)
        pairs = _pairs(rng, count)
        _share(rng, pairs)
    else:
        cells, side = _CELLS[layout], SIZE // _CELLS[layout]
        filled = rng.uniform(0.5, 1)
        places = []
        for cell in range(cells * cells):
            count = int(rng.integers(1, 4)) if layout == "mosaic2" else int(rng.random() < filled)
            places += _scatter(rng, count, cell % cells * side, cell // cells * side, side)
        pairs = _pairs(rng, len(places))
    things = []
    for (x, y, radius), (shape, color) in zip(places, pairs):
        turn = 0.6 if SHAPES[shape] in _UPRIGHT else np.pi
        things.append(Thing(SHAPES[shape], COLORS[color], x, y, radius, float(rng.uniform(-turn, turn))))
    return Scene(int(seed), layout, tuple(things))


def _rng(seed: int, layout: str, *stream: int) -> np.random.Generator:
    return np.random.default_rng([int(seed), LAYOUTS.index(layout) + 1, *stream])


def _scatter(rng: np.random.Generator, count: int, left: int, top: int, side: int) -> list[tuple[float, float, float]]:
    """Centre and radius of `count` objects inside a square, by rejection; starts over when one finds no room."""
    while True:
        places: list[tuple[float, float, float]] = []
        for _ in range(count):
            radius = rng.uniform(*_RADIUS)
            for _ in range(60):
                x, y = rng.uniform(radius + 1, side - radius - 1, 2)
                if all(np.hypot(x - u, y - v) >= radius + other + 1 for u, v, other in places):
                    places.append((float(x), float(y), float(radius)))
                    break
        if len(places) == count:
            return [(left + x, top + y, radius) for x, y, radius in places]


def _pairs(rng: np.random.Generator, count: int) -> list[list[int]]:
    """Independent uniform indices of shape and colour."""
    return [[int(rng.integers(len(SHAPES))), int(rng.integers(len(COLORS)))] for _ in range(count)]


def _share(rng: np.random.Generator, pairs: list[list[int]]) -> None:
    """In 40 % of the scenes, give 2 to 4 objects one shape (p 0.7) and one colour (p 0.55)."""
    if rng.random() >= 0.4:
        return
    chosen = rng.permutation(len(pairs))[: rng.integers(2, 5)]
    for part, probability in enumerate((0.7, 0.55)):
        if rng.random() < probability:
            for index in chosen:
                pairs[index][part] = pairs[chosen[0]][part]


def _background(seed: int, layout: str) -> np.ndarray:
    """Float picture without objects, shape (128, 128, 3); one background per cell, dark lines between cells."""
    cells = _CELLS[layout]
    side = SIZE // cells
    canvas = np.empty((SIZE, SIZE, 3))
    for cell in range(cells * cells):
        row, column = cell // cells * side, cell % cells * side
        canvas[row : row + side, column : column + side] = texture(_rng(seed, layout, _BACKGROUND, cell), side)
    for border in range(side, SIZE, side):
        canvas[border - 1 : border + 1] = 12
        canvas[:, border - 1 : border + 1] = 12
    return canvas
