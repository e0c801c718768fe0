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

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from infer_patch.availability import require
from infer_patch.errors import PatchError
from infer_patch.evals.pope_questions import (
    SPLITS,
    Pair,
    checked_question,
    draw_pictures,
    picture_names,
    read_questions,
    unique_pairs,
)
from infer_patch.evals.pope_scores import binary_metrics, exact, official, parsed, strict
from infer_patch.evals.prompts import Prompt
from infer_patch.evals.task import Item, Scored, Task

SUFFIX = "\nAnswer the question using a single word or phrase."
_BINARY = ("accuracy", "precision", "recall", "f1", "yes_ratio")
_HUB_COLUMNS = ("category", "question", "answer", "image_source")


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
        pairs = draw_pictures(unique_pairs(row for table in tables for row in table), self.limit_images, self.seed)
        folder = Path(self.images)
        names = picture_names(pairs)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise PatchError(
                f"{len(missing)} of {len(names)} pictures are not in {folder}, the first is {missing[0]}; "
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
            checked_question(split, image, text, label, f"{self.dataset}, row {row}")
            for row, (split, text, label, image) in enumerate(zip(*columns))
        ]
        pairs = draw_pictures(unique_pairs(questions), self.limit_images, self.seed)
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


def _opened(pairs: Sequence[Pair], read: Callable[[str], bytes]) -> dict[str, Any]:
    """A PIL image per picture, over its encoded bytes: no file stays open, and pixels are decoded at first use.

    500 COCO pictures take about 80 MB, and up to 460 MB once every one of them has been asked about.
    """
    from PIL import Image

    pictures = {}
    for name in picture_names(pairs):
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
