"""Greedy generation that is timed, recorded and, where asked, held to given tokens.

Everything goes through the model's own `generate`, so that positions, caches and pictures are handled as users get
them. `generate` takes one prompt; `generate_batch` several, padded on the left, and keeps their tokens only. Batching
changes the output of some models by itself, so runs that are compared must use equal batches.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from infer_patch.cache_memory import cache_bytes
from infer_patch.errors import PatchError
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
class BatchTrace:
    """One generation for a batch: output tokens of each sample up to its end token, and what the batch cost.

    `per_token_s` is the time of one decoding step, None when there was none; `cache_bytes` is that of the whole batch.
    `scores` join those of the outputs, for tasks that measure the model itself.
    """

    ids: list[list[int]]
    first_token_s: float
    per_token_s: float | None
    cache_bytes: int
    scores: list[dict[str, Any]] | None = None


@torch.no_grad()
def generate_batch(model: Any, inputs: Mapping[str, Any], max_new_tokens: int, question_tokens: int = 0) -> BatchTrace:
    """Generate greedily for a left-padded batch, as `collate` makes it.

    With `question_tokens`, everything before that many tokens is read first, pictures included; the question then
    reads it from the cache.
    """
    length = inputs["input_ids"].shape[1]
    watch = _Watch(None, length, model.device)
    config = _greedy(model, max_new_tokens, keep_logits=False)
    begin = watch.now()
    if question_tokens:
        inputs = _read_context(model, inputs, length - question_tokens)
    output = model.generate(**inputs, generation_config=config, logits_processor=[watch])
    end = watch.now()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    rows = output.sequences[:, length:].tolist()
    steps = output.sequences.shape[1] - length - 1
    per_token = (end - watch.first) / steps if steps else None
    return BatchTrace(
        [_until(row, ends) for row in rows], watch.first - begin, per_token, cache_bytes(output.past_key_values)
    )


@torch.no_grad()
def forced_choices(model: Any, inputs: Mapping[str, Any], answers: list[list[int]]) -> list[list[int]]:
    """What the model would choose at each token of given answers, one per sample of a left-padded batch.

    The answers are fed token by token through the cache (teacher forcing), so each choice follows the given tokens
    before it, not the choices.
    """
    longest, length = max(map(len, answers)), inputs["input_ids"].shape[1]
    config = _greedy(model, longest, keep_logits=False)
    rows = [answer + [config.pad_token_id] * (longest - len(answer)) for answer in answers]
    forced = _ForcedBatch(torch.tensor(rows, device=model.device), length)
    model.generate(**inputs, generation_config=config, logits_processor=[forced])
    chosen = torch.stack(forced.chosen, 1).tolist()
    return [row[: len(answer)] for row, answer in zip(chosen, answers)]


def _read_context(model: Any, inputs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Prefill the first `length` columns; what `generate` takes to go on with the rest."""
    shape = inputs["input_ids"].shape
    context = {
        name: x[:, :length] if isinstance(x, Tensor) and x.shape[:2] == shape else x for name, x in inputs.items()
    }
    read = model.generate(**context, generation_config=_greedy(model, 1, keep_logits=False))
    whole = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return {**whole, "past_key_values": read.past_key_values}


def collate(samples: list[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Inputs of single prompts as one batch: what has a column per token is padded on the left, the rest is stacked."""
    longest = max(sample["input_ids"].shape[1] for sample in samples)
    batch = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        if isinstance(first, Tensor) and first.shape[:2] == samples[0]["input_ids"].shape:
            fill = pad_token_id if name == "input_ids" else 0
            values = [F.pad(value, (longest - value.shape[1], 0), value=fill) for value in values]
        if not isinstance(first, Tensor) or any(v.shape[1:] != values[0].shape[1:] for v in values):
            shapes = [list(getattr(value, "shape", [])) for value in values]
            raise PatchError(f"the prompts cannot be batched: {name} has shapes {shapes}. Use batch size 1.")
        batch[name] = torch.cat(values)
    return batch


def _until(row: list[int], ends: list[int | None]) -> list[int]:
    """The tokens up to and with the first end token; what follows is padding."""
    return next((row[: i + 1] for i, token in enumerate(row) if token in ends), row)


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


@dataclass
class _ForcedBatch(LogitsProcessor):
    """Notes the likeliest tokens of every step, and leaves only the forced ones to choose."""

    answers: Tensor
    prompt_length: int
    chosen: list[Tensor] = field(default_factory=list)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_length
        self.chosen.append(scores.argmax(-1))
        return torch.full_like(scores, -torch.inf).scatter(1, self.answers[:, step : step + 1], 0.0)


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
