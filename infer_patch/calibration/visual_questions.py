"""Questions about pictures that calibrations of visual-token methods measure on: drawn scenes, or POPE files.

Scenes come from seeds that no evaluation of this package uses by default, so that a schedule is not judged by the
pictures it was made on. Pictures are split: some to search with, the others to check the result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infer_patch.errors import PatchError
from infer_patch.evals.generation import collate
from infer_patch.evals.pope import Pope, PopeTask
from infer_patch.evals.pope_scenes import PopeScenes
from infer_patch.evals.prompts import encode, prompt_hash
from infer_patch.evals.task import Item
from infer_patch.families import ModelParts

FIRST_SEED = 1_000_000  # of calibration scenes; evaluations count from 0


@dataclass(frozen=True)
class Source:
    """Where questions come from.

    Parameters
    ----------
    pictures, held_out : int
        Pictures to measure on while searching, and others for the check at the end (0 for none).
    files, images : tuple of path, path, optional
        Official POPE files and the folder of their pictures; drawn scenes without.
    batch_size : int
        Questions answered at once.
    seed : int
        Draws the pictures.
    """

    pictures: int = 12
    held_out: int = 12
    files: tuple[Path, ...] = ()
    images: Path | None = None
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pictures < 1 or self.held_out < 0 or self.batch_size < 1 or self.seed < 0:
            raise PatchError(
                "pictures and batch size must be 1 or more, held-out pictures and seed 0 or more, got "
                f"{self.pictures}, {self.batch_size}, {self.held_out}, {self.seed}."
            )
        if bool(self.files) != (self.images is not None):
            raise PatchError("question files need the folder of their pictures, and the other way round.")

    def task(self) -> PopeTask:
        count = self.pictures + self.held_out
        if self.files and self.images is not None:
            return Pope(files=self.files, images=self.images, limit_images=count, seed=self.seed)
        return PopeScenes(scenes=count, seed=FIRST_SEED + self.seed)

    def describe(self) -> str:
        names = ", ".join(file.name for file in self.files)
        return f"POPE questions of {names}" if names else f"POPE questions about drawn scenes, seed {self.seed}"


@dataclass(frozen=True)
class Questions:
    """Encoded questions in fixed batches, and the task that scores their answers."""

    task: PopeTask
    items: list[Item]
    encoded: list[dict[str, Any]]
    batch_size: int
    pad_token_id: int

    def __len__(self) -> int:
        return len(self.items)

    def batches(self) -> list[tuple[list[Item], dict[str, Any]]]:
        """Items and their inputs, padded on the left."""
        size = self.batch_size
        return [
            (self.items[i : i + size], collate(self.encoded[i : i + size], self.pad_token_id))
            for i in range(0, len(self.items), size)
        ]

    @property
    def digest(self) -> str:
        """Short hash over all inputs and references."""
        rows = [f"{prompt_hash(x)} {item.reference}" for x, item in zip(self.encoded, self.items)]
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]

    def tokens(self, parts: ModelParts) -> tuple[int, float]:
        """The most visual tokens of a question, and its text tokens on average."""
        ids = torch.tensor(parts.image_token_ids)
        visual = [int(torch.isin(x["input_ids"].cpu(), ids).sum()) for x in self.encoded]
        text = [x["input_ids"].shape[1] - n for x, n in zip(self.encoded, visual)]
        return max(visual), sum(text) / len(text)


def questions(source: Source, model: Any, processor: Any) -> tuple[Questions, Questions | None]:
    """The questions to search with, and those held out; no picture is in both."""
    task = source.task()
    items = task.items(processor, model)
    names = list(dict.fromkeys(item.group for item in items))
    if len(names) < source.pictures + source.held_out:
        raise PatchError(
            f"the files name {len(names)} pictures; {source.pictures} to search with and {source.held_out} held out "
            "were asked for."
        )
    tokenizer = getattr(processor, "tokenizer", processor)
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)

    def about(pictures: Sequence[str]) -> Questions:
        chosen = [item for item in items if item.group in set(pictures)]
        encoded = [encode(item.prompt, processor, model, task.chat) for item in chosen]
        return Questions(task, chosen, encoded, source.batch_size, pad)

    held_out = about(names[source.pictures :]) if source.held_out else None
    return about(names[: source.pictures]), held_out
