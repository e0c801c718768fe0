"""RULER's tasks as text: what each says around a haystack of a given size, and what its answer must hold."""

from __future__ import annotations

import math
import random
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from string import ascii_lowercase, ascii_uppercase
from typing import TYPE_CHECKING, Literal

from infer_patch.evals.haystack import build_haystack
from infer_patch.evals.ruler_words import ADJECTIVES, NOUNS

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


def builder(
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
