"""Attention sinks of one prompt: the tokens that a head's queries attend to far above their share."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infer_patch.api import patch
from infer_patch.errors import PatchError, UnsupportedCallError, UnsupportedModelError
from infer_patch.families import describe
from infer_patch.kernels.received_attention import received_attention
from infer_patch.method import Method, Runtime

MIN_QUERIES = 16  # a token seen by fewer is no sink: the last ones see little but themselves


@dataclass(frozen=True)
class Sinks:
    """What every head attends to in one prompt.

    Parameters
    ----------
    received : float32 Tensor [L, H, T]
        Mean attention of each token, over the queries that see it.
    seen_by : int64 Tensor [L, T]
        How many queries see it.
    input_ids : int64 Tensor [T]
    image : int64 Tensor [T]
        Number of the picture that a token belongs to, -1 for text.
    threshold : float
    """

    received: Tensor
    seen_by: Tensor
    input_ids: Tensor
    image: Tensor
    threshold: float

    @property
    def is_sink(self) -> Tensor:
        """bool [L, H, T]: received attention above the threshold, from at least `MIN_QUERIES` queries."""
        return (self.received > self.threshold) & (self.seen_by >= MIN_QUERIES)[:, None]

    def heads_per_token(self) -> Tensor:
        """For each token, in how many heads it is a sink: int64 [T]."""
        return self.is_sink.sum((0, 1))

    def mean_received(self, layer: int | None = None, head: int | None = None) -> Tensor:
        """Mean over the heads and layers, or of those named: float32 [T]. Tokens few queries see count as 0."""
        kept = self.received * (self.seen_by >= MIN_QUERIES)[:, None]
        kept = kept if layer is None else kept[layer : layer + 1]
        return (kept if head is None else kept[:, head : head + 1]).mean((0, 1))

    def to_list(self) -> list[list[float]]:
        """Every sink as [layer, head, token, received attention]."""
        return [[*place, round(float(self.received[tuple(place)]), 5)] for place in self.is_sink.nonzero().tolist()]


@torch.no_grad()
def find_sinks(model: Any, inputs: Mapping[str, Any], threshold: float = 0.1) -> Sinks:
    """Read one prompt and measure what every head attends to.

    Parameters
    ----------
    model : PreTrainedModel
        Not patched.
    inputs : mapping
        What the model's forward takes for one sample, pictures included.
    threshold : float
        A share of all attention, above 0 and below 1; ACT takes 0.1.

    Raises
    ------
    PatchError
        A threshold that is no share, more than one sample, padding, a prompt too short to tell, a model whose attention
        is not a plain softmax or looks forward.
    """
    if not 0 < threshold < 1:
        raise PatchError(f"the threshold is a share of the attention, above 0 and below 1; got {threshold}.")
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if ids.shape[0] != 1 or (mask is not None and not bool(mask.bool().all())):
        raise PatchError(
            f"sinks are looked for in one prompt without padding, got input_ids of shape {list(ids.shape)}."
        )
    if ids.shape[1] <= MIN_QUERIES:
        raise PatchError(f"the prompt has {ids.shape[1]} tokens; more than {MIN_QUERIES} are needed to tell a sink.")
    parts = describe(model)
    if parts.attention_logits_capped or parts.learned_sinks:
        what = "soft-caps its attention scores" if parts.attention_logits_capped else "has learned attention sinks"
        raise UnsupportedModelError(f"{parts.model_type} {what}; sinks are found in plain softmax attention only.")
    found = _Found({}, {}, [])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*never took effect", UserWarning)  # it only looks
        with patch(model, _Measuring(found=found)):
            model(**inputs, use_cache=False)
    layers = range(parts.num_layers)
    image = found.image[0] if found.image else torch.full_like(ids[0], -1)
    return Sinks(
        torch.stack([found.received[i].cpu() for i in layers]),
        torch.stack([found.seen_by[i].cpu() for i in layers]),
        ids[0].cpu(),
        image.cpu(),
        threshold,
    )


@dataclass
class _Found:
    received: dict[int, Tensor]
    seen_by: dict[int, Tensor]
    image: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class _Measuring(Method):
    """Measures and changes nothing. In no registry: it exists for one call."""

    found: _Found

    name = "sinks"
    ports = ("calibrate",)

    def runtime(self, parts: Any, layers: tuple[int, ...]) -> Runtime:
        return _Meter(self, parts, layers)


class _Meter(Runtime):
    config: _Measuring
    any_mask = True
    reads_images = True

    def calibrate(self, layer: int, call: Any, output: Tensor) -> Tensor:
        if not call.ordered and call.tokens.length > 1:
            raise UnsupportedCallError(
                f"{self.parts.model_type} lets some tokens of this prompt look forward; sinks are found where "
                "attention is causal."
            )
        means, seen_by = received_attention(call.q, call.k, call.scale, self.parts.windows[layer])
        found = self.config.found
        found.received[layer], found.seen_by[layer] = means[0], seen_by
        if call.tokens.image is not None and not found.image:
            found.image.append(call.tokens.image[0])
        return output
