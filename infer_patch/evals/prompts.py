"""Prompts as users write them, and as a model's `generate` takes them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infer_patch.errors import PatchError


@dataclass(frozen=True)
class Prompt:
    """One prompt, given in one of three forms.

    Parameters
    ----------
    text : str
        What to ask; with `input_ids` or `inputs` it is only shown.
    name : str
        How tables call it; its number if empty.
    images : tuple
        PIL images that stand in front of the text.
    answer : str, optional
        Counts as found when the output contains it, in upper or lower case.
    input_ids : tuple of int, optional
        The whole prompt as tokens, chat template and all.
    inputs : mapping, optional
        Everything `generate` takes, for one sample.
    question_tokens : int, optional
        How many tokens at the end are the question about what stands before them. Prompts with pictures need none:
        there it is what follows the last picture.
    """

    text: str = ""
    name: str = ""
    images: tuple[Any, ...] = ()
    answer: str | None = None
    input_ids: tuple[int, ...] | None = None
    inputs: Mapping[str, Any] | None = None
    question_tokens: int | None = None


def encode(prompt: Prompt, processor: Any, model: Any, chat: bool | None = None) -> dict[str, Any]:
    """Inputs for `generate`, on the model's device, batch size one.

    Parameters
    ----------
    processor : tokenizer or processor
    chat : bool, optional
        Apply the chat template; by default where there is one.
    """
    if prompt.inputs is not None:
        inputs = dict(prompt.inputs)
    elif prompt.input_ids is not None:
        inputs = {"input_ids": torch.tensor([list(prompt.input_ids)])}
    else:
        inputs = _encode_text(prompt, processor, chat)
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    _check(prompt, inputs["input_ids"], model)
    return {name: _placed(value, model) for name, value in inputs.items()}


def question_length(prompt: Prompt, input_ids: Tensor, image_token_ids: tuple[int, ...]) -> int | None:
    """Tokens at the end of input_ids [1, T] that are the question; None where nothing tells."""
    if prompt.question_tokens is not None:
        return prompt.question_tokens
    ids: list[int] = input_ids[0].tolist()
    return next((after for after, token in enumerate(reversed(ids)) if token in image_token_ids), None)


def tokens_from(tokenizer: Any, text: str, words: str) -> int | None:
    """About how many tokens the last occurrence of `words`, and all that follows it, takes; None if it has none."""
    at = text.rfind(words)
    return None if at < 0 else len(tokenizer(text[at:], add_special_tokens=False, verbose=False).input_ids)


def prompt_hash(inputs: Mapping[str, Any]) -> str:
    """SHA-256 over token ids and pictures: equal for equal inputs, whatever the prompt was called."""
    digest = hashlib.sha256()
    for name in sorted(inputs):
        value = inputs[name]
        if isinstance(value, Tensor) and name != "attention_mask":
            values = value.detach().cpu().contiguous()
            values = values.float() if values.is_floating_point() else values.long()
            digest.update(f"{name}{list(value.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def _encode_text(prompt: Prompt, processor: Any, chat: bool | None) -> dict[str, Any]:
    if not prompt.text:
        raise PatchError(f"prompt {prompt.name or '1'} is empty; give it a text.")
    if prompt.images and not hasattr(processor, "image_processor"):
        raise PatchError("images were given, but this model's processor takes text only; leave them out.")
    template = getattr(processor, "chat_template", None)
    if chat and not template:
        raise PatchError("this model has no chat template; use chat=False (--no-chat).")
    if template and chat is not False:
        pictures = [{"type": "image", "image": image} for image in prompt.images]
        is_processor = hasattr(processor, "tokenizer")
        content = [*pictures, {"type": "text", "text": prompt.text}] if is_processor else prompt.text
        encoded = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    elif prompt.images:
        marker = getattr(processor, "image_token", None)
        text = prompt.text
        if marker and marker not in text:
            text = f"{marker}\n" * len(prompt.images) + text
        encoded = processor(text=text, images=list(prompt.images), return_tensors="pt")
    else:
        encoded = processor(text=prompt.text, return_tensors="pt")
    kept = dict(encoded)
    if not prompt.images:  # some tokenizers add token types, which language models do not take
        kept = {name: kept[name] for name in ("input_ids", "attention_mask") if name in kept}
    return kept


def _check(prompt: Prompt, ids: Tensor, model: Any) -> None:
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise PatchError(f"a prompt is one row of tokens, got input_ids of shape {list(ids.shape)}.")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and ids.shape[1] >= limit:
        raise PatchError(f"prompt {prompt.name or '1'} has {ids.shape[1]:,} tokens; this model takes {limit:,}.")


def _placed(value: Any, model: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)
