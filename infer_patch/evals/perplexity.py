"""Perplexity of text, read through the cache or in one pass.

A method that changes the cache is invisible to one long forward pass: nothing is ever read back. So by default the
first part of every window is prefilled, and the rest is scored through the cache, teacher-forced.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from infer_patch.cache_memory import cache_bytes
from infer_patch.errors import PatchError
from infer_patch.evals.generation import BatchTrace
from infer_patch.evals.haystack import build_haystack
from infer_patch.evals.needle import check_context, read_texts
from infer_patch.evals.prompts import Prompt
from infer_patch.evals.task import Batch, Item, Scored, Task


@dataclass(frozen=True)
class Perplexity(Task):
    """Token perplexity over windows of one text: exp(mean negative log-likelihood).

    Not comparable with the word perplexity of lm-eval's `wikitext`, nor between tokenizers.

    Parameters
    ----------
    tokens : int
        Length of a window.
    windows : int
        Consecutive windows, each on its own.
    prefill : int
        Tokens of a window that are read at once and not scored; 0 scores the whole window in one pass, which does not
        exercise the cache.
    chunk : int
        Tokens read per step after the prefill; 1 is what decoding does.
    text_folder : path, optional
        Its .txt files, joined in the order of their names; generated prose otherwise.
    """

    name: ClassVar[str] = "ppl"
    headline: ClassVar[str] = "nll"
    answers_prompts: ClassVar[bool] = False
    unit: ClassVar[Literal["share", "nats"]] = "nats"
    tokens: int = 2048
    windows: int = 4
    prefill: int = 1920
    chunk: int = 1
    text_folder: Path | None = None
    seed: int = 0
    max_new_tokens: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 2 or self.windows < 1 or self.chunk < 1 or not 0 <= self.prefill < self.tokens:
            raise PatchError(
                "tokens must be 2 or more, windows and chunk 1 or more, prefill from 0 to tokens - 1; "
                f"got {self.tokens}, {self.windows}, {self.chunk}, {self.prefill}"
            )

    @property
    def title(self) -> str:  # type: ignore[override]
        how = "one pass, cache not exercised" if not self.prefill else f"{self.prefill:,} prefilled, the rest by cache"
        return f"token_ppl@{self.tokens} ({how})"

    @property
    def through_cache(self) -> bool:  # type: ignore[override]
        return self.prefill > 0

    def items(self, processor: Any, model: Any) -> list[Item]:
        tokenizer = getattr(processor, "tokenizer", processor)
        check_context(model, self.tokens, "the length of a window")
        needed = self.tokens * self.windows
        if self.text_folder is None:
            text = build_haystack(tokenizer, needed + needed // 20 + 64, self.seed)
        else:
            text = read_texts(self.text_folder)
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if len(ids) < needed:
            raise PatchError(
                f"the text has {len(ids):,} tokens; {self.windows} windows of {self.tokens:,} need {needed:,}."
            )
        cut = [ids[i * self.tokens : (i + 1) * self.tokens] for i in range(self.windows)]
        return [Item(f"window {i}", Prompt(input_ids=tuple(part)), None) for i, part in enumerate(cut)]

    @torch.no_grad()
    def answer(self, model: Any, batch: Batch) -> BatchTrace:
        ids = torch.cat([sample["input_ids"] for sample in batch.inputs])
        start, clock = self.prefill or self.tokens, _Clock(model.device)
        out = model(ids[:, :start], use_cache=True, logits_to_keep=1 if self.prefill else 0)
        first = clock.lap()
        logits, cache, steps = [out.logits], out.past_key_values, 0
        for at in range(start, self.tokens - 1, self.chunk):
            out = model(ids[:, at : min(at + self.chunk, self.tokens - 1)], past_key_values=cache, use_cache=True)
            logits, steps = [*logits, out.logits], steps + 1
        rest = clock.lap()
        predicted = torch.cat(logits, 1)[:, : self.tokens - 1].float()
        target = ids[:, -predicted.shape[1] :] if self.prefill else ids[:, 1:]
        predicted = predicted[:, : target.shape[1]]
        loss = F.cross_entropy(predicted.transpose(1, 2), target, reduction="none").double().mean(1)
        scores = [{"nll": float(x), "tokens": target.shape[1]} for x in loss]
        return BatchTrace([[]] * len(ids), first, rest / steps if steps else None, cache_bytes(cache), scores)

    def score(self, item: Item, output: str) -> dict[str, Any]:
        """Nothing: there is no output, `answer` reads the loss off the model."""
        return {}

    def value(self, score: Any) -> float:
        return float(score["nll"])

    def metrics(self, rows: Sequence[Scored]) -> dict[str, float]:
        tokens = sum(row["score"]["tokens"] for row in rows)
        nll = sum(row["score"]["nll"] * row["score"]["tokens"] for row in rows) / tokens
        return {"nll": nll, "ppl": math.exp(nll)}


class _Clock:
    def __init__(self, device: torch.device):
        self._device, self._last = device, 0.0
        self.lap()

    def lap(self) -> float:
        """Seconds since the last lap, the device's work included."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        last, self._last = self._last, time.perf_counter()
        return self._last - last
