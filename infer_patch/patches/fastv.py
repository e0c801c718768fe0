"""FastV: past the first layers, drop the visual tokens that the prompt's last token hardly reads (arXiv 2403.06764)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from infer_patch.method import Runtime, option, register
from infer_patch.pruning import LayerPruning, keep_best
from infer_patch.visual_scores import blank_scores, scores_of, text_after_pictures


@register("fastv")
@dataclass(frozen=True, kw_only=True)
class FastV(LayerPruning):
    """Layer K-1's attention from the last prompt token ranks the visual tokens; layers K and up go on without the rest.

    Real dropping, in prefill: dropped tokens are not computed and not cached from layer K on. Positions of the
    survivors stay. Scores are recomputed for one query row from q and k, so no eager attention is needed. Text, the
    tokens around pictures and text-only prompts are never touched. Tokens dropped in one turn are gone in the next.

    Parameters
    ----------
    layer : int
        K, the first layer that runs without the dropped tokens; at least 1. Layer K - 1 is the judge.
    drop_ratio : float
        R in [0, 1): share of the visual tokens to drop. round-half-even(N (1 - R)) are kept, at least one per picture.
    pool : {"per_image", "global"}
        Each picture keeps its own share (this project's default for several pictures), or all compete.

    query : {"last", "text_mean", "all"}
        Who judges: the last prompt token, as all published numbers; the mean over the text behind the pictures; or over
        all tokens, as the paper's prose has it.

    References
    ----------
    Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", arXiv 2403.06764, ECCV 2024.
    """

    query: str = option("last", "who judges: last (prompt token), text_mean (behind the pictures), all")

    paper = "arXiv 2403.06764"
    summary = "drop visual tokens that the last prompt token hardly reads"
    first_layer = 1  # layer K - 1 is the judge

    def validate(self) -> None:
        super().validate()
        judges = ("last", "text_mean", "all")
        self.require(self.query in judges, f"query must be one of {', '.join(judges)}, got {self.query!r}")

    def runtime(self, parts: Any, layers: tuple[int, ...]) -> Runtime:
        return _FastV(self, parts, layers)


class _FastV(Runtime):
    config: FastV

    def __init__(self, config: FastV, parts: Any, layers: tuple[int, ...]):
        super().__init__(config, parts, layers)
        # a judge with a window of its own may not see the pictures: take the nearest earlier layer that does
        judges = [i for i in parts.full_attention_layers if i < config.layer]
        self.observes = frozenset((judges[-1] if judges else config.layer - 1,))

    def observe(self, layer: int, call: Any) -> None:
        shared = call.tokens.shared
        if self not in shared:
            shared[self] = blank_scores(call.tokens)
        if self.config.query == "text_mean":
            behind = text_after_pictures(call.tokens)
            rows = [max(behind[sample], 1) for sample in call.samples]
        else:
            rows = [call.q.shape[2] if self.config.query == "all" else 1] * len(call.samples)
        scores_of(call, rows, shared[self])

    def reduce(self, layer: int, tokens: Any) -> Tensor | None:
        return keep_best(tokens.shared.pop(self), tokens, self.config.drop_ratio, self.config.pool)
