"""VTC-CLS: before the decoder, drop the visual tokens that the vision encoder's CLS token hardly looks at
(arXiv 2412.05819)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from infer_patch.errors import UnsupportedModelError
from infer_patch.method import Method, Runtime, option, register
from infer_patch.positions import why_not_packed
from infer_patch.pruning import count_to_keep
from infer_patch.tokens import Tokens
from infer_patch.vision_layout import NEWLINE
from infer_patch.vision_scores import EncoderScores
from infer_patch.vision_tower import TowerCall, cls_attention, find_vision_tower, received_attention


@register("vtc_cls")
@dataclass(frozen=True, kw_only=True)
class VTCCLS(Method):
    """The CLS token's attention, summed over the encoder's last blocks, ranks the patches; the decoder gets the best.

    Real dropping at the decoder's input: dropped tokens are neither computed nor cached in any layer. The ranking does
    not depend on the prompt. One attention row per block is recomputed from q and k, so the encoder may run SDPA or
    flash-attn. Encoders without a CLS token are ranked by the attention that patches receive (this project's
    extension). Tokens dropped in one turn are gone in the next.

    Parameters
    ----------
    tokens : int, optional
        U: visual tokens to keep of every picture. In place of `drop_ratio`.
    drop_ratio : float
        Share of every picture's visual tokens to drop, in [0, 1). round-half-even(N (1 - R)) are kept, at least one.
    ensemble_k : int
        Number of encoder blocks that vote: the last ones that the features pass through.
    start_block : int, optional
        The first block that votes, in place of `ensemble_k`; negative counts from the encoder's end.
    positions : {"auto", "pack", "keep"}
        `pack` numbers the remaining tokens without gaps, as the authors do; `keep` leaves original positions. `auto`
        packs wherever it can be done.
    newlines : {"row", "always"}
        Newline tokens between rows of tiles stay with at least one token of their row, or always.

    References
    ----------
    Wang et al., "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs", arXiv 2412.05819, 2024.
    """

    tokens: int | None = option(None, "U: visual tokens to keep per picture, in place of drop_ratio")
    drop_ratio: float = option(0.75, "R: share of every picture's visual tokens to drop")
    ensemble_k: int = option(7, "number of last encoder blocks that vote")
    start_block: int | None = option(None, "first encoder block that votes, in place of ensemble_k")
    positions: str = option("auto", "pack (number the rest without gaps), keep, or auto: pack where possible")
    newlines: str = option("row", "newline tokens between tiles: row (with their row) or always")

    ports = ("reduce",)
    paper = "arXiv 2412.05819"
    summary = "drop visual tokens that the encoder's CLS token hardly looks at"
    modality = "vision"

    def validate(self) -> None:
        self.require(self.layers is None, "it acts before the decoder; leave `layers` out")
        count = self.tokens
        self.require(count is None or (isinstance(count, int) and count >= 1), f"tokens must be 1 or more, got {count}")
        self.require(0 <= self.drop_ratio < 1, f"drop_ratio must be at least 0 and below 1, got {self.drop_ratio}")
        self.require(self.ensemble_k >= 1, f"ensemble_k must be 1 or more blocks, got {self.ensemble_k}")
        start = self.start_block
        self.require(start is None or isinstance(start, int), f"start_block must be a block number, got {start!r}")
        modes = ("auto", "pack", "keep")
        self.require(self.positions in modes, f"positions must be one of {', '.join(modes)}, got {self.positions!r}")
        self.require(self.newlines in ("row", "always"), f"newlines must be row or always, got {self.newlines!r}")

    def applicable_layers(self, parts: Any) -> tuple[int, ...]:
        if not parts.image_token_ids:
            raise UnsupportedModelError(
                f"vtc_cls prunes visual tokens, and {parts.model_type} has none (no vision configuration with an image "
                "token id was found)."
            )
        tower = find_vision_tower(parts)
        last = tower.feature_block(getattr(parts.root.config, "vision_feature_layer", None))
        start = self.start_block
        if not self.voting_blocks(tower, last):
            whole = [i for i in tower.whole if i <= last]
            raise UnsupportedModelError(
                f"vtc_cls: start_block {start} leaves no block to vote; features of {parts.model_type} pass through "
                f"blocks 0 to {last}, of which blocks {whole} see the whole picture."
            )
        if self.positions == "pack" and (reason := why_not_packed(parts)):
            raise UnsupportedModelError(
                f'vtc_cls: positions of {parts.model_type} cannot be packed: {reason}. Use positions="keep".'
            )
        return (0,)

    def voting_blocks(self, tower: Any, feature_block: int) -> tuple[int, ...]:
        """Encoder blocks whose attention is summed, given the last one that the features pass through."""
        if self.start_block is None:
            return cast("tuple[int, ...]", tower.last_blocks(self.ensemble_k, feature_block))
        start = self.start_block + (tower.blocks if self.start_block < 0 else 0)
        return tuple(i for i in tower.whole if start <= i <= feature_block)

    def at_random(self) -> dict[str, Any]:
        """Options of `random` that keep as many tokens (evaluations put it beside this method)."""
        return {"layer": 0, "drop_ratio": self.drop_ratio, "tokens": self.tokens}

    def runtime(self, parts: Any, layers: tuple[int, ...]) -> Runtime:
        return _VTCCLS(self, parts, layers)


def tile_budgets(sizes: Tensor, total: int) -> Tensor:
    """Share `total` over tiles in proportion to their tokens, by largest remainders, at least 1 each: int64 [tiles].

    Ties go to the earlier tile. With fewer tokens than tiles, every tile still keeps one.
    """
    exact = sizes.double() * total / sizes.sum()
    budget = exact.floor().long()
    order = (exact - budget).sort(descending=True, stable=True).indices
    budget[order[: total - int(budget.sum())]] += 1
    short = (budget < 1) & (sizes > 0)
    while bool(short.any()) and int(budget.max()) > 1:  # what the smallest need comes from the largest
        budget[int(budget.argmax())] -= 1
        budget[int(short.int().argmax())] += 1
        short = (budget < 1) & (sizes > 0)
    return torch.minimum(budget.clamp(min=1), sizes)


def best_patches(scores: Tensor, tile: Tensor, total: int) -> Tensor:
    """The best-scored tokens of every tile of one picture, `total` over all: bool [N].

    scores [N]; tile [N] int64, negative for tokens that are not patches (never chosen here). Ties go to the lower
    index.
    """
    keep = torch.zeros_like(tile, dtype=torch.bool)
    numbers, sizes = tile[tile >= 0].unique(return_counts=True)
    for number, budget in zip(numbers.tolist(), tile_budgets(sizes, total).tolist()):
        here = (tile == number).nonzero()[:, 0]
        best = scores[here].sort(descending=True, stable=True).indices[:budget]
        keep[here[best]] = True
    return keep


def newlines_of_kept_rows(keep: Tensor, tile: Tensor) -> Tensor:
    """Newline tokens that end a row with at least one kept token: bool [N].

    A row is what stands between two newlines, without the tokens of the whole picture (tile 0) where there are others.
    """
    newline = tile == NEWLINE
    row = newline.long().cumsum(0) - newline.long()
    in_row = keep & (tile >= (1 if bool((tile > 0).any()) else 0))
    kept_rows = torch.zeros(int(row.max()) + 1, dtype=torch.long, device=keep.device).index_add_(0, row, in_row.long())
    return newline & (kept_rows[row] > 0)


class _VTCCLS(Runtime):
    config: VTCCLS

    def __init__(self, config: VTCCLS, parts: Any, layers: tuple[int, ...]):
        super().__init__(config, parts, layers)
        self.packs = config.positions == "pack" or (config.positions == "auto" and why_not_packed(parts) is None)
        self._tower = find_vision_tower(parts)

    def encoder_blocks(self, feature_block: int) -> Collection[int]:
        return self.config.voting_blocks(self._tower, feature_block)

    def encode(self, block: int, call: TowerCall) -> dict[str, Tensor]:
        return {"score": cls_attention(call) if call.has_cls else received_attention(call)}

    def reduce(self, layer: int, tokens: Tokens) -> Tensor:
        if self not in tokens.shared:  # asked twice where positions are packed
            tokens.shared[self] = self._kept(cast(EncoderScores, tokens.scores), cast(Tensor, tokens.image))
        return cast(Tensor, tokens.shared[self])

    def _kept(self, seen: EncoderScores, image: Tensor) -> Tensor:
        keep = image < 0
        scores = seen.values[self, "score"]
        for sample, pictures in enumerate((image.amax(1) + 1).tolist()):
            for picture in range(pictures):
                here = (image[sample] == picture).nonzero()[:, 0]
                tile = seen.tile[sample, here]
                there = (tile >= 0).sum()
                total = self.config.tokens or int(count_to_keep(there, self.config.drop_ratio))
                kept = best_patches(scores[sample, here], tile, min(total, int(there)))
                always = self.config.newlines == "always"
                kept |= (tile == NEWLINE) if always else newlines_of_kept_rows(kept, tile)
                keep[sample, here] = kept | ((tile < 0) & (tile != NEWLINE))
        return keep
