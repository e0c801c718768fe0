"""The multimodal needle: places are where the pictures show them, half the items have none, every answer is counted."""

import pytest

from infer_patch.errors import PatchError
from infer_patch.evals.mm_needle import MMNeedle, parse, parse_demo, parse_lenient
from infer_patch.evals.scenes import SIZE


class Processor:
    image_processor = None


def items(**options):
    return MMNeedle(**options).items(Processor(), None)


def rows(task, answers):
    found = []
    for item in task.items(Processor(), None):
        output = answers(item)
        row = {"item": item.name, "group": item.group, "reference": item.reference, "facts": item.facts}
        found.append({**row, "output": output, "score": task.score(item, output)})
    return found


def truth(item):
    return "-1" if item.reference is None else ", ".join(map(str, item.reference))


@pytest.mark.parametrize(
    "output, strict, lenient",
    [
        ("1, 2, 3", (1, 2, 3), (1, 2, 3)),
        ("1,2,3.\n", (1, 2, 3), (1, 2, 3)),
        ("-1", (-1, -1, -1), (-1, -1, -1)),
        ("-1.", (-1, -1, -1), (-1, -1, -1)),
        ("Image 1, row 2, column 3", None, (1, 2, 3)),
        ("It is -1, none", None, (-1, -1, -1)),
        ("1, 2", None, None),
        ("", None, None),
    ],
)
def test_parsers(output, strict, lenient):
    assert parse(output) == strict
    assert parse_lenient(output) == lenient


def test_the_demo_models_answers():
    assert parse_demo("row 2 column 3", 1) == (1, 2, 3)
    assert parse_demo("none", 1) == (-1, -1, -1)
    assert parse_demo("second", 2) == (2, 0, 0)
    assert parse_demo("red", 2) is None and parse_demo("second", 1) is None


def test_needles_are_where_the_reference_says():
    found = items(images=(1, 2), grids=(1, 2, 4), samples=6)
    assert len(found) == 5 * 6 and len({item.name for item in found}) == 30
    assert sum(item.reference is None for item in found) == 15
    for item in found:
        assert len(item.prompt.images) == item.facts["images"]
        assert all(image.size == (SIZE, SIZE) for image in item.prompt.images)
        if item.reference is not None:
            image, row, column = item.reference
            assert 1 <= image <= item.facts["images"] and 1 <= row <= item.facts["grid"] >= column >= 1
        assert item.facts["needle"] in item.prompt.text


def test_the_place_is_that_of_the_drawing():
    """The cell of the reference holds the object's colour, and the seed alone decides."""
    import numpy as np

    from infer_patch.evals import scenes

    for item in items(images=(1,), grids=(2,), samples=40):
        if item.reference is None:
            continue
        colour = np.array(scenes._RGB[item.facts["needle"].split()[0]])
        near = (
            (np.abs(np.asarray(item.prompt.images[0], float) - colour).max(-1) < 45).reshape(2, 64, 2, 64).sum((1, 3))
        )
        _, row, column = item.reference
        assert near[row - 1, column - 1] > 15
    one, two = (items(images=(1,), grids=(4,), samples=4) for _ in range(2))
    assert [(i.reference, i.prompt.text, i.prompt.images[0].tobytes()) for i in one] == [
        (i.reference, i.prompt.text, i.prompt.images[0].tobytes()) for i in two
    ]


def test_metrics_of_known_answers():
    task = MMNeedle(images=(1, 2), grids=(2,), samples=4)
    right = task.metrics(rows(task, truth))
    assert {right[f"{name}_accuracy"] for name in ("index", "existence", "exact", "lenient_exact")} == {1}
    assert right["format_error_rate"] == 0
    silent = task.metrics(rows(task, lambda _: ""))
    assert silent["index_accuracy"] == silent["existence_accuracy"] == 0 and silent["format_error_rate"] == 1
    never = task.metrics(rows(task, lambda _: "-1"))
    assert never["index_accuracy"] == never["existence_accuracy"] == never["exact_accuracy"] == 0.5
    chatty = task.metrics(rows(task, lambda item: f"Surely {truth(item)}"))
    assert (chatty["exact_accuracy"], chatty["lenient_exact_accuracy"], chatty["format_error_rate"]) == (0, 1, 1)
    assert right["M 2, N 2/exact_accuracy"] == 1


def test_the_demo_model_is_not_scored_on_what_it_was_not_asked():
    task = MMNeedle(images=(2,), grids=(1,), samples=4, wording="demo")
    found = rows(task, lambda item: ("first", "second")[item.reference[0] - 1])
    assert all(row["score"]["exact"] is None and row["score"]["existence"] is None for row in found)
    assert task.metrics(found)["index_accuracy"] == 1 and "exact_accuracy" not in task.metrics(found)


def test_heat_map_is_of_the_finest_grid_in_one_picture():
    task = MMNeedle(images=(1,), grids=(2, 4), samples=20)
    axes, cells = task.grid(rows(task, truth))
    assert axes["x"] == [1, 2, 3, 4] and {cell for row in cells for cell in row} <= {1.0, None}
    assert MMNeedle(images=(2,), grids=(2,)).grid([]) is None


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(wording="polite"), "wording must be one of general, demo"),
        (dict(grids=(3,)), "grids of"),
        (dict(images=(3,), wording="demo"), "one or two images"),
        (dict(images=(1,), grids=(1,)), "more than one picture or more than one cell"),
    ],
)
def test_refused(options, words):
    with pytest.raises(PatchError, match=words):
        MMNeedle(**options)
