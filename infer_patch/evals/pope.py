"""POPE: yes/no questions about objects in a picture, half of them about objects that are not there.

Li et al. 2023, "Evaluating Object Hallucination in Large Vision-Language Models". The official files hold three splits
of 3,000 questions about the same 500 COCO pictures (val2014). The splits share their 1,500 questions with answer yes
and many others: only 5,127 pairs of picture and question differ. Each pair is answered once, and metrics count it as
often as it stands in each split, so they equal those of 9,000 answers.

The answer is one word, read right after the prompt. So that a method that changes only the stored cache (a quantised
one, for example) can show a loss at all, such plans are asked after the picture is in the cache (`question_last`).

`pope_scenes` builds questions of this kind about drawn scenes, without any file.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from infer_patch.availability import require
from infer_patch.errors import PatchError
from infer_patch.evals.pope_scores import binary_metrics, exact, official, parsed, strict
from infer_patch.evals.prompts import Prompt
from infer_patch.evals.task import Item, Scored, Task

SPLITS = ("random", "popular", "adversarial")
SUFFIX = "\nAnswer the question using a single word or phrase."
_BINARY = ("accuracy", "precision", "recall", "f1", "yes_ratio")
_HUB_COLUMNS = ("category", "question", "answer", "image_source")


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


class PopeTask(Task):
    """Scoring and metrics that all sources of questions share."""

    name: ClassVar[str] = "pope"
    title: ClassVar[str] = "POPE: is the object in the picture?"
    headline: ClassVar[str] = "accuracy"
    through_cache: ClassVar[bool] = False

    def score(self, item: Item, output: str) -> dict[str, Any]:
        """All parsers on one output, without the blanks around it, as LLaVA's runner stores it."""
        output = output.strip()
        return {
            "correct": official(output) == (item.reference == "yes"),
            "yes": official(output),
            "exact": exact(output),
            "strict": strict(output),
            "parsed": parsed(output),
        }

    def weight(self, facts: Mapping[str, Any]) -> float:
        return float(sum(facts["splits"].values()))

    def metrics(self, rows: Sequence[Scored]) -> dict[str, float]:
        """Unweighted means over the splits, then each split by itself ("random/accuracy"); yes is the positive class.

        `exact_accuracy` counts an output that is more than one word as wrong, `strict_accuracy` reads an unclear one
        as no. `unparsed_rate` is the share of outputs with neither yes nor no: above 0.01, look at the outputs.
        """
        splits: dict[str, list[Scored]] = {}
        for row in rows:
            for split, times in row["facts"]["splits"].items():
                splits.setdefault(split, []).extend([row] * times)
        if not splits:
            raise PatchError("POPE has no answers to score; answer at least one question.")
        order = sorted(splits, key=lambda split: (SPLITS.index(split) if split in SPLITS else len(SPLITS), split))
        tables = {split: _split_metrics(splits[split]) for split in order}
        means = {name: fmean(table[name] for table in tables.values()) for name in tables[order[0]]}
        return means | {f"{split}/{name}": tables[split][name] for split in order for name in _BINARY}


@dataclass(frozen=True)
class Pope(PopeTask):
    """POPE from its official question files and a folder of pictures.

    Parameters
    ----------
    files : tuple of Path
        One file per split, see `read_questions`.
    images : Path
        Folder with the pictures that the files name, for example COCO's val2014.
    limit_images : int, optional
        Draw this many pictures, with all their questions.
    seed : int
        Draws the pictures.
    suffix : str
        Follows each question; LLaVA's by default.
    max_new_tokens : int
    """

    files: tuple[Path, ...]
    images: Path
    limit_images: int | None = None
    seed: int = 0
    suffix: str = SUFFIX
    max_new_tokens: int = 8

    def items(self, processor: Any, model: Any) -> list[Item]:
        check_pictures(processor)
        tables = [read_questions(file) for file in self.files]
        splits = [table[0].split for table in tables]
        if not splits or len(set(splits)) < len(splits):
            raise PatchError(f"the files hold the splits {splits or 'of no file'}; give one file per split.")
        pairs = _drawn(unique_pairs(row for table in tables for row in table), self.limit_images, self.seed)
        folder = Path(self.images)
        missing = [name for name in _names(pairs) if not (folder / name).is_file()]
        if missing:
            raise PatchError(
                f"{len(missing)} of {len(_names(pairs))} pictures are not in {folder}, the first is {missing[0]}; "
                "COCO's are in http://images.cocodataset.org/zips/val2014.zip."
            )
        return make_items(pairs, _opened(pairs, lambda name: (folder / name).read_bytes()), self.suffix)


@dataclass(frozen=True)
class PopeHub(PopeTask):
    """POPE from a data set on the hub that holds questions and pictures; needs the package `datasets`.

    Parameters
    ----------
    dataset, split, revision : str
        Columns must be those of lmms-lab/POPE: category, question, answer, image_source, image.
    limit_images, seed, suffix, max_new_tokens
        As in `Pope`.
    """

    dataset: str = "lmms-lab/POPE"
    split: str = "test"
    revision: str | None = None
    limit_images: int | None = None
    seed: int = 0
    suffix: str = SUFFIX
    max_new_tokens: int = 8

    def items(self, processor: Any, model: Any) -> list[Item]:
        check_pictures(processor)
        require("datasets", "POPE from the hub")
        import datasets

        try:
            table = datasets.load_dataset(self.dataset, split=self.split, revision=self.revision)
        except (OSError, ValueError) as error:
            raise PatchError(
                f"{self.dataset} (split {self.split}) could not be loaded: {error}. Name another data set, or use the "
                "official files and a folder of pictures."
            ) from error
        lacking = [name for name in (*_HUB_COLUMNS, "image") if name not in table.column_names]
        if lacking:
            raise PatchError(f"{self.dataset} lacks the columns {lacking}; it has {table.column_names}.")
        columns = [list(table[name]) for name in _HUB_COLUMNS]
        questions = [
            _checked(split, image, text, label, f"{self.dataset}, row {row}")
            for row, (split, text, label, image) in enumerate(zip(*columns))
        ]
        pairs = _drawn(unique_pairs(questions), self.limit_images, self.seed)
        rows = {question.image: row for row, question in enumerate(questions)}
        encoded = table.cast_column("image", datasets.Image(decode=False))

        def read(name: str) -> bytes:
            cell = encoded[rows[name]]["image"]
            return cell["bytes"] or Path(cell["path"]).read_bytes()

        return make_items(pairs, _opened(pairs, read), self.suffix)


def check_pictures(processor: Any) -> None:
    """Raise `PatchError` unless pillow is here and the model takes pictures."""
    require("pillow", "A task with pictures")
    if not hasattr(processor, "image_processor"):
        raise PatchError(
            "the questions are about pictures, but this model's processor takes text only; use one with vision."
        )


def make_items(pairs: Sequence[Pair], pictures: Mapping[str, Any], suffix: str) -> list[Item]:
    """One item per pair; `pictures` holds a PIL image per name, which the questions about it share."""
    return [
        Item(
            name=f"{pair.image}|{pair.text}",
            prompt=Prompt(pair.text + suffix, name=f"{pair.image}|{pair.text}", images=(pictures[pair.image],)),
            reference=pair.label,
            group=pair.image,
            facts={"splits": dict(pair.splits)},
        )
        for pair in pairs
    ]


def _question(line: str, split: str, where: str) -> Question:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise PatchError(f"{where}: not JSON ({error}); expected one JSON object a line.") from error
    lacking = [key for key in ("image", "text", "label") if not isinstance(row, dict) or key not in row]
    if lacking:
        raise PatchError(f"{where}: {', '.join(lacking)} missing; expected an object with image, text and label.")
    return _checked(split, row["image"], row["text"], row["label"], where)


def _checked(split: Any, image: Any, text: Any, label: Any, where: str) -> Question:
    for name, value in {"split": split, "image": image, "text": text}.items():
        if not isinstance(value, str) or not value.strip():
            raise PatchError(f"{where}: {name} is {value!r}; expected a text.")
    answer = label.strip().lower() if isinstance(label, str) else label
    if answer not in ("yes", "no"):
        raise PatchError(f'{where}: the label is {label!r}; expected "yes" or "no".')
    return Question(split, image, text, answer)


def _names(pairs: Sequence[Pair]) -> list[str]:
    return list(dict.fromkeys(pair.image for pair in pairs))


def _drawn(pairs: list[Pair], limit: int | None, seed: int) -> list[Pair]:
    """The pairs of `limit` pictures, of all if there are no more; the draw does not depend on the order of rows."""
    if limit is not None and limit < 1:
        raise PatchError(f"limit_images is a number of pictures from 1 on, got {limit}; leave it out to ask about all.")
    names = sorted(_names(pairs))
    if limit is None or limit >= len(names):
        return pairs
    kept = set(random.Random(f"pope {seed}").sample(names, limit))
    return [pair for pair in pairs if pair.image in kept]


def _opened(pairs: Sequence[Pair], read: Callable[[str], bytes]) -> dict[str, Any]:
    """A PIL image per picture, over its encoded bytes: no file stays open, and pixels are decoded at first use.

    500 COCO pictures take about 80 MB, and up to 460 MB once every one of them has been asked about.
    """
    from PIL import Image

    pictures = {}
    for name in _names(pairs):
        try:
            pictures[name] = Image.open(io.BytesIO(read(name)))
        except OSError as error:
            raise PatchError(f"the picture {name} could not be read: {error}; copy it again.") from error
    return pictures


def _split_metrics(rows: Sequence[Scored]) -> dict[str, float]:
    labels = [row["reference"] == "yes" for row in rows]
    scores = [row["score"] for row in rows]
    table = binary_metrics(labels, [score["yes"] for score in scores])
    table["unparsed_rate"] = fmean(not score["parsed"] for score in scores)
    table["exact_accuracy"] = fmean(score["exact"] == label for score, label in zip(scores, labels))
    table["strict_accuracy"] = fmean((score["strict"] is True) == label for score, label in zip(scores, labels))
    return table
