"""Random visual-token pruning: the control that every pruning method must beat at equal budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infer_patch.method import Method, Runtime, option, register
from infer_patch.pruning import keep_best, require_visual_tokens


@register("random")
@dataclass(frozen=True, kw_only=True)
class RandomPruning(Method):
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
    seed : int
        Seed of the draw.
    """

    layer: int = option(2, "K: first layer that runs without the dropped tokens")
    drop_ratio: float = option(0.5, "share of visual tokens to drop")
    pool: str = option("per_image", "shares per picture or over all: per_image, global")
    seed: int = option(0, "seed of the draw")

    ports = ("reduce",)
    summary = "drop random visual tokens (the control at equal budget)"
    modality = "vision"

    def validate(self) -> None:
        self.require(self.layers is None, "set `layer` (K), not `layers`")
        self.require(isinstance(self.layer, int) and self.layer >= 0, f"layer must be 0 or more, got {self.layer!r}")
        self.require(0 <= self.drop_ratio < 1, f"drop_ratio must be at least 0 and below 1, got {self.drop_ratio}")
        self.require(self.pool in ("per_image", "global"), f"pool must be per_image or global, got {self.pool!r}")

    def applicable_layers(self, parts: Any) -> tuple[int, ...]:
        require_visual_tokens(self.name, parts)
        self.require(self.layer < parts.num_layers, f"layer {self.layer} of a model with {parts.num_layers} layers")
        return (self.layer,)

    def runtime(self, parts: Any, layers: tuple[int, ...]) -> Runtime:
        return _RandomPruning(self, parts, layers)


class _RandomPruning(Runtime):
    config: RandomPruning

    def reduce(self, layer: int, tokens: Any) -> Tensor | None:
        draw = torch.rand(tokens.length, generator=torch.Generator().manual_seed(self.config.seed))
        place = (tokens.image >= 0).cumsum(1) - 1
        scores = draw.to(place.device)[place.clamp(min=0)]
        return keep_best(scores, tokens, self.config.drop_ratio, self.config.pool)
