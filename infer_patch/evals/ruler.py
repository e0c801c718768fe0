"""RULER without its question answering: eleven tasks, generated offline from a seed.

Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language Models?" (arXiv 2404.06654).
Structure, budgets and scoring follow RULER, wording and word lists are our own, and the essays are generated prose or
your texts. So scores compare runs of this package with each other, not with published tables. Shares are from 0 to 1,
RULER's are percentages; its two question answering tasks need SQuAD and HotpotQA and are left out.
"""

from __future__ import annotations

import math
import random
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from string import ascii_lowercase, ascii_uppercase
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from infer_patch.errors import PatchError
from infer_patch.evals.haystack import build_haystack
from infer_patch.evals.needle import check_context, check_distinct, from_random_paragraph, read_texts
from infer_patch.evals.prompts import Prompt, tokens_from
from infer_patch.evals.ruler_words import ADJECTIVES, NOUNS
from infer_patch.evals.task import Item, Scored, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NOISE = "The river is wide. The hill is steep. The lamp is lit. On we walk. Home again by night."
_DEPTHS = 40
_SHORT = 4096  # below this, RULER repeats the common and uncommon words of `cwe` less often

Kind = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True)
class _Needles:
    """A kind of needle task: what keys and values are, and how many keys, values per key, and keys asked for."""

    haystack: Literal["noise", "essay", "needles"]
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


_NIAH = {
    "niah_single_1": _Needles("noise"),
    "niah_single_2": _Needles("essay"),
    "niah_single_3": _Needles("essay", value="uuids"),
    "niah_multikey_1": _Needles("essay", keys=4),
    "niah_multikey_2": _Needles("needles"),
    "niah_multikey_3": _Needles("needles", "uuids", "uuids"),
    "niah_multivalue": _Needles("essay", values=4),
    "niah_multiquery": _Needles("essay", keys=4, queries=4),
}
TASKS = (*_NIAH, "vt", "cwe", "fwe")
NEW_TOKENS = dict.fromkeys(_NIAH, 128) | {"vt": 30, "cwe": 120, "fwe": 50}


@dataclass(frozen=True)
class Question:
    """What the user says, the words that the answer starts with, and what it must hold."""

    text: str
    answer_prefix: str
    references: list[str]

    def solved(self) -> str:
        """The question with its answer, to be put in front of another one."""
        return f"{self.text}\n{self.answer_prefix} {', '.join(self.references)}\n\n"


Build = Callable[[int], Question]  # takes the size of the haystack, in its own pieces; draws the rest from one seed


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
        least, most, build = _builder(task, seed, length, budget, tokenizer, own)
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


def _builder(
    task: str, seed: str, length: int, budget: int, tokenizer: PreTrainedTokenizerBase, text: str | None
) -> tuple[int, int, Build]:
    """Smallest and largest size of a task's haystack, and what makes its question for a size in between."""
    pairs = len(ADJECTIVES) * len(NOUNS)
    if task in _NIAH:
        kind = _NIAH[task]
        essay: list[str] = []
        if kind.haystack == "essay":
            filler = build_haystack(tokenizer, budget, random.Random(f"{seed} essay").getrandbits(48), text)
            essay = re.split(r"(?<=[.!?])(?=\s)", filler)
        most = {"noise": budget, "essay": len(essay), "needles": pairs - kind.keys}[kind.haystack]
        return 1, most, partial(_niah, kind, seed, essay)
    if task == "vt":
        return 5, budget, partial(_variable_tracking, seed)
    if task == "cwe":
        repeats = (6, 1) if length < _SHORT else (30, 3)
        return 10, pairs - 30, partial(_common_words, seed, repeats)
    return 100, budget, partial(_frequent_words, seed)


def _niah(kind: _Needles, seed: str, essay: list[str], size: int) -> Question:
    """Needles in `size` lines of noise, sentences of an essay, or needles that nobody asks for."""
    rng = random.Random(seed)
    keys, values = _drawn(kind.key, f"{seed} keys"), _drawn(kind.value, f"{seed} values")
    single = kind.values * kind.queries == 1
    noun = kind.value.removesuffix("s")
    facts = {next(keys): [next(values) for _ in range(kind.values)] for _ in range(kind.keys)}

    def worded(key: str, value: str) -> str:
        return f"One special magic {noun} for {key} is: {value}."

    needles = [worded(key, value) for key in facts for value in facts[key]]
    rng.shuffle(needles)
    queried = rng.sample(list(facts), kind.queries)
    if kind.haystack == "essay":
        depths = sorted(i / (_DEPTHS - 1) for i in rng.sample(range(_DEPTHS), len(needles)))
        context = "".join(_inserted([" " + essay[0], *essay[1:size]], [" " + needle for needle in needles], depths))
    else:
        others = (
            [_NOISE] * size if kind.haystack == "noise" else [worded(*pair) for pair in islice(zip(keys, values), size)]
        )
        context = "\n".join(_inserted(others, needles, sorted(rng.random() for _ in needles)))
    asked = queried[0] if len(queried) == 1 else f"{', '.join(queried[:-1])}, and {queried[-1]}"
    if single:
        task = f"The text below holds a special magic {noun}. Keep it in mind: the question at the end asks for it."
        question = f"What is the special magic {noun} for {asked} that the text mentions?"
        answer_prefix = f"The special magic {noun} for {asked} that the text mentions is"
    else:
        task = f"The text below holds special magic {noun}s. Keep them in mind: the question at the end asks for them."
        question = f"What are all the special magic {noun}s for {asked} that the text mentions?"
        answer_prefix = f"The special magic {noun}s for {asked} that the text mentions are"
    references = [value for key in queried for value in facts[key]]
    return Question(f"{task}\n\n{context.strip()}\n\n{question}", answer_prefix, references)


def _variable_tracking(seed: str, size: int) -> Question:
    """One chain of five variables in `size` lines of noise, behind a short one that is solved."""
    rng = random.Random(seed)
    names, numbers = _drawn("letters", f"{seed} names"), rng.sample(range(10000, 100000), 2)

    def ask(size: int, number: int) -> Question:
        chain = [next(names) for _ in range(5)]
        sources = [str(number), *(f"VAR {name}" for name in chain)]
        lines = [f"VAR {name} = {source}" for name, source in zip(chain, sources)]
        context = "\n".join(_inserted([_NOISE] * size, lines, sorted(rng.random() for _ in lines)))
        return Question(
            "Follow the variable assignments that are scattered over the text below.\n\n"
            f"{context}\n\n"
            f"Question: Which variables hold the value {number}, given directly or through other variables? Name all.",
            f"Going through the assignments in the text above, {len(chain)} variables hold the value {number}:",
            chain,
        )

    example = ask(4, numbers[0]).solved()
    question = ask(size, numbers[1])
    return Question(example + question.text, question.answer_prefix, question.references)


def _common_words(seed: str, repeats: tuple[int, int], size: int) -> Question:
    """Ten common and `size` uncommon words in a numbered list, behind a short one that is solved."""
    words, rng = _drawn("words", f"{seed} words"), random.Random(seed)

    def ask(size: int, repeats: tuple[int, int]) -> Question:
        common, uncommon = ([next(words) for _ in range(count)] for count in (10, size))
        entries = [word for group, times in zip((common, uncommon), repeats) for word in group for _ in range(times)]
        rng.shuffle(entries)
        numbered = " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))
        return Question(
            "Below is a numbered list of words. Some come up far more often than the others; keep those in mind.\n\n"
            f"{numbered}\n\n"
            "Question: Which 10 words come up most often in the list above?",
            "The 10 words that come up most often in the list are:",
            common,
        )

    example = ask(10, (3, 1)).solved()
    question = ask(size, repeats)
    return Question(example + question.text, question.answer_prefix, question.references)


def _frequent_words(seed: str, size: int) -> Question:
    """About `size` coded words: rank k comes up size / (k² zeta(2)) times, and dots take the first rank."""
    words, rng = _drawn("codes", f"{seed} words"), random.Random(seed)
    share = 6 / math.pi**2
    counts = [int(size * share / rank**2) for rank in range(1, size)]
    vocabulary = ["....", *(next(words) for count in counts[1:] if count)]
    entries = [word for word, count in zip(vocabulary, counts) for _ in range(count)]
    rng.shuffle(entries)
    return Question(
        "Below is a coded text. Keep track of how often each coded word comes up; dots are not words.\n\n"
        f"{' '.join(entries)}\n\n"
        "Question: Which three coded words come up most often in the text above? Name nothing else.",
        "The three coded words that come up most often in the text are:",
        vocabulary[1:4],
    )


def _inserted(pieces: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> list[str]:
    """`pieces` with the needles between them, in their order, at rising depths from 0 to 1."""
    out = list(pieces)
    for needle, depth in reversed(list(zip(needles, depths, strict=True))):
        out.insert(round(depth * len(pieces)), needle)
    return out


def _drawn(kind: Kind | Literal["letters", "codes"], seed: str) -> Iterator[str]:
    """Random names of a kind, all different.

    words are an adjective and a noun, numbers have 7 digits, uuids are of version 4, letters are 5 capitals and codes
    6 small letters.
    """
    rng = random.Random(seed)
    draw: dict[str, Callable[[], str]] = {
        "words": lambda: f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}",
        "numbers": lambda: str(rng.randrange(10**6, 10**7)),
        "uuids": lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
        "letters": lambda: "".join(rng.choices(ascii_uppercase, k=5)),
        "codes": lambda: "".join(rng.choices(ascii_lowercase, k=6)),
    }
    seen: set[str] = set()
    while True:
        new = draw[kind]()
        if new not in seen:
            seen.add(new)
            yield new
