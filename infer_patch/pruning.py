"""What the visual-token pruning methods share: counts, top-k with stable ties, budgets per picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from infer_patch.errors import UnsupportedModelError
from infer_patch.families import ModelParts
from infer_patch.method import Method, option
from infer_patch.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class LayerPruning(Method):
    """Options of methods that drop a share of the visual tokens once, at the input of one decoder layer."""

    layer: int = option(2, "K: first layer that runs without the dropped tokens")
    drop_ratio: float = option(0.5, "R: share of visual tokens to drop")
    pool: str = option("per_image", "shares per picture or over all: per_image, global")

    ports = ("reduce",)
    modality = "vision"
    first_layer: ClassVar[int] = 0  # the smallest `layer`

    def validate(self) -> None:
        least, layer = self.first_layer, self.layer
        self.require(self.layers is None, "set `layer` (K), not `layers`")
        self.require(isinstance(layer, int) and layer >= least, f"layer must be {least} or more, got {layer!r}")
        self.require(0 <= self.drop_ratio < 1, f"drop_ratio must be at least 0 and below 1, got {self.drop_ratio}")
        self.require(self.pool in ("per_image", "global"), f"pool must be per_image or global, got {self.pool!r}")

    def applicable_layers(self, parts: ModelParts) -> tuple[int, ...]:
        if not parts.image_token_ids:
            raise UnsupportedModelError(
                f"{self.name} prunes visual tokens, and {parts.model_type} has none (no vision configuration with an "
                "image token id was found)."
            )
        self.require(self.layer < parts.num_layers, f"layer {self.layer} of a model with {parts.num_layers} layers")
        return (self.layer,)


def count_to_keep(tokens: Tensor, drop_ratio: float) -> Tensor:
    """k = round-half-even(N (1 - R)), at least 1 where there is a token: int64 like `tokens`."""
    kept = torch.round(tokens.double() * (1 - drop_ratio)).long()
    return torch.where(tokens > 0, kept.clamp(min=1), 0)


def keep_best(scores: Tensor, tokens: Tokens, drop_ratio: float, pool: str) -> Tensor:
    """Text and the best-scored visual tokens, 1 - `drop_ratio` of them: bool [B, T]; see `keep_counts`."""
    return keep_counts(scores, tokens, lambda n: count_to_keep(n, drop_ratio), pool)


def keep_counts(scores: Tensor, tokens: Tokens, counts: Callable[[Tensor], Tensor], pool: str) -> Tensor:
    """Text and the best-scored visual tokens, `counts` of them: bool [B, T].

    scores [B, T] are read at visual tokens only. `counts` maps numbers of tokens to how many stay. pool "per_image"
    gives each picture its own share, "global" one share to all pictures of a sample. Ties go to the lower index. A
    sample whose last token here is visual keeps everything: its prompt is not complete (chunked prefill).
    """
    image = cast(Tensor, tokens.image)  # reducers run only where there are visual tokens
    complete = image.gather(1, tokens.last_index[:, None]) < 0
    keep = (image < 0) | ~complete
    groups = image if pool == "per_image" else image.clamp(max=0)
    for picture in range(int(groups.max()) + 1):
        member = groups == picture
        k = counts(member.sum(1))
        order = scores.masked_fill(~member, float("-inf")).sort(dim=1, descending=True, stable=True).indices
        rank = torch.empty_like(order)
        rank.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
        keep = keep | (member & (rank < k[:, None]))
    return keep


def with_whole_prompt(tokens: Tokens) -> Tensor:
    """bool [B]: samples with pictures here, and text behind them (else the prompt is not complete)."""
    image = cast(Tensor, tokens.image)
    complete = image.gather(1, tokens.last_index[:, None])[:, 0] < 0
    return complete & (image >= 0).any(1)


def random_scores(tokens: Tokens, seed: int) -> Tensor:
    """A uniform draw for each place among the visual tokens of a sample, [B, T]: the same alone and in a batch."""
    draw = torch.rand(tokens.length, generator=torch.Generator().manual_seed(seed))
    place = (cast(Tensor, tokens.image) >= 0).cumsum(1) - 1
    return draw.to(place.device)[place.clamp(min=0)]
