"""RULER without its question answering: eleven tasks, generated offline from a seed.

Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language Models?" (arXiv 2404.06654).
Structure, budgets and scoring follow RULER, wording and word lists are our own, and the essays are generated prose or
your texts. So scores compare runs of this package with each other, not with published tables. Shares are from 0 to 1,
RULER's are percentages; its two question answering tasks need SQuAD and HotpotQA and are left out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from infer_patch.errors import PatchError
from infer_patch.evals.needle import check_context, check_distinct, from_random_paragraph, read_texts
from infer_patch.evals.prompts import Prompt, tokens_from
from infer_patch.evals.ruler_tasks import NEW_TOKENS, TASKS, Question, builder
from infer_patch.evals.task import Item, Scored, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Ruler(Task):
    """RULER's needle (niah_*), variable tracking (vt), common (cwe) and frequent words (fwe) tasks.

    Parameters
    ----------
    tasks : tuple of str
        Of `TASKS`.
    lengths : tuple of int
        Tokens of prompt and answer together: 128 (niah_*), 30 (vt), 120 (cwe) and 50 (fwe) are left to the answer.
        RULER takes 4,096 and its doublings.
    samples : int
        Prompts per task and length; RULER takes 500.
    seed : int
        A prompt depends on it and on its own task, length and number only.
    text_folder : path, optional
        Essays are its .txt files, joined in the order of their names, from a random paragraph on; generated prose
        otherwise.
    """

    name: ClassVar[str] = "ruler"
    title: ClassVar[str] = "RULER (own wording, without question answering)"
    headline: ClassVar[str] = "score"
    tasks: tuple[str, ...] = TASKS
    lengths: tuple[int, ...] = (2000,)
    samples: int = 10
    seed: int = 42
    text_folder: Path | None = None
    max_new_tokens: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        for name in ("tasks", "lengths"):
            check_distinct(name, getattr(self, name))
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown:
            raise PatchError(f"RULER has no task {', '.join(unknown)}; it has {', '.join(TASKS)}.")
        if self.samples < 1:
            raise PatchError(f"samples must be 1 or more, got {self.samples}.")
        object.__setattr__(self, "max_new_tokens", max(NEW_TOKENS[task] for task in self.tasks))

    def items(self, processor: Any, model: Any) -> list[Item]:
        tokenizer = getattr(processor, "tokenizer", processor)
        check_context(model, max(self.lengths), "those to be generated included")
        text = None if self.text_folder is None else read_texts(self.text_folder)
        return [
            self._item(tokenizer, text, task, length, sample)
            for length in self.lengths
            for task in self.tasks
            for sample in range(self.samples)
        ]

    def score(self, item: Item, output: str) -> dict[str, Any]:
        return {"correct": string_match_all(post_process(output), item.reference)}

    def metrics(self, rows: Sequence[Scored]) -> dict[str, float]:
        """Plain mean over tasks, then each task, then each task at each length."""
        shares: dict[str, list[float]] = {}
        for row in rows:
            task, length = row["facts"]["task"], row["facts"]["length"]
            for name in (task, f"{length}/{task}"):
                shares.setdefault(name, []).append(self.value(row["score"]))
        means = {name: fmean(values) for name, values in shares.items()}
        tasks = {name: mean for name, mean in means.items() if "/" not in name}
        return {"score": fmean(tasks.values())} | tasks | {k: v for k, v in means.items() if k not in tasks}

    def _item(self, tokenizer: Any, text: str | None, task: str, length: int, sample: int) -> Item:
        name = f"{length}/{task}/{sample}"
        seed = f"ruler {self.seed} {name}"
        budget = length - NEW_TOKENS[task]
        if budget < 1:
            raise PatchError(f"{task} generates {NEW_TOKENS[task]} tokens, which {length} must exceed; take more.")
        own = None if text is None else from_random_paragraph(text, random.Random(f"{seed} text"))
        least, most, build = builder(task, seed, length, budget, tokenizer, own)
        size = _largest(lambda size: len(_encode(tokenizer, build(size))[1]) <= budget, least, most)
        if size is None:
            takes = len(_encode(tokenizer, build(least))[1])
            raise PatchError(
                f"length {length} leaves no room for {task}: at its shortest it takes {takes} tokens, and "
                f"{NEW_TOKENS[task]} to generate; take a longer one, or leave the task out."
            )
        question = build(size)
        shown, ids = _encode(tokenizer, question)
        if size == most and len(ids) < 0.95 * budget:
            raise PatchError(
                f"length {length} is more than {task} can fill: its text ends after {len(ids)} tokens; "
                "take a shorter one, or a folder with more text."
            )
        facts = {"task": task, "length": length, "sample": sample, "max_new_tokens": NEW_TOKENS[task]}
        asked = tokens_from(tokenizer, shown, question.text.rsplit("\n\n", 1)[-1])
        prompt = Prompt(shown, name, input_ids=tuple(ids), question_tokens=asked)
        return Item(name, prompt, question.references, name, facts)


def post_process(output: str) -> str:
    """Without blanks around it, and with a line end for every control character."""
    return re.sub(r"[\x00-\x1f]", "\n", output.strip()).strip()


def string_match_all(output: str, references: Sequence[str]) -> float:
    """Share of the references that are in the output, in upper or lower case."""
    return fmean(_found(output, references))


def string_match_part(output: str, references: Sequence[str]) -> float:
    """1 if any of the references is in the output, in upper or lower case, and 0 otherwise."""
    return max(_found(output, references))


def _found(output: str, references: Sequence[str]) -> list[float]:
    if isinstance(references, str) or not references:
        raise PatchError(f"references must be a list of at least one string, got {references!r}.")
    return [float(reference.lower() in output.lower()) for reference in references]


def _encode(tokenizer: PreTrainedTokenizerBase, question: Question) -> tuple[str, list[int]]:
    """The whole prompt as text and as tokens: the answer prefix stands behind the template's assistant header."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": question.text}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        text += question.answer_prefix
    else:
        text = f"{question.text}\n{question.answer_prefix}"
    ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template, verbose=False).input_ids
    return text, ids


def _largest(fits: Callable[[int], bool], least: int, most: int) -> int | None:
    """The largest size from `least` to `most` that fits, if any, by bisection: smaller sizes must fit as well."""
    if not fits(least):
        return None
    low, step = least, 16
    while low + step <= most and fits(low + step):
        low, step = low + step, 2 * step
    high = min(low + step, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
