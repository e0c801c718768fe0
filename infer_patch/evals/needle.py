"""Needle in a haystack: one random number hidden in a long text, over a grid of lengths and depths.

The test of gkamradt/LLMTest_NeedleInAHaystack with other material. Its needle (what to do in San Francisco) is in
training data and its essays have no licence to pass them on, so number and text are generated, or the text is yours.
Forks score differently (a judge from 1 to 10, ROUGE, substring): heat maps of different tools are not comparable.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from infer_patch.errors import PatchError
from infer_patch.evals import haystack
from infer_patch.evals.prompts import Prompt, tokens_from
from infer_patch.evals.task import Item, Scored, Task


@dataclass(frozen=True)
class NeedleGrid(Task):
    """One prompt per length, depth and repeat, each with its own text, key and number.

    A prompt depends on the seed and its own place in the grid only: more lengths or depths leave the others as they
    are.

    Parameters
    ----------
    lengths : tuple of int
        Tokens of the prompts, template and question included; missed by a few tokens, never passed.
    depths : tuple of float
        Share of the text before the needle, 0 to 1.
    repeats : int
        Prompts per length and depth.
    seed : int
        Draws keys, numbers and texts.
    text_folder : path, optional
        Its .txt files, joined in the order of their names, from a random paragraph on; generated prose otherwise.
    answer_prefix : bool
        Begin the answer with "The ... is", so that the number comes next; always so without a chat template.
    max_new_tokens : int
        Together with a length, this must fit the model's context.
    """

    name: ClassVar[str] = "needle"
    title: ClassVar[str] = "Needle in a haystack"
    headline: ClassVar[str] = "accuracy"
    lengths: tuple[int, ...] = (1000, 2000, 3000)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    repeats: int = 1
    seed: int = 0
    text_folder: Path | None = None
    answer_prefix: bool = True
    max_new_tokens: int = 12

    def __post_init__(self) -> None:
        if min(self.repeats, self.max_new_tokens) < 1:
            raise PatchError(
                f"repeats and max_new_tokens must be 1 or more, got {self.repeats} and {self.max_new_tokens}."
            )
        for name in ("lengths", "depths"):
            check_distinct(name, getattr(self, name))
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise PatchError(f"depths are shares of the text from 0 to 1, got {list(self.depths)}; 0.5 is the middle.")

    def items(self, processor: Any, model: Any) -> list[Item]:
        tokenizer = getattr(processor, "tokenizer", processor)
        check_context(model, max(self.lengths) + self.max_new_tokens, f"max_new_tokens={self.max_new_tokens} included")
        text = None if self.text_folder is None else read_texts(self.text_folder)
        return [
            self._item(tokenizer, text, length, depth, repeat)
            for length in self.lengths
            for depth in self.depths
            for repeat in range(self.repeats)
        ]

    def score(self, item: Item, output: str) -> dict[str, Any]:
        """Whether the number is in the output; `rouge1_f` against the needle's sentence is for reference only."""
        return {
            "correct": haystack.score(output, item.reference),
            "rouge1_f": rouge1_f(output, item.facts["needle"]),
        }

    def metrics(self, rows: Sequence[Scored]) -> dict[str, float]:
        """Share of numbers found: of all, and of every length and every depth."""
        found = {"accuracy": fmean(self.value(row["score"]) for row in rows)}
        for key in ("length", "depth"):
            for value in sorted({row["facts"][key] for row in rows}):
                of_value = [self.value(row["score"]) for row in rows if row["facts"][key] == value]
                found[f"{key} {value}"] = fmean(of_value)
        return found

    def grid(self, rows: Sequence[Scored]) -> tuple[dict[str, list[Any]], list[list[float | None]]]:
        axes: dict[str, list[Any]] = {
            "x": [f"{length:,}" for length in self.lengths],
            "y": [f"{100 * depth:g} %" for depth in self.depths],
            "x_title": ["tokens"],
            "y_title": ["depth"],
        }
        return axes, grid(rows, self.lengths, self.depths)

    def _item(self, tokenizer: Any, text: str | None, length: int, depth: float, repeat: int) -> Item:
        chat = bool(tokenizer.chat_template)
        rng = random.Random(f"needle grid {self.seed} {length} {depth} {repeat}")
        own = None if text is None else from_random_paragraph(text, rng)
        for _ in range(20):  # a text of yours may hold the number already
            prompt = haystack.needle_prompt(
                tokenizer, length, depth, rng.getrandbits(48), chat, self.answer_prefix, own
            )
            if prompt.text.count(prompt.answer) == 1:
                break
        else:
            raise PatchError(f"{self.text_folder} holds every number that was drawn; give texts with fewer digits.")
        name = f"{length} tokens, {100 * depth:g} %, {repeat}"
        facts = {"length": length, "depth": depth, "repeat": repeat, "needle": prompt.needle.sentence}
        asked = tokens_from(tokenizer, prompt.text, prompt.needle.question)
        ids = tuple(prompt.input_ids)
        shown = Prompt(prompt.text, name, answer=prompt.answer, input_ids=ids, question_tokens=asked)
        return Item(name, shown, prompt.answer, f"haystack of {name}", facts)


def grid(rows: Sequence[Scored], lengths: Sequence[int], depths: Sequence[float]) -> list[list[float | None]]:
    """Mean score per cell, a row per depth and a column per length; None where nothing was answered."""
    cells: dict[tuple[float, int], list[float]] = {}
    for row in rows:
        key = (row["facts"]["depth"], row["facts"]["length"])
        cells.setdefault(key, []).append(float(row["score"]["correct"]))
    return [[fmean(cells[depth, n]) if (depth, n) in cells else None for n in lengths] for depth in depths]


def rouge1_f(output: str, reference: str) -> float:
    """ROUGE-1 F of two texts, lower case, without stemming. For reference only: it punishes every extra word."""
    guess, truth = (Counter(re.findall(r"[a-z0-9]+", text.lower())) for text in (output, reference))
    words = sum(guess.values()) + sum(truth.values())
    return 2 * sum((guess & truth).values()) / max(words, 1)


def read_texts(folder: str | Path) -> str:
    """All .txt files of a folder, joined by blank lines in the order of their names."""
    files = sorted(Path(folder).glob("*.txt"))
    if not files:
        raise PatchError(f"{folder} holds no .txt files; give a folder of texts, or none to have prose generated.")
    try:
        return "\n\n".join(file.read_text("utf-8") for file in files)
    except (OSError, UnicodeDecodeError) as error:
        raise PatchError(f"{folder} could not be read ({error}); expected .txt files in UTF-8.") from error


def from_random_paragraph(text: str, rng: random.Random) -> str:
    """The text from a random paragraph on, and at its end the part before it."""
    paragraphs = re.split(r"\n\s*\n", text.strip())
    start = rng.randrange(len(paragraphs))
    return "\n\n".join([*paragraphs[start:], *paragraphs[:start]])


def check_context(model: Any, tokens: int, what: str) -> None:
    """Raise `PatchError` where `tokens` are more than the model has positions for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise PatchError(f"the longest prompt needs {tokens:,} tokens, {what}; this model takes {limit:,}. Shorten it.")


def check_distinct(name: str, values: Sequence[Any]) -> None:
    """Raise `PatchError` where an axis of a task is empty or names a value twice."""
    if not values or len(set(values)) < len(values):
        raise PatchError(f"{name} must be at least one value, each given once; got {list(values)}.")
