"""What a calibration of ACT is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from infer_patch.errors import PatchError
from infer_patch.patches.act import ACT


@dataclass(frozen=True)
class Settings:
    """How heads are chosen.

    Parameters
    ----------
    beta, threshold, threshold_mode
        Of ACT, while heads are tried.
    layers : tuple of int, optional
        Layers whose heads are tried; 2 to L - 2 if not given.
    min_gain : float
        A head is kept if its mean gain in accuracy over the datasets is above this.
    max_heads : int, optional
        Keep the best ones only.
    batch : int
        Questions answered together.
    seed : int
        Of the statistics on held-out questions.
    """

    beta: float = 0.4
    threshold: float = 0.1
    threshold_mode: str = "absolute"
    layers: tuple[int, ...] | None = None
    min_gain: float = 0.0
    max_heads: int | None = None
    batch: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or (self.max_heads is not None and self.max_heads < 1):
            raise PatchError(f"batch and max_heads must be 1 or more, got {self.batch} and {self.max_heads}.")

    def method(self, heads: Sequence[tuple[int, int]]) -> ACT:
        return ACT(
            heads=tuple(heads),
            beta=self.beta,
            threshold=self.threshold,
            threshold_mode=self.threshold_mode,
            decode="off",
        )
