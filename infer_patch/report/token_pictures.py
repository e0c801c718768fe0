"""Pictures over which the dropped visual tokens are darkened, in files small enough to stand in a page."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from infer_patch.visual_grid import Grid

Colour = tuple[int, int, int]

SIDE = 224  # pixels of the longer side, at most
_SMALL = 20_000  # bytes that a PNG may have; what is larger (photographs) becomes a JPEG
_PAINT = 0.75  # of a dropped cell; the rest is the picture in grey
_HEAT = 0.6  # of a cell that is coloured by a value
_DARK = (22, 26, 36)
_HATCH, _LINE = 7, 26  # pixels between two lines, and how much brighter they are
# dark to bright, readable without colour vision: from the first layer that dropped something to the last
_BY_LAYER = ((52, 22, 84), (122, 40, 110), (190, 62, 92), (232, 112, 62), (246, 190, 84))


def fitted(picture: Any, grid: Grid | None) -> Any:
    """A PIL image scaled to SIDE pixels or less, a whole number of pixels per cell where the grid is that coarse."""
    from PIL import Image

    width, height = picture.size
    if grid is None:
        scale = min(1.0, SIDE / max(width, height))
        size = max(1, round(width * scale)), max(1, round(height * scale))
    else:
        longer = max(grid.rows, grid.columns)
        cell = SIDE // longer if longer <= SIDE else SIDE / longer
        size = max(1, round(grid.columns * cell)), max(1, round(grid.rows * cell))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def darkened(picture: Any, grid: Grid, left_at: Sequence[int | None], colours: Mapping[int, Colour]) -> Any:
    """The fitted picture with the cells of dropped tokens darkened, in the colour of the layer where they left.

    Parameters
    ----------
    left_at : sequence of int or None
        Per token of the picture, in order, the layer that was the first to run without it; None: it stayed.
    colours : mapping
        One per layer, from `layer_colours`.
    """
    from PIL import Image

    shown = fitted(picture, grid)
    cells = np.zeros((grid.rows * grid.columns, 4), dtype=np.uint8)
    for cell, layer in enumerate(left_at[grid.leading :]):
        if layer is not None:
            cells[cell] = (*colours[layer], 255)
    cover = Image.fromarray(cells.reshape(grid.rows, grid.columns, 4)).resize(shown.size, Image.Resampling.NEAREST)
    paint, pixels = np.asarray(cover, dtype=float), np.asarray(shown, dtype=float)
    grey = pixels @ np.array([[0.299], [0.587], [0.114]])
    painted = _PAINT * paint[..., :3] + (1 - _PAINT) * grey
    if len(colours) == 1:  # lines, which tell dark paint from a dark picture
        down, across = np.indices(painted.shape[:2])
        painted[(down + across) % _HATCH == 0] += _LINE
    mixed = np.where(paint[..., 3:] > 0, painted, pixels)
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def layer_colours(layers: Iterable[int]) -> dict[int, Colour]:
    """A colour for every layer that dropped something, first to last: plain dark where it is a single one."""
    layers = sorted(set(layers))
    if len(layers) < 2:
        return dict.fromkeys(layers, _DARK)
    stops = np.linspace(0, len(layers) - 1, len(_BY_LAYER))
    channels = [np.interp(range(len(layers)), stops, [c[i] for c in _BY_LAYER]) for i in range(3)]
    return {layer: (round(r), round(g), round(b)) for layer, r, g, b in zip(layers, *channels)}


def encoded(picture: Any) -> tuple[bytes, str]:
    """A PIL image as bytes, and the ending of its file: png, or jpg where that would be large."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    if stream.tell() <= _SMALL:
        return stream.getvalue(), "png"
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=85, optimize=True)
    return stream.getvalue(), "jpg"


def heated(picture: Any, grid: Grid, values: Sequence[float], outlined: Sequence[bool] = ()) -> Any:
    """The fitted picture in grey, under a colour for each cell: dark for nothing, bright for the highest value.

    Parameters
    ----------
    values : sequence of float
        One per token of the picture, in order, 0 or more.
    outlined : sequence of bool, optional
        Likewise: whose cells get a white frame.
    """
    from PIL import Image, ImageDraw

    shown = fitted(picture, grid)
    cells = np.asarray(values[grid.leading :], dtype=float)
    share = cells / max(cells.max(initial=0.0), 1e-12)
    stops = np.linspace(0, 1, len(_BY_LAYER))
    paint = np.stack([np.interp(share, stops, [c[i] for c in _BY_LAYER]) for i in range(3)], -1)
    cover = Image.fromarray(paint.reshape(grid.rows, grid.columns, 3).round().astype(np.uint8))
    colours = np.asarray(cover.resize(shown.size, Image.Resampling.NEAREST), dtype=float)
    grey = np.asarray(shown, dtype=float) @ np.array([[0.299], [0.587], [0.114]])
    mixed = _HEAT * colours + (1 - _HEAT) * grey
    found = Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))
    pen, (wide, high) = ImageDraw.Draw(found), (found.width / grid.columns, found.height / grid.rows)
    for cell, framed in enumerate(outlined[grid.leading :]):
        if framed:
            row, column = divmod(cell, grid.columns)
            corner = round((column + 1) * wide) - 1, round((row + 1) * high) - 1
            pen.rectangle((round(column * wide), round(row * high), *corner), outline=(255, 255, 255))
    return found
