"""Questions for choosing heads from data sets of the hub, by their columns: multiple choice or classification."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from infer_patch.availability import require
from infer_patch.calibration.choices import Question
from infer_patch.errors import PatchError

_TEXTS = ("text", "sentence", "content", "review")
_QUESTIONS = ("question", "question_stem", "query", "ctx", "goal")
_CHOICES = ("choices", "options", "endings")
_ANSWERS = ("answer", "answerKey", "label", "gold")
_LAYOUTS = (
    f"a question ({', '.join(_QUESTIONS)}), a list of choices ({', '.join(_CHOICES)}) and the right one "
    f"({', '.join(_ANSWERS)}); or a text ({', '.join(_TEXTS)}) and a `label` with names"
)
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def hub_questions(names: str, count: int, seed: int = 0) -> dict[str, list[Question]]:
    """Questions of data sets of the hub, each named as NAME:SPLIT or NAME:CONFIGURATION:SPLIT.

    Multiple choice becomes "Question: ...\\nA. ...\\nB. ...\\nAnswer:" with letters as choices, classification
    "Text: ...\\nLabel (one, other):" with the names of the labels. No code of a data set is run.

    Parameters
    ----------
    names : str
        Several are separated by commas.
    count : int
        Questions drawn from each; all, where there are fewer.

    Raises
    ------
    PatchError
        For a name without a split, a data set that cannot be loaded, and columns that are not understood.
    MissingDependencyError
        Without the package `datasets`.
    """
    parsed = {name.strip(): _parsed(name.strip()) for name in names.split(",")}
    require("datasets", "Questions from the hub")
    return {name: _questions(name, *parts, count, seed) for name, parts in parsed.items()}


def _parsed(name: str) -> tuple[str, str | None, str]:
    """(name, configuration, split)"""
    path, *inner = name.split(":")
    if not path or len(inner) not in (1, 2) or not all(inner):
        raise PatchError(
            f"expected a folder of .jsonl files, or data sets of the hub as NAME:SPLIT or NAME:CONFIGURATION:SPLIT, "
            f"got {name!r}."
        )
    return path, inner[0] if len(inner) == 2 else None, inner[-1]


def _questions(name: str, path: str, configuration: str | None, split: str, count: int, seed: int) -> list[Question]:
    import datasets

    try:
        table = datasets.load_dataset(path, configuration, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise PatchError(f"{name} could not be loaded: {error}") from error
    if not len(table):
        raise PatchError(f"{name} holds no questions.")
    rows = random.Random(f"{name} {seed}").sample(range(len(table)), min(count, len(table)))
    return [_question(table[row], table.features, f"{name}, row {row}") for row in rows]


def _question(row: Mapping[str, Any], features: Mapping[str, Any], place: str) -> Question:
    asked, listed, answer = (_first(row, names) for names in (_QUESTIONS, _CHOICES, _ANSWERS))
    if asked and listed and answer:
        return _multiple_choice(row[asked], row[listed], row[answer], place)
    text, labels = _first(row, _TEXTS), getattr(features.get("label"), "names", None)
    if text and labels and isinstance(row["label"], int) and 0 <= row["label"] < len(labels):
        choices = tuple(f" {label.replace('_', ' ')}" for label in labels)
        prompt = f"Text: {row[text].strip()}\nLabel ({', '.join(choice.strip() for choice in choices)}):"
        return Question(prompt, choices, row["label"])
    raise PatchError(f"{place}: expected {_LAYOUTS}; got the columns {sorted(row)}. Write a .jsonl file instead.")


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if row.get(name) not in (None, "")), None)


def _multiple_choice(asked: str, listed: Any, answer: Any, place: str) -> Question:
    """`listed`: texts, or texts with labels; `answer`: a number, a label or letter, or the text itself."""
    labels = list(_LETTERS)
    if isinstance(listed, Mapping) and {"text", "label"} <= set(listed):
        labels, listed = [str(label) for label in listed["label"]], listed["text"]
    texts = [str(text).strip() for text in listed] if isinstance(listed, (list, tuple)) else []
    right = _right(answer, labels[: len(texts)], texts)
    if not 2 <= len(texts) <= len(_LETTERS) or right is None:
        raise PatchError(f"{place}: expected 2 or more choices and which is right, got {listed!r} and {answer!r}.")
    lines = [f"{letter}. {text}" for letter, text in zip(_LETTERS, texts)]
    prompt = "\n".join([f"Question: {asked.strip()}", *lines, "Answer:"])
    return Question(prompt, tuple(f" {letter}" for letter in _LETTERS[: len(texts)]), right)


def _right(answer: Any, labels: Sequence[str], texts: Sequence[str]) -> int | None:
    """The number of the right choice; None if there is no telling."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(texts) else None
    said = str(answer).strip()
    for named in (labels, _LETTERS[: len(texts)], [str(i) for i in range(len(texts))], texts):
        if said in named:
            return list(named).index(said)
    return None
