"""What a calibration of MoA is asked for, checked before anything is measured."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from infer_patch.errors import PatchError

BLOCK = SINK = 64


@dataclass(frozen=True)
class Settings:
    """How a plan is looked for.

    Parameters
    ----------
    lengths : tuple of int
        Tokens of the profiled prompts, answers included; multiples of 64. Take lengths like those of your use.
    items : int
        Prompts of each length.
    answer_tokens : int
        The most an answer may take.
    density : float
        Limit on the share of keys that heads hold on average, at each of the lengths and at twice the longest.
    max_rules : int, optional
        Distinct rules in a layer: 1, 2, or None for any number.
    reduce : {"sum", "max"}
        How the influence of query heads that share a key head is put together.
    intervals : int
        Steps in which the loss at one length is traded for that at another.
    validation_length : int, optional
        Where plans are compared; one and a half times the longest profiled length if not given.
    validation_items, validation_plans : int
        Prompts there, and how many plans are compared at most.
    text_folder : path, optional
        Its .txt files make the prompts; generated prose otherwise.
    seed : int
        Draws the prompts.
    """

    lengths: tuple[int, ...] = (512, 1024, 2048)
    items: int = 6
    answer_tokens: int = 32
    density: float = 0.5
    max_rules: int | None = 2
    reduce: Literal["sum", "max"] = "sum"
    intervals: int = 4
    validation_length: int | None = None
    validation_items: int = 4
    validation_plans: int = 6
    text_folder: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(sorted(self.lengths)))
        bad = [n for n in (*self.lengths, self.unseen) if n < 4 * BLOCK or n % BLOCK]
        if not self.lengths or bad or len(set(self.lengths)) < len(self.lengths):
            raise PatchError(
                f"lengths must be different multiples of {BLOCK} tokens from {4 * BLOCK} up, got {list(self.lengths)} "
                f"and {self.unseen} for validation."
            )
        if self.unseen in self.lengths:
            raise PatchError(f"the validation length must be none of the profiled lengths, got {self.unseen}.")
        counts = (self.items, self.answer_tokens, self.intervals, self.validation_items, self.validation_plans)
        if min(counts) < 1:
            raise PatchError(f"items, answer tokens, intervals and validation counts must be 1 or more, got {counts}.")
        if self.answer_tokens > min(self.lengths) // 2:
            raise PatchError(f"answers of {self.answer_tokens} tokens leave too little of {min(self.lengths)} tokens.")
        if not 0 < self.density <= 1:
            raise PatchError(f"density is a share of the keys, above 0 and up to 1, got {self.density}.")
        if self.max_rules not in (None, 1, 2) or self.reduce not in ("sum", "max"):
            raise PatchError(
                f"max_rules must be 1, 2 or None and reduce 'sum' or 'max', got {self.max_rules!r} and {self.reduce!r}."
            )

    @property
    def unseen(self) -> int:
        """The length plans are compared at."""
        if self.validation_length is not None:
            return self.validation_length
        return max(self.lengths) * 3 // 2 // BLOCK * BLOCK

    @property
    def limited(self) -> tuple[int, ...]:
        """The lengths at which density is limited."""
        return (*self.lengths, 2 * max(self.lengths))

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        values.update(lengths=list(self.lengths), validation_length=self.unseen)
        del values["text_folder"]
        return values
