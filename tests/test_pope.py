import gzip
import json
import random
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from infer_patch.availability import is_available
from infer_patch.errors import MissingDependencyError, PatchError
from infer_patch.evals import pope
from infer_patch.evals.pope import Pope, PopeHub
from infer_patch.evals.pope_questions import SPLITS, Question, read_questions, unique_pairs
from infer_patch.evals.pope_scenes import PopeScenes, wording
from infer_patch.evals.pope_scores import binary_metrics, exact, official, parsed, strict

FILES = tuple(Path(__file__).parent / "data" / "pope" / f"coco_pope_{split}.json.gz" for split in SPLITS)
VISION = SimpleNamespace(image_processor=None)
ROW = {"question_id": 1, "image": "a.jpg", "text": "Is there a cat in the image?", "label": "yes"}


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def scored(task, items, answers):
    """Rows as `metrics` sees them, after a way through JSON."""
    rows = [
        {
            "item": item.name,
            "group": item.group,
            "reference": item.reference,
            "facts": item.facts,
            "output": answer,
            "score": task.score(item, answer),
        }
        for item, answer in zip(items, answers)
    ]
    return json.loads(json.dumps(rows))


@pytest.fixture(scope="module")
def rows():
    return [row for file in FILES for row in read_questions(file)]


@pytest.fixture(scope="module")
def scenes():
    return PopeScenes(scenes=12, seed=3).items(VISION, None)


@pytest.fixture
def folder(tmp_path):
    """Two pictures, and two splits that share three of five pairs."""
    for number, name in enumerate(("a.jpg", "b.jpg")):
        Image.new("RGB", (8, 6), (90 * number, 0, 0)).save(tmp_path / name)
    cat, dog, cow = ("Is there a cat in the image?", "Is there a dog in the image?", "Is there a cow in the image?")
    first = [("a.jpg", cat, "yes"), ("a.jpg", dog, "no"), ("b.jpg", cat, "yes"), ("b.jpg", cow, "no")]
    second = [("a.jpg", cat, "yes"), ("a.jpg", cow, "no"), ("b.jpg", cat, "yes"), ("b.jpg", cow, "no")]
    for split, table in (("random", first), ("popular", second)):
        write(
            tmp_path / f"x_{split}.json", *({"image": image, "text": text, "label": yes} for image, text, yes in table)
        )
    return tmp_path


@pytest.mark.parametrize(
    ("text", "by_official", "by_exact", "by_strict", "is_parsed"),
    [
        ("Yes", True, True, True, True),
        ("yes", True, True, True, True),
        (" YES\n", True, True, True, True),
        ("Yes.", True, None, True, True),
        ("no", False, False, False, True),
        ("No", False, False, False, True),
        ("NO", True, False, False, True),
        ("No, there is not.", False, None, False, True),
        ("no , there is no red star .", False, None, False, True),
        ("There is not a cat", False, None, None, False),
        ("It isn't there", True, None, None, False),
        ("", True, None, None, False),
        ("garbage", True, None, None, False),
        ("Yes. No", True, None, None, True),
        ("Well. No", True, None, False, True),
        ("Nothing is known yesterday", True, None, None, False),
        ("-no!", True, None, False, True),
    ],
)
def test_parsers(text, by_official, by_exact, by_strict, is_parsed):
    assert (official(text), exact(text), strict(text), parsed(text)) == (by_official, by_exact, by_strict, is_parsed)


def test_official_parser_takes_words_at_single_spaces_only():
    assert official("No\n") and official("no-one") and official("Not here")
    assert not official("well,  no") and not official("It's, not")


def test_score_strips_the_output_first():
    item = SimpleNamespace(reference="no")
    assert Pope((), Path()).score(item, " No\n") == {
        "correct": True,
        "yes": False,
        "exact": False,
        "strict": False,
        "parsed": True,
    }


def test_binary_metrics_by_hand():
    labels = [True] * 4 + [False] * 6
    predictions = [True, True, True, False, True, True, False, False, False, False]
    assert binary_metrics(labels, predictions) == pytest.approx(
        {"accuracy": 0.7, "precision": 0.6, "recall": 0.75, "f1": 2 / 3, "yes_ratio": 0.5}
    )


def test_binary_metrics_never_divide_by_zero():
    assert set(binary_metrics([], []).values()) == {0.0}
    assert binary_metrics([False], [False]) == {"accuracy": 1, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}
    with pytest.raises(PatchError, match="1 labels and 0 predictions"):
        binary_metrics([True], [])


def test_official_files_have_the_counts_of_the_paper(rows):
    assert len(rows) == 9000
    assert Counter((row.split, row.label) for row in rows) == {
        (split, label): 1500 for split in SPLITS for label in ("yes", "no")
    }
    pairs = unique_pairs(rows)
    assert Counter(pair.label for pair in pairs) == {"yes": 1500, "no": 3627}
    assert len({(pair.image, pair.text) for pair in pairs}) == 5127
    assert sum(sum(pair.splits.values()) for pair in pairs) == 9000
    assert all(set(pair.splits) == set(SPLITS) for pair in pairs if pair.label == "yes")
    images = [pair.image for pair in pairs]
    assert sum(1 for _ in groupby(images)) == len(set(images)) == 500


def test_answers_to_unique_pairs_give_the_metrics_of_all_rows(rows):
    rng, task = random.Random(0), Pope((), Path())
    items = pope.make_items(unique_pairs(rows), dict.fromkeys({row.image for row in rows}), "")
    said = [rng.choice([item.reference, "yes", "No.", "", "NO"]) for item in items]
    result = task.metrics(scored(task, items, said))

    answer_to = {item.name: answer for item, answer in zip(items, said)}
    for split in SPLITS:
        table = [(row.label == "yes", answer_to[f"{row.image}|{row.text}"]) for row in rows if row.split == split]
        hits = sum(label and official(answer) for label, answer in table)
        claimed = sum(official(answer) for _, answer in table)
        assert result[f"{split}/accuracy"] == pytest.approx(sum(y == official(a) for y, a in table) / 3000)
        assert result[f"{split}/precision"] == pytest.approx(hits / claimed)
        assert result[f"{split}/recall"] == pytest.approx(hits / 1500)
        assert result[f"{split}/yes_ratio"] == pytest.approx(claimed / 3000)
    for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert result[name] == pytest.approx(sum(result[f"{split}/{name}"] for split in SPLITS) / 3)
    everything = [(row.label == "yes", answer_to[f"{row.image}|{row.text}"]) for row in rows]
    assert result["unparsed_rate"] == pytest.approx(sum(a == "" for _, a in everything) / 9000)
    assert result["exact_accuracy"] == pytest.approx(sum(exact(a) is y for y, a in everything) / 9000)
    assert result["strict_accuracy"] == pytest.approx(sum((strict(a) is True) == y for y, a in everything) / 9000)


@pytest.mark.parametrize(("answer", "unparsed"), [("Yes", 0), ("", 1), ("garbage", 1)])
def test_a_model_that_never_says_no(scenes, answer, unparsed):
    result = PopeScenes().metrics(scored(PopeScenes(), scenes, [answer] * len(scenes)))
    assert (result["accuracy"], result["recall"], result["yes_ratio"]) == (0.5, 1, 1)
    assert result["f1"] == pytest.approx(2 / 3)
    assert result["unparsed_rate"] == unparsed
    assert result["exact_accuracy"] == (0 if unparsed else 0.5)


def test_a_pair_counts_as_often_as_a_split_holds_it():
    twice = Question("random", "a", "?", "yes")
    pairs = unique_pairs([twice, twice, Question("random", "a", "??", "no"), Question("popular", "a", "?", "yes")])
    assert [dict(pair.splits) for pair in pairs] == [{"random": 2, "popular": 1}, {"random": 1}]
    items = pope.make_items(pairs, {"a": None}, "")
    result = PopeHub().metrics(scored(PopeHub(), items, ["yes", "yes"]))
    assert result["random/accuracy"] == pytest.approx(2 / 3)
    assert result["accuracy"] == pytest.approx((2 / 3 + 1) / 2)


def test_metrics_of_nothing_are_refused():
    with pytest.raises(PatchError, match="no answers"):
        PopeHub().metrics([])


def test_items_of_official_files(folder):
    task = Pope((folder / "x_random.json", folder / "x_popular.json"), folder)
    items = task.items(VISION, None)
    assert [(item.group, item.reference, item.facts["splits"]) for item in items] == [
        ("a.jpg", "yes", {"random": 1, "popular": 1}),
        ("a.jpg", "no", {"random": 1}),
        ("a.jpg", "no", {"popular": 1}),
        ("b.jpg", "yes", {"random": 1, "popular": 1}),
        ("b.jpg", "no", {"random": 1, "popular": 1}),
    ]
    assert items[0].name == items[0].prompt.name == "a.jpg|Is there a cat in the image?"
    assert items[0].prompt.text == ("Is there a cat in the image?\nAnswer the question using a single word or phrase.")
    assert items[0].prompt.images[0] is items[1].prompt.images[0]
    assert items[4].prompt.images[0].convert("RGB").size == (8, 6)


def test_pictures_are_sampled_with_all_their_rows(rows, tmp_path):
    for row in rows:
        if not (tmp_path / row.image).exists():
            Image.new("L", (1, 1)).save(tmp_path / row.image)
    draw = [Pope(FILES, tmp_path, limit_images=7, seed=seed).items(VISION, None) for seed in (0, 0, 1)]
    names = [[item.name for item in items] for items in draw]
    assert names[0] == names[1] != names[2]
    kept = {item.group for item in draw[0]}
    assert len(kept) == 7
    assert sum(sum(item.facts["splits"].values()) for item in draw[0]) == 7 * 18
    reversed_files = Pope(FILES[::-1], tmp_path, limit_images=7).items(VISION, None)
    assert {item.group for item in reversed_files} == kept


def test_refusals(folder):
    file = folder / "x_random.json"
    with pytest.raises(PatchError, match="text only"):
        Pope((file,), folder).items(SimpleNamespace(), None)
    with pytest.raises(PatchError, match="one file per split"):
        Pope((file, file), folder).items(VISION, None)
    with pytest.raises(PatchError, match="from 1 on"):
        Pope((file,), folder, limit_images=0).items(VISION, None)
    (folder / "b.jpg").write_text("no picture")
    with pytest.raises(PatchError, match=r"b\.jpg could not be read"):
        Pope((file,), folder).items(VISION, None)
    (folder / "b.jpg").unlink()
    with pytest.raises(PatchError, match=r"1 of 2 pictures are not in .*b\.jpg.*val2014"):
        Pope((file,), folder).items(VISION, None)
    with pytest.raises(PatchError, match="from 1 on"):
        PopeScenes(scenes=0).items(VISION, None)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: image, text, label missing"),
        ({"image": "a.jpg", "text": "?"}, "line 2: label missing"),
        (ROW | {"label": "maybe"}, "line 2: the label is 'maybe'"),
        (ROW | {"label": None}, "line 2: the label is None"),
        (ROW | {"image": 3}, "line 2: image is 3"),
    ],
)
def test_broken_rows_are_named(tmp_path, second, message):
    with pytest.raises(PatchError, match=message):
        read_questions(write(tmp_path / "pope.json", ROW, second))


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(PatchError, match="could not be read"):
        read_questions(tmp_path / "none.json")
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(json.dumps(ROW).encode())[:-9])
    with pytest.raises(PatchError, match="could not be read"):
        read_questions(tmp_path / "cut.json.gz")
    with pytest.raises(PatchError, match="holds no questions"):
        read_questions(write(tmp_path / "empty.json", "\n"))


def test_split_comes_from_the_file_name(tmp_path):
    assert read_questions(write(tmp_path / "aokvqa_pope_seem_popular.json", ROW))[0].split == "popular"
    assert read_questions(write(tmp_path / "mine.json", ROW | {"label": "Yes"})) == [
        Question("mine", "a.jpg", ROW["text"], "yes")
    ]


def test_contradicting_labels_are_refused():
    with pytest.raises(PatchError, match='"yes" in random and "no" in popular'):
        unique_pairs([Question("random", "a", "?", "yes"), Question("popular", "a", "?", "no")])


def test_hub_rows_become_the_same_items(folder, monkeypatch):
    """With a stand-in for `datasets`: the columns of lmms-lab/POPE, pictures as encoded bytes."""
    files = Pope((folder / "x_random.json", folder / "x_popular.json"), folder, max_new_tokens=3)
    columns = {name: [] for name in ("category", "question", "answer", "image_source", "image")}
    for file in files.files:
        for row in read_questions(file):
            cell = {"bytes": (folder / row.image).read_bytes(), "path": None}
            for name, value in zip(columns, (row.split, row.text, row.label, row.image, cell)):
                columns[name].append(value)

    class Table:
        column_names = tuple(columns)

        def __getitem__(self, key):
            return columns[key] if isinstance(key, str) else {name: column[key] for name, column in columns.items()}

        def cast_column(self, name, feature):
            assert (name, feature) == ("image", {"decode": False})
            return self

    calls = []
    fake = SimpleNamespace(
        Image=lambda decode: {"decode": decode},
        load_dataset=lambda name, **options: calls.append((name, options)) or Table(),
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(pope, "require", lambda name, why: None)
    items = PopeHub(revision="abc").items(VISION, None)
    assert calls == [("lmms-lab/POPE", {"split": "test", "revision": "abc"})]
    assert [(i.name, i.reference, i.facts) for i in items] == [
        (i.name, i.reference, i.facts) for i in files.items(VISION, None)
    ]
    assert items[0].prompt.images[0].convert("RGB").size == (8, 6)

    Table.column_names = ("question",)
    with pytest.raises(PatchError, match="lacks the columns"):
        PopeHub().items(VISION, None)


@pytest.mark.skipif(is_available("datasets"), reason="datasets is installed")
def test_hub_needs_datasets():
    with pytest.raises(MissingDependencyError, match="POPE from the hub needs the package 'datasets'"):
        PopeHub().items(VISION, None)


def test_scenes_are_balanced_and_true(scenes):
    pictures = {item.group: item for item in scenes}
    assert len(pictures) == 12
    for split in SPLITS:
        counts = Counter((item.group, item.reference) for item in scenes if split in item.facts["splits"])
        assert set(counts.values()) == {3} and len(counts) == 24
    assert {times for item in scenes for times in item.facts["splits"].values()} == {1}
    for item in scenes:
        scene = pope_scene(item.group)
        assert (thing_of(item) in scene.names) == (item.reference == "yes")
        assert item.prompt.text == wording(thing_of(item))
        assert item.prompt.images[0].size == scene.image().size
        assert item.prompt.images[0].tobytes() == scene.image().tobytes()


def test_popular_objects_are_the_most_frequent_absent_ones(scenes):
    names = {item.group: set(pope_scene(item.group).names) for item in scenes}
    frequency = Counter(name for present in names.values() for name in present)
    for group, present in names.items():
        asked = {thing_of(item) for item in scenes if item.group == group and "popular" in item.facts["splits"]}
        left_out = set(frequency) - present - asked
        assert min(frequency[name] for name in asked - present) >= max(frequency[name] for name in left_out)


def test_adversarial_objects_share_shape_or_colour(scenes):
    for group in {item.group for item in scenes}:
        asked = [item for item in scenes if item.group == group and "adversarial" in item.facts["splits"]]
        there = [set(thing_of(item).split()) for item in asked if item.reference == "yes"]
        others = [set(thing_of(item).split()) for item in asked if item.reference == "no"]
        assert all(any(len(other & thing) == 1 for thing in there) for other in others)


def test_scenes_depend_on_the_seed_alone(scenes):
    again = PopeScenes(scenes=12, seed=3).items(VISION, None)
    assert [(i.name, i.reference, i.facts) for i in again] == [(i.name, i.reference, i.facts) for i in scenes]
    assert {i.group for i in PopeScenes(scenes=12, seed=4).items(VISION, None)}.isdisjoint(i.group for i in scenes)
    assert len({item.name for item in scenes}) == len(scenes)


def test_wording():
    assert wording("red star") == "is there a red star in the image ?"
    assert wording("orange star") == "is there an orange star in the image ?"


def pope_scene(name):
    from infer_patch.evals.scenes import make_scene

    return make_scene(int(name.removeprefix("scene_")), layout="free")


def thing_of(item):
    return " ".join(item.prompt.text.split()[3:5])
