"""Generated text of any length with one fact hidden in it, for needle tests that need no download.

The text is that of `prose`, or one of your own. The generated one holds no digits, so a number can only come
from the needle. Everything is drawn from a seed: equal arguments give equal prompts.

The wording of needle and question was chosen by measurement with SmolLM2-135M-Instruct at 3,000 tokens; see
`make_needle` before changing it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TYPE_CHECKING

from infer_patch.errors import PatchError
from infer_patch.evals import prose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEYS = prose.items("""
garden gate; wine cellar; boat house; music room; north tower; summer cabin; chapel door; clock tower
ice house; bell chamber; mail room; blue cottage; attic trunk; horse stable; glass pavilion; watch house
""")


@dataclass(frozen=True)
class Needle:
    """A fact to hide, and the question that asks for it."""

    key: str
    answer: str
    sentence: str
    question: str
    answer_prefix: str


@dataclass(frozen=True)
class NeedlePrompt:
    """One needle test, ready to be fed to a model.

    Parameters
    ----------
    text, input_ids : str, list of int
        The whole prompt, with the chat template applied. Feed `input_ids`: `text` already holds the
        template's special tokens, and a tokenizer would add them again.
    answer : str
        What the output must contain, see `score`.
    depth : float
        Share of the haystack in front of the needle, after moving it to a border between sentences.
    n_tokens : int
        Length of `input_ids`.
    tokens_after : int
        Tokens between the needle and the end: a window narrower than this cannot see the needle.
    needle : Needle
        The fact, its question, and the words an answer starts with.
    """

    text: str
    input_ids: list[int]
    answer: str
    depth: float
    n_tokens: int
    tokens_after: int
    needle: Needle


def make_needle(seed: int) -> Needle:
    """Draw a key and a number, and word the fact and its question.

    SmolLM2-135M-Instruct found needles of this wording in 18 of 18 prompts of 3,000 tokens (13 seeds, depth 0.1 to
    0.9). Of 13 prompts each, it found "The secret code for the ... is" in 12, in 7 without "Answer with the number
    only", and RULER's "One of the special magic numbers" in 12: there it dropped a digit of 52434. The digits of an
    answer therefore differ from each other.
    """
    rng = random.Random(f"needle {seed}")
    key, answer = rng.choice(_KEYS), "".join(rng.sample("123456789", 5))
    fact = f"special magic number for the {key}"
    return Needle(
        key=key,
        answer=answer,
        sentence=f"The {fact} is: {answer}.",
        question=f"What is the {fact} mentioned in the text? Answer with the number only.",
        answer_prefix=f"The {fact} mentioned in the text is",
    )


def build_haystack(tokenizer: PreTrainedTokenizerBase, n_tokens: int, seed: int = 0, text: str | None = None) -> str:
    """Prose of at most, and nearly, `n_tokens` tokens: generated, or else the beginning of `text`."""

    def join(pieces: list[str]) -> str:
        return "".join(pieces).strip()

    return join(_fill(tokenizer, _pieces(seed, text), n_tokens, lambda pieces: len(_encode(tokenizer, join(pieces)))))


def needle_prompt(
    tokenizer: PreTrainedTokenizerBase,
    n_tokens: int,
    depth: float,
    seed: int = 0,
    chat: bool = True,
    answer_prefix: bool = False,
    text: str | None = None,
) -> NeedlePrompt:
    """Hide a needle at `depth` in a haystack and ask for it at the end.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Of the model under test; its chat template is used.
    n_tokens : int
        Length of the whole prompt, template and question included; missed by a few tokens, never passed.
    depth : float
        0 puts the needle at the start of the haystack, 1 at its end.
    seed : int
        Draws the haystack, the key and the number.
    chat : bool
        False for base models: plain text, the question, and always the answer prefix.
    answer_prefix : bool
        Begin the assistant's turn with "The ... is", as RULER does, so that the number is what comes next.
    text : str or None
        Take the haystack from the start of this text instead of generating it.
    """
    if not 0 <= depth <= 1:
        raise PatchError(f"depth is a share of the haystack between 0 and 1, got {depth}")
    if chat and not tokenizer.chat_template:
        raise PatchError("the tokenizer has no chat template; pass chat=False to build a plain prompt")
    needle = make_needle(seed)

    def render(pieces: list[str]) -> str:
        border, _ = _border(tokenizer, pieces, depth)
        body = "".join([*pieces[:border], " ", needle.sentence, *pieces[border:]]).strip()
        prompt = f"{body}\n\n{needle.question}"
        if chat:
            turns = [{"role": "user", "content": prompt}]
            prompt = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
            return prompt + (needle.answer_prefix if answer_prefix else "")
        return f"{prompt}\n{needle.answer_prefix}"

    def encode(prompt: str) -> list[int]:
        return _encode(tokenizer, prompt, special=not chat)

    pieces = _fill(tokenizer, _pieces(seed, text), n_tokens, lambda pieces: len(encode(render(pieces))))
    prompt = render(pieces)
    input_ids = encode(prompt)
    after = prompt[prompt.index(needle.sentence) + len(needle.sentence) :]
    return NeedlePrompt(
        text=prompt,
        input_ids=input_ids,
        answer=needle.answer,
        depth=_border(tokenizer, pieces, depth)[1],
        n_tokens=len(input_ids),
        tokens_after=len(_encode(tokenizer, after)),
        needle=needle,
    )


def score(output_text: str, answer: str) -> bool:
    """Whether the answer appears in the output, in upper or lower case."""
    return answer.lower() in output_text.lower()


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    return tokenizer(text, add_special_tokens=special, verbose=False).input_ids


def _border(tokenizer: PreTrainedTokenizerBase, pieces: list[str], depth: float) -> tuple[int, float]:
    """Border between pieces nearest to `depth`, and the share of tokens in front of it."""
    ends = [0, *accumulate(len(_encode(tokenizer, piece)) for piece in pieces)]
    border = min(range(len(ends)), key=lambda i: abs(ends[i] - depth * ends[-1]))
    return border, ends[border] / max(ends[-1], 1)


def _fill(
    tokenizer: PreTrainedTokenizerBase,
    stream: Iterator[str],
    n_tokens: int,
    measure: Callable[[list[str]], int],
) -> list[str]:
    """Take pieces until `measure` of them is as near below `n_tokens` as whole sentences allow.

    The length of a piece alone is an estimate (some tokenizers begin every text with a space), so the result
    is measured as a whole and topped up a few times.
    """
    pieces: list[str] = []
    slack = n_tokens - measure(pieces)
    if slack < 0:
        fixed = n_tokens - slack
        raise PatchError(f"n_tokens={n_tokens} leaves no room: needle, question and template take {fixed}")
    for _ in range(6):
        room, exhausted = slack, True
        for piece in stream:
            length = len(_encode(tokenizer, piece))
            if length > room:
                exhausted = False
                break
            pieces.append(piece)
            room -= length
        spare = {piece: len(_encode(tokenizer, piece)) for piece in islice(stream, 40)}
        pieces += sorted((piece for piece in spare if spare[piece] <= room), key=spare.__getitem__)[-1:]
        slack = n_tokens - measure(pieces)
        if exhausted and slack > 0.05 * n_tokens:
            raise PatchError(f"the text is too short for n_tokens={n_tokens}: {slack} more tokens are needed")
        if exhausted or slack <= 4:
            break
    while pieces and measure(pieces) > n_tokens:
        pieces.pop()
    return pieces


def _pieces(seed: int, text: str | None) -> Iterator[str]:
    """Sentences with the space or the blank line in front of them."""
    if text is not None:
        blocks = re.split(r"\n\s*\n", text.strip())
        paragraphs = iter([re.split(r"(?<=[.!?])\s+", block) for block in blocks])
    else:
        paragraphs = prose.paragraphs(random.Random(f"haystack {seed}"))
    for paragraph in paragraphs:
        for index, sentence in enumerate(paragraph):
            yield (" " if index else "\n\n") + sentence
