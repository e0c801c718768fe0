"""Greedy generation that is timed, recorded and, where asked, held to given tokens.

Everything goes through the model's own `generate`, so that positions, caches and pictures are handled as users get
them. Batch size is one: batching changes the output of some models by itself, patched or not.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from infer_patch.cache import cache_bytes
from infer_patch.evals.cost import MemoryMeter


@dataclass
class Trace:
    """One generation.

    Parameters
    ----------
    ids : list of int
        The output tokens, the end token included.
    logits : float32 Tensor [n, V], optional
        What each of them was chosen from, before any processing; on the CPU.
    first_token_s, per_token_s : float
        Seconds to the first token, and per token after it (None when there is only one).
    peak_bytes, cache_bytes : int
        Memory above what was there before, and the keys and values held at the end.
    """

    ids: list[int]
    logits: Tensor | None
    first_token_s: float
    per_token_s: float | None
    peak_bytes: int | None
    cache_bytes: int

    def recorded(self) -> Tensor:
        """The logits; only runs that keep them have any."""
        if self.logits is None:
            raise ValueError("this run kept no logits; generate with keep_logits=True")
        return self.logits


@torch.no_grad()
def generate(
    model: Any,
    inputs: Mapping[str, Any],
    max_new_tokens: int,
    forced: list[int] | None = None,
    keep_logits: bool = True,
) -> Trace:
    """Generate greedily for one prompt.

    Parameters
    ----------
    inputs : mapping
        What the model's `generate` takes: `input_ids` [1, T], `attention_mask`, pictures.
    forced : list of int, optional
        Teacher forcing: prefill, then these tokens one by one through the cache, as in decoding.
    """
    length = inputs["input_ids"].shape[1]
    watch = _Watch(forced, length, model.device)
    config = _greedy(model, max_new_tokens if forced is None else len(forced), keep_logits)
    with MemoryMeter(model.device) as meter:
        begin = watch.now()
        output = model.generate(**inputs, generation_config=config, logits_processor=[watch])
        end = watch.now()
    ids = output.sequences[0, length:].tolist()
    logits = torch.cat(output.logits).float().cpu() if keep_logits else None
    per_token = (end - watch.first) / (len(ids) - 1) if len(ids) > 1 else None
    held = cache_bytes(output.past_key_values)
    return Trace(ids, logits, watch.first - begin, per_token, meter.peak_bytes, held)


@dataclass
class _Watch(LogitsProcessor):
    """Notes when the first token is known, and leaves only the forced token to choose."""

    forced: list[int] | None
    prompt_length: int
    device: torch.device
    first: float = field(default=0.0, init=False)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_length
        if step == 0:
            self.first = self.now()
        if self.forced is None:
            return scores
        held = torch.full_like(scores, -torch.inf)
        held[:, self.forced[step]] = 0
        return held


def _greedy(model: Any, max_new_tokens: int, keep_logits: bool) -> GenerationConfig:
    """Plain greedy: a value left out would be filled in from the model's own generation settings."""
    own = model.generation_config
    end = own.eos_token_id[0] if isinstance(own.eos_token_id, list) else own.eos_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id if own.pad_token_id is not None else end or 0,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=keep_logits,
    )
