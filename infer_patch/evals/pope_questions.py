"""Questions of POPE: rows of the official files, the pairs of picture and question in them, a draw of pictures."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer_patch.errors import PatchError

SPLITS = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class Question:
    """One row of a split; `image` is the name of a picture and `label` is "yes" or "no"."""

    split: str
    image: str
    text: str
    label: str


@dataclass(frozen=True)
class Pair:
    """A picture and a question, and how many rows of each split they stand in."""

    image: str
    text: str
    label: str
    splits: Mapping[str, int]


def read_questions(path: str | Path) -> list[Question]:
    """Read an official file: JSON lines with `image`, `text` and `label`, as .json or .json.gz.

    The split is the one of `SPLITS` that the file name holds ("coco_pope_random.json"), or else the bare name.
    """
    path = Path(path)
    bare = path.name.split(".")[0]
    split = next((known for known in SPLITS if known in bare.lower()), bare)
    try:
        data = path.read_bytes()
        lines = (gzip.decompress(data) if path.suffix == ".gz" else data).decode().split("\n")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise PatchError(f"{path} could not be read ({error}); expected a POPE file, .json or .json.gz.") from error
    questions = [_question(line, split, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise PatchError(f"{path} holds no questions; expected one JSON object a line.")
    return questions


def unique_pairs(questions: Iterable[Question]) -> list[Pair]:
    """Each pair of picture and question once, the pairs of one picture together, in order of appearance."""
    pictures: dict[str, dict[str, Pair]] = {}
    for asked in questions:
        pairs = pictures.setdefault(asked.image, {})
        splits = dict(pairs[asked.text].splits) if asked.text in pairs else {}
        if splits and pairs[asked.text].label != asked.label:
            raise PatchError(
                f'"{asked.text}" about {asked.image} has the label "{pairs[asked.text].label}" in '
                f'{", ".join(splits)} and "{asked.label}" in {asked.split}; use files of one release.'
            )
        splits[asked.split] = splits.get(asked.split, 0) + 1
        pairs[asked.text] = Pair(asked.image, asked.text, asked.label, splits)
    return [pair for pairs in pictures.values() for pair in pairs.values()]


def _question(line: str, split: str, where: str) -> Question:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise PatchError(f"{where}: not JSON ({error}); expected one JSON object a line.") from error
    lacking = [key for key in ("image", "text", "label") if not isinstance(row, dict) or key not in row]
    if lacking:
        raise PatchError(f"{where}: {', '.join(lacking)} missing; expected an object with image, text and label.")
    return checked_question(split, row["image"], row["text"], row["label"], where)


def checked_question(split: Any, image: Any, text: Any, label: Any, where: str) -> Question:
    """A row of these values; raises `PatchError` that begins with `where` for what is no question."""
    for name, value in {"split": split, "image": image, "text": text}.items():
        if not isinstance(value, str) or not value.strip():
            raise PatchError(f"{where}: {name} is {value!r}; expected a text.")
    answer = label.strip().lower() if isinstance(label, str) else label
    if answer not in ("yes", "no"):
        raise PatchError(f'{where}: the label is {label!r}; expected "yes" or "no".')
    return Question(split, image, text, answer)


def picture_names(pairs: Sequence[Pair]) -> list[str]:
    """Each picture once, in order of appearance."""
    return list(dict.fromkeys(pair.image for pair in pairs))


def draw_pictures(pairs: list[Pair], limit: int | None, seed: int) -> list[Pair]:
    """The pairs of `limit` pictures, of all if there are no more; the draw does not depend on the order of rows."""
    if limit is not None and limit < 1:
        raise PatchError(f"limit_images is a number of pictures from 1 on, got {limit}; leave it out to ask about all.")
    names = sorted(picture_names(pairs))
    if limit is None or limit >= len(names):
        return pairs
    kept = set(random.Random(f"pope {seed}").sample(names, limit))
    return [pair for pair in pairs if pair.image in kept]
