"""DAMRO: contrast with a second stream that sees the vision encoder's outlier patches only (arXiv 2410.04514).

    processor = Damro(model, inputs)                       # encodes the pictures once
    model.generate(**inputs, logits_processor=[processor])

Not a patch: it changes what is sampled, not how the model runs, and works on patched and unpatched models.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from infer_patch.attention import PORT
from infer_patch.errors import PatchError, UnsupportedCallError, UnsupportedModelError
from infer_patch.families import describe
from infer_patch.installation import Installation
from infer_patch.method import Runtime
from infer_patch.second_stream import SecondStream
from infer_patch.vision_layout import NEWLINE
from infer_patch.vision_scores import Encoded, Recorder
from infer_patch.vision_tower import TowerCall, VisionTower, cls_attention, find_vision_tower


class Damro(SecondStream):
    """Contrastive decoding against the patches that the vision encoder and the decoder both over-use.

    A second stream of the same model gets the prompt with `k` visual tokens per picture: those that the CLS token looks
    at most, in the block that the features come from. Its logits l' are subtracted: (1 + alpha) l - alpha l' where
    P(token) is at least beta times the largest, else -inf. The stream has a cache of its own, which follows beams. One
    more forward per token.

    Parameters
    ----------
    model : PreTrainedModel
        With a vision encoder that has a CLS token, in one piece on one device.
    inputs : mapping
        What `generate` gets: `input_ids`, the pictures, `attention_mask`.
    alpha : float
        Weight of the second stream, 0 or more. The authors: 2 (LLaVA).
    k : int
        Visual tokens of the second stream per picture.
    beta : float
        Tokens less likely than beta times the likeliest are cut off, in [0, 1].
    cls_attention : {"joint", "mean_heads"}
        One softmax over unsplit heads, as the authors' code for LLaVA, or the mean of the heads' attention.

    Raises
    ------
    UnsupportedModelError
        When the encoder has no CLS token, or is not understood.
    UnsupportedCallError
        When inputs hold no `input_ids` or no pictures, or the processor is used with another prompt.

    References
    ----------
    Gong et al., "DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination", EMNLP 2024,
    arXiv 2410.04514.
    """

    name = "damro"

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        *,
        alpha: float = 2.0,
        k: int = 10,
        beta: float = 0.1,
        cls_attention: str = "joint",
    ):
        if not (math.isfinite(alpha) and alpha >= 0):
            raise PatchError(f"damro: alpha must be 0 or more, got {alpha}")
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise PatchError(f"damro: k must be 1 or more visual tokens, got {k!r}")
        if not 0 <= beta <= 1:
            raise PatchError(f"damro: beta must be between 0 and 1, got {beta}")
        if cls_attention not in ("joint", "mean_heads"):
            raise PatchError(f"damro: cls_attention must be joint or mean_heads, got {cls_attention!r}")
        super().__init__(model, inputs)
        self.alpha, self.beta = alpha, beta
        with torch.no_grad():
            features, encoded = encode_pictures(model, inputs, cls_attention == "joint")
            self._second = [{"inputs_embeds": x} for x in self._embed(self._prompt, self._real, features, encoded, k)]

    def _embed(self, ids: Tensor, real: Tensor, features: list[Tensor], encoded: list[Encoded], k: int) -> list[Tensor]:
        """Embeddings [n, d] of every sample with the outlier patches in place of its pictures."""
        tokens = describe(self.model).image_token_ids
        is_visual = torch.isin(ids, torch.tensor(tokens, device=ids.device))
        if int(is_visual.sum()) != sum(map(len, features)):
            raise UnsupportedCallError(
                f"damro: the prompts hold {int(is_visual.sum())} visual tokens, their pictures make "
                f"{sum(map(len, features))}. Videos are not served."
            )
        left, samples = iter(zip(features, encoded)), []
        embedding = self.model.get_input_embeddings()
        for row, visual, valid in zip(ids, is_visual, real):
            parts, at = [], int(valid.int().argmax())
            stop = len(row) - int(valid.flip(0).int().argmax())
            while at < stop:
                if bool(visual[at]):
                    picture, scores = next(left)
                    parts.append(picture[outlier_tokens(scores, k)])
                    at += len(picture)
                else:
                    end = at + int(torch.cat([visual[at:stop], visual.new_ones(1)]).int().argmax())
                    parts.append(embedding(row[at:end]))
                    at = end
            samples.append(torch.cat(parts).to(embedding.weight.dtype))
        return samples

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [rows, vocabulary], logits or log-probabilities, corrected: the same shape, fp32."""
        return contrast(scores.float(), self.second_log_probabilities(input_ids), self.alpha, self.beta)


def contrast(positive: Tensor, negative: Tensor, alpha: float, beta: float) -> Tensor:
    """(1 + alpha) l - alpha l' where l >= log(beta) + max l, else -inf: l, l' [rows, vocabulary]."""
    cut = positive.amax(-1, keepdim=True) + (math.log(beta) if beta > 0 else -math.inf)
    return ((1 + alpha) * positive - alpha * negative).masked_fill(positive < cut, -math.inf)


def joint_attention(call: TowerCall) -> Tensor:
    """CLS attention with unsplit heads, softmax(q_cls k / sqrt(Hv dh)) over all tokens: float32 [b, n]."""
    q, k = (x.float().transpose(1, 2).flatten(2) for x in (call.q, call.k))
    return (q[:, :1] @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)[:, 0]


def outlier_tokens(scores: Encoded, k: int) -> Tensor:
    """The k best-scored tokens of a picture's whole view, best first, and one newline token if it has any: int64."""
    (values,) = scores.values.values()
    order = values.masked_fill(scores.tile != 0, -math.inf).sort(descending=True, stable=True).indices
    chosen = order[: min(k, int((scores.tile == 0).sum()))]
    newline = (scores.tile == NEWLINE).nonzero()[:1, 0]
    return torch.cat([chosen, newline])


class _Look(Runtime):
    """Sees CLS attention in the block that the features come from."""

    def __init__(self, tower: VisionTower, joint: bool):
        self.tower, self.joint = tower, joint

    def encoder_blocks(self, feature_block: int) -> Collection[int]:
        return {feature_block}

    def encode(self, block: int, call: TowerCall) -> dict[str, Tensor]:
        return {"score": joint_attention(call) if self.joint else cls_attention(call)}


def encode_pictures(model: Any, inputs: Mapping[str, Any], joint: bool) -> tuple[list[Tensor], list[Encoded]]:
    """Features of every picture, and CLS attention at each of its tokens, in the order of the prompts."""
    parts = describe(model)
    if not parts.image_token_ids:
        raise UnsupportedModelError(f"damro contrasts pictures, and {parts.model_type} has no visual tokens.")
    tower = find_vision_tower(parts)
    if not tower.has_cls:
        raise UnsupportedModelError(
            f"damro picks patches by the CLS token of the vision encoder, and that of {parts.model_type} has none. It "
            "serves CLIP and InternViT encoders: LLaVA, LLaVA-NeXT, InternVL."
        )
    if any(PORT in vars(module) for module in tower.attentions):
        raise PatchError("damro: a patch on this model looks into the vision encoder; make the processor before it.")
    wanted = inspect.signature(tower.owner.get_image_features).parameters
    given = {name: value for name, value in inputs.items() if name in wanted}
    if given.get("pixel_values") is None:
        raise UnsupportedCallError("damro contrasts pictures, and the inputs hold no `pixel_values`.")
    recorder, installation = Recorder(tower, [_Look(tower, joint)], model.config), Installation(parts)
    try:
        recorder.install(installation)
        output = tower.owner.get_image_features(**given, return_dict=True)
        encoded = recorder.encoded("image")
    finally:
        installation.remove()
    if encoded is None:
        raise UnsupportedModelError(f"damro: how {parts.model_type} lays out its visual tokens is not known.")
    features = [x.flatten(0, -2) for x in output.pooler_output]
    bounds = [0, *torch.tensor([len(x) for x in features]).cumsum(0).tolist()]
    split = [
        Encoded(encoded.tile[a:b], {key: x[a:b] for key, x in encoded.values.items()})
        for a, b in itertools.pairwise(bounds)
    ]
    return features, split
