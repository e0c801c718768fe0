"""How drawn scenes are painted: the texture behind the objects, the outlines of the shapes, the pixels they cover."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from infer_patch.evals.scenes import Thing

_SUPERSAMPLING = 3


def texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Grey with a tint, a smooth field, sometimes stripes, and noise; shape (side, side, 3)."""
    level = rng.uniform(25, 125) + rng.uniform(-14, 14, 3)
    knots = int(rng.integers(3, 8))
    spread = _cubic_weights(knots, side)
    light = rng.uniform(4, 22) * (spread @ rng.uniform(-1, 1, (knots, knots)) @ spread.T)
    if rng.random() < 0.35:
        amplitude, angle, period, phase = rng.uniform((3, 0, 4, 0), (9, np.pi, 24, 2 * np.pi))
        y, x = np.mgrid[:side, :side]
        light += amplitude * np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period + phase)
    light += rng.normal(0, rng.uniform(2, 9), (side, side))
    return level + light[..., None] + rng.normal(0, 2, (side, side, 3))


@cache
def _cubic_weights(knots: int, side: int) -> np.ndarray:
    """Weights of bicubic enlargement along one axis, shape (side, knots); rows sum to 1."""
    at = (np.arange(side) + 0.5) * knots / side - 0.5
    d = np.abs(at[:, None] - np.arange(knots))
    weights = np.where(d < 1, 1.5 * d**3 - 2.5 * d**2 + 1, np.where(d < 2, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2, 0))
    return weights / weights.sum(axis=1, keepdims=True)


def cover(thing: Thing, side: int) -> tuple[slice, slice, np.ndarray]:
    """The box of pixels around an object, and the share of each of them that it covers (from 3x3 samples)."""
    reach = 1.1 * thing.radius
    box = []
    for middle in (thing.y, thing.x):
        box.append(slice(max(int(middle - reach), 0), min(int(middle + reach) + 2, side)))
    rows, columns = box
    n = _SUPERSAMPLING
    dy = (np.arange(rows.start * n, rows.stop * n) + 0.5)[:, None] / n - thing.y
    dx = (np.arange(columns.start * n, columns.stop * n) + 0.5)[None, :] / n - thing.x
    sine, cosine = np.sin(thing.rotation), np.cos(thing.rotation)
    u, v = (cosine * dx + sine * dy) / thing.radius, (cosine * dy - sine * dx) / thing.radius
    inside = _OUTLINES[thing.shape](u, v)
    share = inside.reshape(rows.stop - rows.start, n, columns.stop - columns.start, n).mean(axis=(1, 3))
    return rows, columns, share


def _disc(u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    return u * u + v * v <= radius * radius


def _box(u: np.ndarray, v: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return (np.abs(u) <= half_width) & (np.abs(v) <= half_height)


def _polygon(corners: list[tuple[float, float]]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Test by the even-odd rule."""

    def inside(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        result = np.zeros(u.shape, dtype=bool)
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]):
            if y0 != y1:
                result ^= ((y0 > v) != (y1 > v)) & (u < (x1 - x0) * (v - y0) / (y1 - y0) + x0)
        return result

    return inside


def _spokes(*radii: float) -> list[tuple[float, float]]:
    """Corners at equal angles, clockwise from the top."""
    angles = 2 * np.pi * np.arange(len(radii)) / len(radii)
    return [(float(r * np.sin(a)), float(-r * np.cos(a))) for r, a in zip(radii, angles)]


_ARROW = [(-0.28, 1.0), (-0.28, -0.1), (-0.8, -0.1), (0.0, -1.0), (0.8, -0.1), (0.28, -0.1), (0.28, 1.0)]
_BOLT = [(0.25, -1.0), (-0.6, 0.15), (-0.08, 0.15), (-0.25, 1.0), (0.6, -0.2), (0.08, -0.2)]

_HEART_TIP = _polygon([(-0.9, -0.15), (0.9, -0.15), (0.0, 0.95)])

# Tests whether points lie inside, in units of the radius: u to the right, v downwards.
_OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda u, v: _disc(u, v, 0.95),
    "square": lambda u, v: _box(u, v, 0.75, 0.75),
    "triangle": _polygon(_spokes(1.05, 1.05, 1.05)),
    "star": _polygon(_spokes(*[1.05, 0.42] * 5)),
    "cross": lambda u, v: _box(u, v, 1.0, 0.33) | _box(u, v, 0.33, 1.0),
    "heart": lambda u, v: _disc(np.abs(u) - 0.45, v + 0.35, 0.5) | _HEART_TIP(u, v),
    "ring": lambda u, v: _disc(u, v, 0.96) & ~_disc(u, v, 0.55),
    "moon": lambda u, v: _disc(u, v, 1.0) & ~_disc(u - 0.5, v, 0.78),
    "arrow": _polygon(_ARROW),
    "bar": lambda u, v: _box(u, v, 1.0, 0.3),
    "frame": lambda u, v: _box(u, v, 0.74, 0.74) & ~_box(u, v, 0.41, 0.41),
    "bolt": _polygon(_BOLT),
}
