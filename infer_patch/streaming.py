"""What `generate` is given to hand on an answer while it is made, and to end it early."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer


class StopWhen(StoppingCriteria):
    """Ends the answer when the caller says so."""

    def __init__(self, should_stop: Callable[[], bool] | None):
        self._should_stop = should_stop
        self.stopped = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.stopped = self._should_stop is not None and self._should_stop()
        return torch.full((input_ids.shape[0],), self.stopped, dtype=torch.bool, device=input_ids.device)


class TextStream(BaseStreamer):
    """Collects the tokens of the answer, and hands on its text as soon as whole characters are there.

    A token is decoded together with the ones before it, back to the last piece that was handed on: alone, it may lose
    the space in front of it, or be part of a character.
    """

    def __init__(self, decode: Callable[[list[int]], str], on_text: Callable[[str], None] | None):
        self._decode = decode
        self._on_text = on_text
        self._prompt_seen = False
        self._start = self._read = 0  # tokens before `_read` were handed on, the last piece began at `_start`
        self.ids: list[int] = []
        self.first = 0.0

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        if not self.ids:
            self.first = time.perf_counter()
        self.ids.extend(value.flatten().tolist())
        self._hand_on(last=False)

    def end(self) -> None:
        self._hand_on(last=True)

    def _hand_on(self, last: bool) -> None:
        if self._on_text is None:
            return
        known, now = self._decode(self.ids[self._start : self._read]), self._decode(self.ids[self._start :])
        if len(now) > len(known) and (last or not now.endswith("\ufffd")):
            self._on_text(now[len(known) :])
            self._start, self._read = self._read, len(self.ids)
