"""What MoA is profiled on: long prompts, each with the answer that the unpatched model itself gives.

Only the answer carries loss. Published results say why: with the model's own answers as supervision a plan at a
quarter of the density kept 0.95 of retrieval, with plain text 0.25. Every other prompt hides a fact in its text and
asks for it, the rest ask for a summary; the text is generated, or yours.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infer_patch.errors import PatchError
from infer_patch.evals import haystack
from infer_patch.evals.generation import generate
from infer_patch.evals.needle import from_random_paragraph

_DEPTHS = 0.1, 0.9  # between which the facts stand
_SUMMARY = "Write a summary of the text above."


@dataclass(frozen=True)
class Example:
    """A prompt with the model's answer: input_ids int64 [1, T], the last `answer_tokens` of which are the answer."""

    input_ids: Tensor
    answer_tokens: int

    @property
    def length(self) -> int:
        return int(self.input_ids.shape[1])


def make_example(
    model: Any, tokenizer: Any, length: int, number: int, answer_tokens: int, seed: int, text: str | None = None
) -> Example:
    """Prompt and answer of nearly, and at most, `length` tokens; even numbers ask for a fact, odd ones for a summary.

    Equal arguments give equal prompts, whatever else is made.
    """
    prompt = prompt_tokens(tokenizer, length - answer_tokens, number, seed, text)
    ids = torch.tensor([prompt], device=model.device)
    answer = generate(
        model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, answer_tokens, keep_logits=False
    ).ids
    return Example(torch.cat([ids, torch.tensor([answer], device=ids.device)], 1), len(answer))


def prompt_tokens(tokenizer: Any, length: int, number: int, seed: int, text: str | None = None) -> list[int]:
    """One prompt as tokens, chat template and all."""
    rng = random.Random(f"moa {seed} {length} {number}")
    own = None if text is None else from_random_paragraph(text, rng)
    chat, draw = bool(tokenizer.chat_template), rng.getrandbits(48)
    if number % 2 == 0:
        depth = rng.uniform(*_DEPTHS)
        return haystack.needle_prompt(tokenizer, length, depth, draw, chat, True, own).input_ids
    room = length - len(_summary(tokenizer, "", chat))
    if room < 1:
        raise PatchError(f"prompts of {length} tokens leave no room for a text; profile longer ones.")
    body = haystack.build_haystack(tokenizer, room, draw, own)
    return _summary(tokenizer, body, chat)


def _summary(tokenizer: Any, body: str, chat: bool) -> list[int]:
    """A text and the request to sum it up."""
    if not chat:
        ids: list[int] = tokenizer(f"{body}\n\nSummary:", verbose=False).input_ids
        return ids
    turns = [{"role": "user", "content": f"{body}\n\n{_SUMMARY}"}]
    rendered = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    ids = tokenizer(rendered, add_special_tokens=False, verbose=False).input_ids
    return ids
