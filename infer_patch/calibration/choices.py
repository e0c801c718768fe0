"""Questions with a few possible answers, for choosing heads: read from JSONL files, or generated.

One file is one dataset, and one line of it one question:

    {"prompt": "Review: The soup was cold.\nSentiment:", "choices": [" positive", " negative"], "answer": 1}

`answer` is the number of the right choice. A model's answer is the choice whose last token has the highest logit after
the prompt: a letter for multiple choice, a label for classification.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer_patch.errors import PatchError


@dataclass(frozen=True)
class Question:
    """A prompt, its possible continuations, and the number of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def read_questions(folder: Path) -> dict[str, list[Question]]:
    """Every .jsonl file of a folder as a dataset named like the file; raises `PatchError` naming file and line."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise PatchError(f"expected .jsonl files in {folder}, found none. One line is one question: {_LAYOUT}")
    return {file.stem: [_question(file, n, line) for n, line in _lines(file)] for file in files}


_LAYOUT = '{"prompt": "...", "choices": [" a", " b"], "answer": 0}'


def _lines(file: Path) -> list[tuple[int, str]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PatchError(f"cannot read {file}: {error}") from error
    found = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise PatchError(f"{file} holds no question; one line is one: {_LAYOUT}")
    return found


def _question(file: Path, number: int, line: str) -> Question:
    try:
        values: Any = json.loads(line)
        prompt, choices, answer = values["prompt"], values["choices"], values["answer"]
        good = isinstance(prompt, str) and prompt and isinstance(choices, list) and len(choices) > 1
        good = good and all(isinstance(c, str) and c for c in choices)
        good = good and isinstance(answer, int) and 0 <= answer < len(choices)
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise PatchError(f"{file}, line {number}: expected a question like {_LAYOUT}, got {line[:80]!r}.")
    return Question(prompt, tuple(choices), answer)


def generated(held_out: bool, count: int, seed: int) -> dict[str, list[Question]]:
    """Three small datasets: sentiment about one of two things, topic of one of two sentences, the word of a kind.

    The held-out ones are made of other words and other sentences.
    """
    part = 1 if held_out else 0
    makers = {"sentiment": _sentiment, "topic": _topic, "kind": _kind}
    return {
        f"{name}-{'test' if held_out else 'train'}": [
            make(random.Random(f"{name} {seed} {part} {number}"), part) for number in range(count)
        ]
        for name, make in makers.items()
    }


_THINGS = (("soup", "hotel", "film", "bus ride", "garden"), ("bread", "concert", "book", "room", "phone"))
_FEELINGS = (
    (("lovely", "excellent", "a delight", "better than I hoped"), ("awful", "a waste of money", "boring", "broken")),
    (("wonderful", "great fun", "perfect", "warm and friendly"), ("terrible", "dirty", "far too slow", "a mess")),
)


def _sentiment(rng: random.Random, part: int) -> Question:
    """Two things are judged, and one of them is asked for."""
    things, answers = rng.sample(_THINGS[part], 2), [rng.randrange(2) for _ in range(2)]
    said = [f"the {thing} was {rng.choice(_FEELINGS[part][x])}" for thing, x in zip(things, answers)]
    sentence = f"{said[0][0].upper()}{said[0][1:]}, {'and' if answers[0] == answers[1] else 'but'} {said[1]}."
    asked = rng.randrange(2)
    prompt = f"Review: {sentence}\nSentiment about the {things[asked]}:"
    return Question(prompt, (" positive", " negative"), answers[asked])


_TOPICS = ("sports", "food", "weather", "money")
_SENTENCES = (
    (
        ("The goalkeeper stopped two shots.", "She won the race by a metre.", "Both teams trained in the rain."),
        ("Add two eggs and stir the dough.", "The cheese goes well with pears.", "He fried onions in butter."),
        ("Snow will fall above the valley.", "A warm wind blew all night.", "Clouds moved in from the sea."),
        ("The bank raised its rates.", "Shares fell by three percent.", "She paid back the loan early."),
    ),
    (
        ("The coach changed three players.", "He threw the ball to the keeper.", "They lost the final on penalties."),
        ("Boil the rice until it is soft.", "The cake needs more sugar.", "We had fish and salad for lunch."),
        ("Fog covered the road at dawn.", "It has not rained for a month.", "The storm passed north of us."),
        ("The company cut wages again.", "He keeps his savings in cash.", "Prices rose faster than pay."),
    ),
)


def _topic(rng: random.Random, part: int) -> Question:
    """Two sentences, and one of them is asked for."""
    topics, asked = rng.sample(range(4), 2), rng.randrange(2)
    first, second = (rng.choice(_SENTENCES[part][topic]) for topic in topics)
    prompt = (
        f"Topics: {', '.join(_TOPICS)}.\nFirst sentence: {first}\nSecond sentence: {second}\n"
        f"Topic of the {('first', 'second')[asked]} sentence:"
    )
    return Question(prompt, tuple(f" {t}" for t in _TOPICS), topics[asked])


_KINDS = (
    {
        "an animal": ("horse", "rabbit", "eagle", "salmon"),
        "a tool": ("hammer", "saw", "drill", "spade"),
        "a fruit": ("apple", "cherry", "lemon", "grape"),
        "a colour": ("green", "purple", "brown", "yellow"),
        "a drink": ("coffee", "juice", "water", "wine"),
    },
    {
        "a piece of furniture": ("table", "chair", "sofa", "shelf"),
        "a vehicle": ("train", "bicycle", "truck", "boat"),
        "a month": ("March", "June", "October", "January"),
        "a body part": ("elbow", "knee", "finger", "ear"),
        "a metal": ("iron", "copper", "silver", "tin"),
    },
)


def _kind(rng: random.Random, part: int) -> Question:
    kinds = rng.sample(sorted(_KINDS[part]), 4)
    asked, options = kinds[0], rng.sample(kinds, 4)
    words = [rng.choice(_KINDS[part][kind]) for kind in options]
    prompt = f"Words: {', '.join(words)}.\nThe word for {asked} among these is"
    return Question(prompt, tuple(f" {word}" for word in words), options.index(asked))
