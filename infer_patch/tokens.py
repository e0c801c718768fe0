"""Tokens of one forward call: logical indices, validity, image spans, and reductions to a subset."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from infer_patch.vision_scores import EncoderScores

INVALID = 2**30  # position of a padding slot: later than every query, so never visible


@dataclass(frozen=True)
class Tokens:
    """What is known about the T new tokens of one forward call.

    Parameters
    ----------
    batch, length : int
        B and T of this call.
    past : int
        Logical tokens already in the cache: new token t has the logical index past + t.
    mask : bool Tensor [B, past + T], optional
        True where a token is real; None when nothing is padded.
    image : int64 Tensor [B, T], optional
        For each new token the number of its picture within the sample (0, 1, ...), -1 for text. None when the call
        brings no visual tokens.
    asked : int
        How many tokens at the end the caller wants logits of (`logits_to_keep`): 1 in `generate`, more where it checks
        a draft. 1 where the call does not say.
    shared : dict
        Scratch space that lives as long as the call: masks, lists and scores that several layers use.
    scores : EncoderScores, optional
        What methods read off the vision encoder, where one looks into it and the call brings visual tokens.
    """

    batch: int
    length: int
    past: int
    mask: Tensor | None
    image: Tensor | None
    device: torch.device
    asked: int = 1
    shared: dict[Any, Any] = field(default_factory=dict)
    scores: EncoderScores | None = None

    @cached_property
    def bounds(self) -> list[tuple[int, int]] | None:
        """First and one-past-last real token of each sample, None without padding. Copies two numbers a row to the
        host, once per call."""
        if self.mask is None:
            return None
        total = self.mask.shape[1]
        first = self.mask.int().argmax(1)
        stop = total - self.mask.flip(1).int().argmax(1)
        first = torch.where(self.mask.any(1), first, total)  # a sample that is all padding so far
        return [(int(f), int(s)) for f, s in torch.stack([first, stop], 1).tolist()]

    @cached_property
    def has_holes(self) -> bool:
        """Whether padding stands between real tokens of a sample."""
        if self.mask is None or self.bounds is None:
            return False
        lengths = torch.tensor([stop - first for first, stop in self.bounds], device=self.mask.device)
        return bool((self.mask.sum(1) != lengths).any())

    @property
    def is_new(self) -> Tensor | None:
        """Validity of the new tokens, bool [B, T], or None when all are real."""
        return None if self.mask is None else self.mask[:, self.past :]

    @property
    def last_index(self) -> Tensor:
        """Index within the call of each sample's last real token, int64 [B]."""
        if self.is_new is None:
            return torch.full((self.batch,), self.length - 1, device=self.device)
        return self.length - 1 - self.is_new.flip(1).int().argmax(1)


@dataclass(frozen=True)
class Reduction:
    """The subset of a call's tokens that is still on its way through the layers.

    Rows keep their order. Samples with fewer survivors than the fullest one are filled up on the left with slots
    that nothing can see, so the result looks like an ordinary left-padded batch.

    Parameters
    ----------
    keep : bool Tensor [B, T]
    index : int64 Tensor [B, m]
        Which token of the call each row is (0 in a filler slot).
    start : tuple of int
        Number of filler slots of each sample.
    length : int
        T, the number of tokens before the reduction.
    """

    keep: Tensor
    index: Tensor
    start: tuple[int, ...]
    length: int

    @classmethod
    def of(cls, keep: Tensor) -> Reduction:
        """Build from bool [B, T]. Copies one count per sample to the host."""
        batch, length = keep.shape
        counts = keep.sum(1).tolist()
        rows = max(max(counts), 1)
        numbers = torch.arange(length, device=keep.device).expand(batch, -1)
        index = torch.where(keep, numbers, -1).sort(dim=1).values[:, length - rows :]
        return cls(keep, index.clamp(min=0), tuple(rows - c for c in counts), length)

    @property
    def rows(self) -> int:
        return self.index.shape[1]

    @cached_property
    def filled(self) -> Tensor | None:
        """bool [B, m], False in filler slots; None when there are none."""
        if not any(self.start):
            return None
        slots = torch.arange(self.rows, device=self.index.device)
        return slots >= torch.tensor(self.start, device=self.index.device)[:, None]

    def positions(self, past: int) -> Tensor:
        """Logical index of every row, int64 [B, m]; `INVALID` in filler slots."""
        positions = self.index + past
        return positions if self.filled is None else positions.masked_fill(~self.filled, INVALID)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Rows of x along `dim` (size T); the dimension before it is the batch (size B or 1)."""
        dim = dim % x.ndim
        index = self.index.to(x.device)
        shape = [1] * x.ndim
        shape[dim - 1], shape[dim] = index.shape
        size = list(x.shape)
        size[dim - 1], size[dim] = index.shape
        expanded = list(x.shape)
        expanded[dim - 1] = index.shape[0]
        return x.expand(expanded).gather(dim, index.view(shape).expand(size))

    @cached_property
    def _flat(self) -> Tensor:
        """Row numbers of the survivors in the [B * T] list of all tokens."""
        offsets = torch.arange(self.index.shape[0], device=self.index.device)[:, None] * self.length
        flat = self.index + offsets
        return flat.reshape(-1) if self.filled is None else flat[self.filled]

    def scatter(self, full: Tensor, rows: Tensor, inplace: bool) -> Tensor:
        """Put rows [B, m, d] back into full [B, T, d]; the other tokens keep what they hold."""
        full = full.contiguous() if inplace else full.clone(memory_format=torch.contiguous_format)
        survivors = rows.reshape(-1, rows.shape[-1]) if self.filled is None else rows[self.filled.to(rows.device)]
        full.view(-1, full.shape[-1]).index_copy_(0, self._flat.to(full.device), survivors)
        return full


def image_numbers(is_visual: Tensor, model_inputs: dict[str, Any]) -> Tensor | None:
    """Number the pictures of each sample: int64 [B, T], -1 for text; None when there is no visual token.

    Two pictures may stand side by side with nothing between them, so runs of placeholders alone do not tell them
    apart. Their lengths come from the features or grid sizes of the call where it has them, from an even split of all
    placeholders over pictures of one size (LLaVA), else from the runs themselves.
    """
    if not bool(is_visual.any()):
        return None
    before = torch.cat([torch.zeros_like(is_visual[:, :1]), is_visual[:, :-1]], 1)
    run_starts = is_visual & ~before
    by_runs = (run_starts.cumsum(1) - 1).masked_fill(~is_visual, -1)
    counts = is_visual.sum(1).tolist()
    lengths = _image_lengths(model_inputs, sum(counts))
    if lengths is None:
        return by_runs
    place = is_visual.cumsum(1) - 1  # of each visual token among those of its sample
    number = torch.zeros_like(place)
    for row, count in enumerate(counts):
        edge = 0
        while edge < count:
            edge += lengths.pop(0)
            number[row] += (place[row] >= edge).long()
        visual = is_visual[row]
        same = number[row, visual].diff() == 0
        if edge != count or bool((same & run_starts[row, visual][1:]).any()):
            return by_runs  # lengths of something else: text stands inside one of them (Idefics3 counts samples)
    return number.masked_fill(~is_visual, -1)


def _image_lengths(inputs: dict[str, Any], total: int) -> list[int] | None:
    """Visual tokens of each picture in batch order, `total` in all, or None when the call does not tell."""
    lengths: list[int] = []
    encoded = inputs.get("mm_encoder_outputs")  # generate encodes pictures ahead of the forward (transformers 5.2x)
    grid, pixels, sizes = (inputs.get(name) for name in ("image_grid_thw", "pixel_values", "image_sizes"))
    if encoded and list(encoded) == ["image"]:
        lengths = [len(features) for features in encoded["image"].pooler_output]
    elif pixels is not None and isinstance(grid, Tensor):
        patches = grid.prod(-1).tolist()
        merged = sum(patches) // total  # patches that share one token (2 x 2 in Qwen-VL)
        lengths = [p // max(merged, 1) for p in patches]
    elif isinstance(pixels, Tensor) and pixels.ndim == 4 and _all_equal(sizes):
        lengths = [total // max(len(pixels), 1)] * len(pixels)
    return [n for n in lengths if n] if sum(lengths) == total else None


def _all_equal(rows: Any) -> bool:
    return not isinstance(rows, Tensor) or bool((rows == rows[:1]).all())
