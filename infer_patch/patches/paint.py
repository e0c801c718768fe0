"""PAINT: the newest token reads more of the patches that the vision encoder's CLS token looks at (arXiv 2501.12206)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, cast

import torch
from torch import Tensor

from infer_patch.errors import UnsupportedModelError
from infer_patch.method import Method, Runtime, option, register
from infer_patch.row_edits import RowEdit
from infer_patch.tokens import Tokens
from infer_patch.vision_scores import EncoderScores
from infer_patch.vision_tower import TowerCall, cls_attention, find_vision_tower, received_attention

FIRST_LAYER = 2  # of the decoder, as in the authors' code
_GAINS = "gains of visual tokens"  # of a sample, float32 by logical index; remembered by each layer of the cache


@register("paint")
@dataclass(frozen=True, kw_only=True)
class Paint(Method):
    """Attention of the newest token to informed patches is raised, in decoder layers 2 and up and all heads.

    Two disjoint sets are picked once per picture: *local* tokens, the share that the CLS token looks at most in the
    encoder's first block, and *summary* tokens, the upper outliers (Tukey) of its attention in the last block but one.
    In the row of the newest token, scores z of local tokens become z + alpha |z|, those of summary tokens z + beta |z|.
    All other rows and keys stay. Nothing gets cheaper: this is against made-up objects, not against cost.

    Parameters
    ----------
    alpha, beta : float
        Gains of local and of summary tokens, 0 or more. Above alpha = 0.7 answers fall apart (authors' table 2).
    local_ratio : float
        Share of a picture's tokens that are local, in [0, 1].
    spatial_ratio : float
        Share of a picture's tokens that are local besides, in [0, 1]: those that the other patches look at most in the
        encoder's first block. Our reading of the authors' spatial picks, whose released score ranks rounding errors.
    boost_prefill : bool
        Also for the last token of the prompt, which gives the first new token.

    References
    ----------
    Arif et al., "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model",
    arXiv 2501.12206, 2025.
    """

    alpha: float = option(0.7, "gain of local tokens")
    beta: float = option(0.3, "gain of summary tokens")
    local_ratio: float = option(0.25, "share of a picture's tokens that are local")
    spatial_ratio: float = option(0.0, "share of a picture's tokens that are local because other patches look at them")
    boost_prefill: bool = option(True, "also for the last token of the prompt")

    ports = ("calibrate",)
    paper = "arXiv 2501.12206"
    calibration_order = 0
    summary = "raise the newest token's attention to patches that the CLS token looks at"
    modality = "vision"

    def validate(self) -> None:
        self.require_numbers("alpha", "beta", "local_ratio", "spatial_ratio")
        for name in ("alpha", "beta"):
            gain = getattr(self, name)
            self.require(isfinite(gain) and gain >= 0, f"{name} must be 0 or more, got {gain}")
        for name in ("local_ratio", "spatial_ratio"):
            ratio = getattr(self, name)
            self.require(0 <= ratio <= 1, f"{name} must be between 0 and 1, got {ratio}")

    def applicable_layers(self, parts: Any) -> tuple[int, ...]:
        kind = parts.model_type
        if not parts.image_token_ids:
            raise UnsupportedModelError(f"paint raises attention to visual tokens, and {kind} has none.")
        if parts.attention_logits_capped or parts.learned_sinks:
            raise UnsupportedModelError(f"paint changes plain attention scores; {kind} caps them or adds a sink.")
        tower = find_vision_tower(parts)
        if not tower.has_cls or tower.blocks < 2:
            raise UnsupportedModelError(
                f"paint picks tokens by the CLS token of the vision encoder, and that of {kind} has none (or a single "
                "block). It serves CLIP and InternViT encoders: LLaVA, LLaVA-NeXT, InternVL."
            )
        return cast("tuple[int, ...]", parts.full_attention_layers)

    def resolve_layers(self, parts: Any) -> tuple[int, ...]:
        layers = super().resolve_layers(parts)
        if self.layers is None:
            layers = tuple(i for i in layers if i >= FIRST_LAYER)
        if not layers:
            raise UnsupportedModelError(
                f"paint acts from layer {FIRST_LAYER} on, in layers without a window, and {parts.model_type} has none "
                "there. Give `layers`."
            )
        return layers

    def runtime(self, parts: Any, layers: tuple[int, ...]) -> Runtime:
        return _Paint(self, parts, layers)


def informed_tokens(
    first: Tensor,
    penultimate: Tensor,
    local_ratio: float,
    received: Tensor | None = None,
    spatial_ratio: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Local and summary tokens of one picture, two disjoint bool [N].

    first, penultimate [N]: CLS attention in the encoder's first block and in the last but one. Summary tokens are
    those above Q3 + 1.5 IQR of the latter (quartiles interpolated linearly), local ones the floor(local_ratio N)
    largest of the former that are not summary tokens. received [N]: attention from all patches in the first block,
    whose floor(spatial_ratio N) largest are local, too.
    """
    lower, upper = penultimate.quantile(0.25), penultimate.quantile(0.75)
    summary = penultimate > upper + 1.5 * (upper - lower)
    local = torch.zeros_like(summary)
    local[first.sort(descending=True, stable=True).indices[: int(local_ratio * len(first))]] = True
    if received is not None:
        local[received.sort(descending=True, stable=True).indices[: int(spatial_ratio * len(received))]] = True
    return local & ~summary, summary


def boosted(z: Tensor, gains: Tensor) -> Tensor:
    """Probabilities of scores z raised to z + g |z|, gains g broadcast over them; z is finite."""
    return (z + gains * z.abs()).softmax(-1)


def boosting(gains: Tensor, rows: int) -> RowEdit:
    """What methods after this one find in the last of a call's `rows`: gains [b, S] at work."""

    def edit(a: Tensor, z: Tensor, heads: Sequence[int], here: slice) -> Tensor:
        if here.stop < rows:
            return a
        return torch.cat([a[:, :, :-1], boosted(z[:, :, -1:], gains[:, None, None])], 2)

    return edit


def boosted_row(q: Tensor, k: Tensor, v: Tensor, gains: Tensor, scale: float) -> Tensor:
    """Attention of one query with scores z = scale q k raised to z + g |z|, softmax in fp32: [b, H, 1, D].

    q [b, H, 1, D], k and v [b, H_kv, S, D], gains g [b, S].
    """
    grouped = q.float().unflatten(1, (k.shape[1], -1))
    z = grouped @ k.float()[:, :, None].transpose(-1, -2) * scale
    weights = boosted(z, gains[:, None, None, None])
    return (weights.to(v.dtype) @ v[:, :, None]).flatten(1, 2)


def _forget_taken_back(memory: dict[Any, Any], past: int) -> None:
    """Gains of tokens that are no longer in the cache are not those of the tokens that come in their place."""
    gains = memory.get(_GAINS)
    if gains is not None and len(gains) > past:
        memory[_GAINS] = gains[:past]
        if not bool((gains[:past] > 0).any()):
            del memory[_GAINS]


class _Paint(Runtime):
    config: Paint

    def __init__(self, config: Paint, parts: Any, layers: tuple[int, ...]):
        super().__init__(config, parts, layers)
        self._penultimate = find_vision_tower(parts).blocks - 2

    def encoder_blocks(self, feature_block: int) -> Collection[int]:
        return {0, self._penultimate}

    def encode(self, block: int, call: TowerCall) -> dict[str, Tensor]:
        row = cls_attention(call)
        seen = {name: row for name, wanted in (("first", 0), ("penultimate", self._penultimate)) if block == wanted}
        if block == 0 and self.config.spatial_ratio:
            seen["received"] = received_attention(call, by_patches=True)
        return seen

    def calibrate(self, layer: int, call: Any, output: Tensor) -> Tensor | str:
        for memory in call.memory:
            _forget_taken_back(memory, call.tokens.past)
        if call.tokens.scores is not None:
            self._remember(call)
        if call.q.shape[2] > 1 and not self.config.boost_prefill:
            return "prompts are not boosted"
        if not any(_GAINS in memory for memory in call.memory):
            return "no picture, or no gain"
        gains = torch.stack([self._gains(memory, row) for memory, row in zip(call.memory, call.positions)])
        raised = [_GAINS in memory for memory in call.memory]
        row = boosted_row(call.q[:, :, -1:], call.k, call.v, gains, call.scale).to(output.dtype)
        corrected = output.clone()
        corrected[raised, :, -1:] = row[raised]
        call.counts["rows"] = sum(raised) * call.q.shape[1]
        call.edits.append(boosting(gains, call.q.shape[2]))
        return corrected

    def _remember(self, call: Any) -> None:
        """Leave with each sample which of its tokens are raised, by how much."""
        tokens: Tokens = call.tokens
        if self not in tokens.shared:
            tokens.shared[self] = self._picked(cast(EncoderScores, tokens.scores), cast(Tensor, tokens.image))
        new, has_gain = tokens.shared[self]
        for sample, memory in zip(call.samples, call.memory):
            if has_gain[sample]:
                before = memory.get(_GAINS, new.new_zeros(0))[: tokens.past]
                memory[_GAINS] = torch.cat([before, new.new_zeros(tokens.past - len(before)), new[sample]])

    def _picked(self, seen: EncoderScores, image: Tensor) -> tuple[Tensor, list[bool]]:
        config = self.config
        gains = torch.zeros(image.shape, device=image.device)
        first, penultimate = (seen.values[self, name] for name in ("first", "penultimate"))
        received = seen.values.get((self, "received"))
        for sample, pictures in enumerate((image.amax(1) + 1).tolist()):
            for picture in range(pictures):
                here = ((image[sample] == picture) & (seen.tile[sample] >= 0)).nonzero()[:, 0]
                local, summary = informed_tokens(
                    first[sample, here],
                    penultimate[sample, here],
                    config.local_ratio,
                    None if received is None else received[sample, here],
                    config.spatial_ratio,
                )
                gains[sample, here] = config.alpha * local + config.beta * summary
        return gains, (gains > 0).any(1).tolist()

    @staticmethod
    def _gains(memory: dict[Any, Any], positions: Tensor) -> Tensor:
        """Gains of the keys at `positions` [S]; tokens that came later have none."""
        gains = memory.get(_GAINS)
        if gains is None:
            return torch.zeros(len(positions), device=positions.device)
        known = positions < len(gains)
        return gains[positions.clamp(max=len(gains) - 1)] * known
