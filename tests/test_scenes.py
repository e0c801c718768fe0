import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest

from infer_patch.errors import PatchError
from infer_patch.evals.scenes import COLORS, PATCH, SHAPES, SIZE, Scene, Thing, make_scene

DRAWN = {layout: [make_scene(seed, layout) for seed in range(300)] for layout in ("free", "mosaic2", "mosaic4")}
ALL = [scene for scenes in DRAWN.values() for scene in scenes]


@pytest.mark.parametrize("layout", DRAWN)
def test_equal_seeds_give_equal_scenes(layout):
    first, again, other = make_scene(7, layout), make_scene(7, layout), make_scene(8, layout)
    assert first == again
    assert first != other
    assert np.array_equal(first.pixels(), again.pixels())
    assert not np.array_equal(first.pixels(), other.pixels())


def test_the_picture_is_the_same_in_every_process():
    """Values written down once: a change here makes old results incomparable."""
    scene = make_scene(3)
    assert sorted(scene.names) == ["cyan frame", "red arrow", "white heart", "yellow ring"]
    assert (round(scene.things[0].x, 3), round(scene.things[0].radius, 3)) == (47.481, 12.272)
    assert scene.pixels()[::32, ::32, 0].tolist() == [
        [86, 76, 79, 84],
        [86, 76, 243, 85],
        [80, 73, 63, 84],
        [82, 84, 84, 70],
    ]


def test_image():
    image = make_scene(0).image()
    assert (image.size, image.mode) == ((SIZE, SIZE), "RGB")


def test_counts():
    assert {len(scene.things) for scene in DRAWN["free"]} == {3, 4, 5, 6, 7}
    assert {len(scene.things) for scene in DRAWN["mosaic2"]} <= set(range(4, 13))
    assert {len(scene.things) for scene in DRAWN["mosaic4"]} <= set(range(17))
    assert max(len(scene.things) for scene in DRAWN["mosaic4"]) == 16


def test_every_shape_and_color_occurs_about_equally_often():
    things = [thing for scene in ALL for thing in scene.things]
    for names, parts in ((SHAPES, [t.shape for t in things]), (COLORS, [t.color for t in things])):
        counts = Counter(parts)
        assert set(counts) == set(names)
        assert max(counts.values()) < 1.3 * min(counts.values())
    assert len({thing.name for thing in things}) == len(SHAPES) * len(COLORS)
    assert len(set(SHAPES)) == 12 and len(set(COLORS)) == 8


def test_objects_keep_apart_and_inside_of_their_cell():
    for scene in ALL:
        side = {"free": 128, "mosaic2": 64, "mosaic4": 32}[scene.layout]
        for one, other in itertools.combinations(scene.things, 2):
            assert math.dist((one.x, one.y), (other.x, other.y)) >= one.radius + other.radius + (scene.layout == "free")
        for thing in scene.things:
            assert 7.5 <= thing.radius <= 13.5
            assert thing.radius <= thing.x % side <= side - thing.radius
            assert thing.radius <= thing.y % side <= side - thing.radius
            assert abs(thing.rotation) <= (0.6 if thing.shape in ("heart", "bolt") else math.pi)


def test_mosaic_cells():
    for layout, cells, allowed in (("mosaic2", 2, {1, 2, 3}), ("mosaic4", 4, {0, 1})):
        for scene in DRAWN[layout]:
            per_cell = Counter((int(t.x * cells / SIZE), int(t.y * cells / SIZE)) for t in scene.things)
            assert {per_cell[cell] for cell in itertools.product(range(cells), repeat=2)} <= allowed


def test_free_scenes_hold_near_misses():
    repeated = [len({thing.shape for thing in scene.things}) < len(scene.things) for scene in DRAWN["free"]]
    assert sum(repeated) / len(repeated) > 0.65  # 0.59 if all were independent
    assert any(len(scene.names) < len(scene.things) for scene in DRAWN["free"])


@pytest.mark.parametrize(
    "change",
    [{"shape": "ring"}, {"color": "blue"}, {"x": 60.4}, {"y": 66.0}, {"radius": 12.0}, {"rotation": 0.5}],
    ids=lambda change: next(iter(change)),
)
def test_the_image_follows_the_things(change):
    thing = Thing("star", "red", 60.0, 64.0, 11.0, 0.2)
    scene = Scene(5, "free", (thing,))
    other = dataclasses.replace(scene, things=(dataclasses.replace(thing, **change),))
    differs = (scene.pixels() != other.pixels()).any(axis=2)
    assert differs.any()
    assert not differs[:40].any() and not differs[:, 90:].any()  # the background stays


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines(shape):
    """The farthest pixel lies near the radius, and the outline covers neither a sliver nor the whole disc."""
    for rotation in (0.0, 0.5):
        scene = Scene(1, "free", (Thing(shape, "white", 64.0, 64.0, 13.0, rotation),))
        empty = dataclasses.replace(scene, things=())
        changed = np.argwhere((np.abs(scene.pixels().astype(int) - empty.pixels()) > 20).any(axis=2))
        reach = np.hypot(*(changed + 0.5 - 64).T).max() / 13
        assert 0.85 < reach < 1.15, reach
        assert 0.15 < len(changed) / (math.pi * 13**2) < 1


def test_labels():
    scene = Scene(
        0, "free", (Thing("square", "red", 36.0, 68.0, 13.0, 0.0), Thing("bar", "cyan", 96.0, 20.0, 10.0, 0.0))
    )
    labels = scene.labels()
    assert labels.shape.shape == labels.color.shape == labels.center.shape == (SIZE // PATCH, SIZE // PATCH)
    row, column = 68 // PATCH, 36 // PATCH
    assert SHAPES[labels.shape[row, column]] == "square" and COLORS[labels.color[row, column]] == "red"
    assert labels.thing[row, column] == 0 and labels.thing[20 // PATCH, 96 // PATCH] == 1
    assert np.argwhere(labels.center).tolist() == [[2, 12], [8, 4]]
    covered = labels.shape == SHAPES.index("square")
    assert covered.sum() == 9 and covered[7:10, 3:6].all()
    assert (labels.shape[~covered & (labels.thing < 0)] == -1).all()


def test_refusals():
    with pytest.raises(PatchError, match="unknown layout 'grid'; give one of free, mosaic2, mosaic4"):
        make_scene(0, "grid")
    with pytest.raises(PatchError, match="0 or more, got -1"):
        make_scene(-1)
