"""The turns of a conversation as text, and as what a model's `generate` takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from infer_patch.availability import require
from infer_patch.errors import PatchError


@dataclass(frozen=True)
class Turn:
    """What one side said; `images` are PIL images that stand in front of the text."""

    role: Literal["system", "user", "assistant"]
    text: str
    images: tuple[Any, ...] = ()


class TurnEncoder:
    """Between turns and tokens, for one model.

    Parameters
    ----------
    model : PreTrainedModel
    processor : processor, or tokenizer of a text-only model
    """

    def __init__(self, model: Any, processor: Any):
        self.model = model
        self.processor = processor
        self._tokenizer = getattr(processor, "tokenizer", processor)

    @property
    def has_template(self) -> bool:
        """Whether turns go through a chat template."""
        return bool(getattr(self.processor, "chat_template", None))

    @property
    def takes_images(self) -> bool:
        return hasattr(self.processor, "image_processor")

    def encode(self, turns: tuple[Turn, ...]) -> dict[str, Any]:
        """Inputs of `generate` for the whole conversation, on the model's device."""
        images = [image for turn in turns for image in turn.images]
        if self.has_template:
            encoded = self._apply_template(turns)
        elif images:
            encoded = self.processor(text=self._plain_text(turns), images=images, return_tensors="pt")
        else:
            encoded = self.processor(text=self._plain_text(turns), return_tensors="pt")
        kept = dict(encoded)
        kept.setdefault("attention_mask", torch.ones_like(kept["input_ids"]))
        if not images:  # some tokenizers add token types, which language models do not take
            kept = {name: kept[name] for name in ("input_ids", "attention_mask")}
        return {name: self._placed(value) for name, value in kept.items()}

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, special ones left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def room(self, length: int) -> int | None:
        """Tokens that still fit behind `length` of them; None where the model sets no limit.

        Raises
        ------
        PatchError
            When there is none left.
        """
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is None:
            return None
        if length >= limit:
            raise PatchError(
                f"the conversation has {length:,} tokens, and this model takes {limit:,}; start a new one."
            )
        return int(limit - length)

    def _apply_template(self, turns: tuple[Turn, ...]) -> Any:
        require("jinja2", "The chat template of this model")
        from jinja2 import TemplateError

        try:
            return self.processor.apply_chat_template(
                [{"role": turn.role, "content": self._content(turn)} for turn in turns],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        except TemplateError as error:
            raise PatchError(f"the chat template of this model refuses the conversation: {error}") from error

    def _content(self, turn: Turn) -> Any:
        if self.processor is self._tokenizer:
            return turn.text
        return [*({"type": "image", "image": image} for image in turn.images), {"type": "text", "text": turn.text}]

    def _plain_text(self, turns: tuple[Turn, ...]) -> str:
        """Each message on a line of its own, each answer right behind its message."""
        text = ""
        for turn in turns:
            marker = getattr(self.processor, "image_token", None) or ""
            pictures = f"{marker}\n" * len(turn.images) if marker and marker not in turn.text else ""
            text += ("\n" if text and turn.role == "user" else "") + pictures + turn.text
        return text

    def _placed(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
