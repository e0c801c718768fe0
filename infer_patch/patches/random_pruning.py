"""Random visual-token pruning: the control that every pruning method must beat at equal budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from infer_patch.method import Runtime, option, register
from infer_patch.pruning import LayerPruning, count_to_keep, keep_counts, random_scores


@register("random")
@dataclass(frozen=True, kw_only=True)
class RandomPruning(LayerPruning):
    """Layers K and up go on without a random share of the visual tokens. A control, not a method.

    Drops for real, like `fastv`, with the same counts. The draw depends on the seed and on a token's place among the
    visual tokens of its sample only, so a sample in a batch loses the tokens it would lose alone.

    Parameters
    ----------
    layer : int
        K, the first layer that runs without the dropped tokens; 0 drops them before the decoder.
    drop_ratio : float
        Share of the visual tokens to drop, in [0, 1).
    pool : {"per_image", "global"}
        Each picture loses its own share, or a sample's pictures one share together.
    tokens : int, optional
        Visual tokens to keep of every picture (or sample), in place of `drop_ratio`.
    seed : int
        Seed of the draw.
    """

    tokens: int | None = option(None, "visual tokens to keep, in place of drop_ratio")
    seed: int = option(0, "seed of the draw")

    summary = "drop random visual tokens (the control at equal budget)"

    def validate(self) -> None:
        super().validate()
        count = self.tokens
        self.require(count is None or (isinstance(count, int) and count >= 1), f"tokens must be 1 or more, got {count}")

    def runtime(self, parts: Any, layers: tuple[int, ...]) -> Runtime:
        return _RandomPruning(self, parts, layers)


class _RandomPruning(Runtime):
    config: RandomPruning

    def reduce(self, layer: int, tokens: Any) -> Tensor | None:
        scores = random_scores(tokens, self.config.seed)
        return keep_counts(scores, tokens, self._count, self.config.pool)

    def _count(self, there: Tensor) -> Tensor:
        if self.config.tokens is None:
            return count_to_keep(there, self.config.drop_ratio)
        return there.clamp(max=self.config.tokens)
