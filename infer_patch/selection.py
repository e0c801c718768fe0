"""Which layers the attention kernels of this package can serve."""

from __future__ import annotations

from infer_patch.errors import UnsupportedModelError
from infer_patch.families import ModelParts


def plain_attention_layers(method: str, parts: ModelParts) -> tuple[int, ...]:
    """Layers that attend to everything before them with a plain softmax.

    Raises
    ------
    UnsupportedModelError
        When no layer does: every layer has a window of its own, or scores are soft-capped, or attention has learned
        sinks (the kernels of this package compute the plain softmax only).
    """
    if parts.attention_logits_capped:
        raise UnsupportedModelError(
            f"{method}: {parts.model_type} soft-caps its attention scores, which the kernels of the method do not do."
        )
    if parts.learned_sinks:
        raise UnsupportedModelError(
            f"{method}: {parts.model_type} has learned attention sinks, which the kernels of the method do not compute."
        )
    if not parts.full_attention_layers:
        windows = sorted({w for w in parts.windows if w is not None})
        raise UnsupportedModelError(
            f"{method}: every layer of {parts.model_type} already attends within a window of {windows} tokens; there "
            "is nothing left to gain."
        )
    return parts.full_attention_layers
