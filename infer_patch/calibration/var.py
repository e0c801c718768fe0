"""`infer-patch calibrate var`: the hidden dimensions in which the first token of a text is huge.

A few short texts are read; in layer after layer the values of the first token's residual stream are compared with its
root mean square. Sink tokens of pictures are large in the same dimensions, so text is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from infer_patch.artifacts import fingerprint
from infer_patch.attention import PORT
from infer_patch.availability import installed_version
from infer_patch.errors import PatchError
from infer_patch.families import describe
from infer_patch.progress import Progress

FIRST_LAYER = 3
TEXTS = (
    "The river ran past the mill and under the old bridge, where the children used to fish.",
    "Water boils at one hundred degrees at sea level, and at less on a mountain.",
    "def area(width, height):\n    return width * height\n",
    "Dear Anna, thank you for your letter. We arrived on Tuesday and it has rained since.",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55",
    "In the year of the great frost, three ships were built, and only one of them came home.",
)


@torch.no_grad()
def calibrate(
    model: Any,
    tokenizer: Any,
    tau: float = 20.0,
    texts: Sequence[str] = TEXTS,
    model_id: str = "",
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Find the sink dimensions of a model.

    Returns
    -------
    dict
        The contents of a `dims_file`: `dims`, those in which |x_d| / rms(x) of the first token is above tau in more
        than half of the layers 3 to L - 2, over all texts; and `largest`, the eight largest dimensions with
        their median over layers and texts, their maximum, and the share of layers above tau.

    Raises
    ------
    PatchError
        Where a model has fewer than five layers, or no dimension is that large: the method then never fires.
    """
    parts = describe(model)
    if any(PORT in vars(attention) for attention in parts.attentions):
        raise PatchError("this model is patched; call infer_patch.unpatch(model) before it is calibrated.")
    layers = range(FIRST_LAYER, parts.num_layers - 1)
    if not layers:
        raise PatchError(
            f"layers {FIRST_LAYER} to L - 2 are looked at, and this {parts.model_type} has {parts.num_layers} layers."
        )
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    found = []
    for number, text in enumerate(texts):
        if on_progress is not None:
            on_progress(number, len(texts), f"reading text {number + 1} of {len(texts)}")
        ids = tokenizer(text).input_ids
        if tokenizer.bos_token_id is not None and ids[0] != tokenizer.bos_token_id:
            ids = [tokenizer.bos_token_id, *ids]
        call = {"input_ids": torch.tensor([ids], device=model.device), "use_cache": False}
        states = model(**call, output_hidden_states=True).hidden_states
        found.append(torch.stack([relative_size(states[layer][0, 0]).cpu() for layer in layers]))
    sizes = torch.cat(found)
    above = (sizes > tau).float().mean(0)
    dims = (above > 0.5).nonzero().squeeze(1).tolist()
    median = sizes.median(0).values
    largest = [
        {"dim": d, "median": _rounded(median[d]), "max": _rounded(sizes[:, d].max()), "share_above": _rounded(above[d])}
        for d in median.argsort(descending=True)[:8].tolist()
    ]
    if not dims:
        raise PatchError(
            f"no hidden dimension of the first token is above tau {tau:g} in most layers; the largest is "
            f"{largest[0]['dim']}, with a median of {largest[0]['median']}. The most there can be is "
            f"{sizes.shape[1] ** 0.5:.1f}. This model has no such sinks, or needs a smaller tau (in the plan, too)."
        )
    return {
        "dims": dims,
        "tau": tau,
        "largest": largest,
        "layers": [layers[0], layers[-1]],
        "texts": len(texts),
        "model": {"id": model_id, **{k: v for k, v in fingerprint(model).items() if k != "weights"}},
        "made_with": {name: installed_version(name) for name in ("infer_patch", "torch", "transformers")},
    }


def relative_size(x: Tensor) -> Tensor:
    """|x_d| / rms(x) of states [..., D], fp32."""
    x = x.float()
    return x.abs() * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def _rounded(value: Tensor) -> float:
    return round(float(value), 3)
