"""Contrastive decoding: a second stream of the same model, after another prompt, beside every step of `generate`.

What both prompts are followed by is the same answer, token by token. The second stream has a cache of its own, which
follows beams. `damro.py` and `guidance.py` say what the second prompt is and how both streams are combined.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

from infer_patch.errors import UnsupportedCallError


class SecondStream(LogitsProcessor):
    """A logits processor that runs the model once more per step, after a second prompt.

    Subclasses put into `_second`, for every sample of the batch, what the model gets in the first call: tensors
    [n, ...] under the names of its arguments, without padding.

    Parameters
    ----------
    model : PreTrainedModel
        In one piece on one device. Patched or not: a plan acts on both streams.
    inputs : mapping
        What `generate` gets: `input_ids` [B, T] and, where a prompt is padded, `attention_mask` [B, T].

    Raises
    ------
    UnsupportedCallError
        When inputs hold no `input_ids`, or a mask of another shape; later, when the processor is used with another
        prompt, or not token by token.
    """

    name = ""
    _second: list[dict[str, Tensor]]

    def __init__(self, model: Any, inputs: Mapping[str, Any]):
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if not isinstance(ids, Tensor):
            raise UnsupportedCallError(f"{self.name}: pass the inputs of generate, `input_ids` among them.")
        if mask is not None and mask.shape != ids.shape:
            raise UnsupportedCallError(
                f"{self.name}: attention_mask is {list(mask.shape)}, input_ids {list(ids.shape)}; one entry per token."
            )
        self.model, self._prompt = model, ids
        self._real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device).bool()
        self._seen: Tensor | None = None
        self._mask = torch.empty(0)
        self._cache: DynamicCache | None = None
        short = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._wanted: dict[str, Any] = {"logits_to_keep": 1} if short else {}

    def second_log_probabilities(self, ids: Tensor) -> Tensor:
        """What the second stream says of the next token: float32 [rows, vocabulary].

        Normalised, because beam search adds up what it is handed over the rows' answers: a constant per row counts.
        """
        return self._second_stream(ids).float().log_softmax(-1)

    def _second_stream(self, ids: Tensor) -> Tensor:
        """Logits [rows, vocabulary] of the second stream after `ids` [rows, T], prompt and answer of the first."""
        rows, length = ids.shape
        if length == self._prompt.shape[1]:
            return self._start(ids)
        if self._seen is None or length != self._seen.shape[1] + 1:
            raise UnsupportedCallError(
                f"{self.name} follows generate token by token from the prompt it was made for: no assisted decoding, "
                "and a new processor for every prompt."
            )
        cache = cast(DynamicCache, self._cache)
        parents = self._parents(ids[:, :-1], self._seen)
        if not torch.equal(parents, torch.arange(rows, device=ids.device)):
            cache.reorder_cache(cast(torch.LongTensor, parents))
            self._mask = self._mask[parents]
        self._seen = ids
        self._mask = torch.cat([self._mask, self._mask.new_ones(rows, 1)], 1)
        return self._forward(input_ids=ids[:, -1:], position_ids=self._mask.sum(1, keepdim=True) - 1)

    def _start(self, ids: Tensor) -> Tensor:
        repeats = len(ids) // len(self._prompt)
        if not torch.equal(ids, self._prompt.to(ids.device).repeat_interleave(repeats, 0)):
            raise UnsupportedCallError(
                f"{self.name}: this is not the prompt the processor was made for; make a new one."
            )
        given: dict[str, Tensor] = {}
        for name in self._second[0]:
            rows = [sample[name].to(ids.device) for sample in self._second]
            longest = max(map(len, rows))
            padded = torch.stack([torch.cat([x[:1].expand(longest - len(x), *x.shape[1:]), x]) for x in rows])
            given[name] = padded.repeat_interleave(repeats, 0)
        mask = torch.stack([torch.arange(longest) >= longest - len(x) for x in rows]).long().to(ids.device)
        self._seen, self._cache = ids, DynamicCache(config=self.model.config.get_text_config(decoder=True))
        self._mask = mask.repeat_interleave(repeats, 0)
        return self._forward(**given, position_ids=(self._mask.cumsum(1) - 1).clamp(min=0))

    def _forward(self, **given: Any) -> Tensor:
        out = self.model(
            **given, **self._wanted, attention_mask=self._mask, past_key_values=self._cache, use_cache=True
        )
        self._cache = out.past_key_values
        return cast(Tensor, out.logits[:, -1])

    def _parents(self, prefixes: Tensor, seen: Tensor) -> Tensor:
        """For every row the earlier row of the same sample that it continues: int64 [rows].

        Samples have equally many rows, one behind the other (beams). Rows of one sample with equal prefixes have equal
        streams; those of two samples may show different pictures.
        """
        here = torch.arange(len(seen), device=seen.device)
        sample = here // (len(seen) // len(self._prompt))
        same = (prefixes[:, None] == seen[None]).all(-1) & (sample[:, None] == sample)
        if not bool(same.any(1).all()):
            raise UnsupportedCallError(
                f"{self.name}: a row does not continue any row of the step before; make a new processor."
            )
        return torch.where(same.diagonal(), here, same.int().argmax(1))  # a row that continues itself stays
