"""Questions of hub data sets: layouts that are understood, and what is refused. Nothing is downloaded."""

import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from infer_patch.availability import is_available
from infer_patch.calibration import hub_questions as module
from infer_patch.calibration.hub_questions import hub_questions
from infer_patch.cli import app
from infer_patch.errors import MissingDependencyError, PatchError

NAMED = SimpleNamespace(names=["negative", "very_positive"])


class Table:
    def __init__(self, rows, **features):
        self.rows, self.features = rows, features

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.rows[row]


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for `datasets`: tables by (name, configuration, split)."""
    tables = {}

    def load_dataset(path, configuration, split):
        if (path, configuration, split) not in tables:
            raise ValueError(f"no {path}")
        return tables[path, configuration, split]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(module, "require", lambda name, why: None)
    return tables


MULTIPLE = "Question: What flies?\nA. a stone\nB. a bird\nAnswer:"


@pytest.mark.parametrize(
    "row",
    [
        {"question": "What flies?", "choices": ["a stone", "a bird"], "answer": 1, "subject": "x"},
        {
            "question_stem": " What flies?",
            "choices": {"text": ["a stone", "a bird"], "label": ["A", "B"]},
            "answerKey": "B",
        },
        {"question": "What flies?", "choices": {"text": ["a stone", "a bird"], "label": ["1", "2"]}, "answerKey": "2"},
        {"ctx": "What flies?", "endings": ["a stone ", "a bird"], "label": "1"},
        {"query": "What flies?", "options": ["a stone", "a bird"], "answer": "a bird"},
        {"goal": "What flies?", "choices": ["a stone", "a bird"], "gold": "B"},
    ],
)
def test_layouts_of_multiple_choice(hub, row):
    hub["some/name", "main", "train"] = Table([row])
    found = hub_questions("some/name:main:train", 5)
    assert list(found) == ["some/name:main:train"]
    (question,) = found["some/name:main:train"]
    assert (question.prompt, question.choices, question.answer) == (MULTIPLE, (" A", " B"), 1)


def test_labelled_texts_and_several_data_sets(hub):
    hub["a", None, "test"] = Table([{"sentence": " Good. ", "label": 1, "idx": 0}], label=NAMED)
    hub["b", None, "test"] = Table([{"question": "?", "choices": ["x", "y"], "answer": 0}] * 9)
    found = hub_questions("a:test, b:test", 4)
    (question,) = found["a:test"]
    assert question.prompt == "Text: Good.\nLabel (negative, very positive):"
    assert (question.choices, question.answer) == ((" negative", " very positive"), 1)
    assert len(found["b:test"]) == 4


def test_draws_follow_the_seed_and_repeat_nothing(hub):
    rows = [{"question": f"{i}?", "choices": ["x", "y"], "answer": 0} for i in range(50)]
    hub["b", None, "test"] = Table(rows)
    draws = [[q.prompt for q in hub_questions("b:test", 10, seed)["b:test"]] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2] and len(set(draws[0])) == 10


@pytest.mark.parametrize(
    "row, words",
    [
        ({"premise": "x", "label": 0}, r"expected a question .* got the columns \['label', 'premise'\]"),
        ({"text": "x", "label": -1}, "expected a question"),
        ({"question": "?", "choices": ["x", "y"], "answer": -1}, "which is right"),
        ({"question": "?", "choices": ["x", "y"], "answer": "C"}, "which is right"),
        ({"question": "?", "choices": ["x"], "answer": 0}, "2 or more choices"),
        ({"question": "?", "choices": "x or y", "answer": 0}, "2 or more choices"),
    ],
)
def test_what_is_not_understood_is_refused(hub, row, words):
    hub["a", None, "test"] = Table([row], label=NAMED)
    with pytest.raises(PatchError, match=f"a:test, row 0: .*{words}"):
        hub_questions("a:test", 5)


@pytest.mark.parametrize("name", ["", "a", "a:", ":test", "a:b:c:d", "a:test,b"])
def test_names_need_a_split(name):
    with pytest.raises(PatchError, match="NAME:SPLIT or NAME:CONFIGURATION:SPLIT, got"):
        hub_questions(name, 5)


def test_data_sets_that_cannot_be_had(hub):
    hub["empty", None, "test"] = Table([])
    with pytest.raises(PatchError, match="a:test could not be loaded: no a"):
        hub_questions("a:test", 5)
    with pytest.raises(PatchError, match="empty:test holds no questions"):
        hub_questions("empty:test", 5)


@pytest.mark.skipif(is_available("datasets"), reason="datasets is installed")
def test_the_package_is_asked_for():
    with pytest.raises(MissingDependencyError, match="Questions from the hub needs the package 'datasets'"):
        hub_questions("a:test", 5)


def test_the_command_says_what_data_may_be(tmp_path):
    done = CliRunner().invoke(app, ["calibrate", "act", "tiny", "--out", str(tmp_path / "x.json"), "--data", "nowhere"])
    assert done.exit_code == 2 and "NAME:SPLIT" in done.stderr
