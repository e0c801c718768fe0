"""Where a model keeps its parts: found by structure, so that a new family needs no code here.

What is looked for: a module list of decoder layers, each with exactly one self-attention that knows its
`layer_idx` and calls attention through transformers' registry. Whatever has that can be patched; whatever has not is
refused before anything is touched, with the piece that was missing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from infer_patch.errors import UnsupportedModelError

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class ModelParts:
    """The parts of one loaded model.

    `path` runs from the model that was passed in down to the text model, both included. `windows[i]` is layer i's own
    attention window in tokens, or None where it attends to everything before it.
    """

    path: tuple[Any, ...]
    layers: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    text_config: Any
    windows: tuple[int | None, ...]
    image_token_ids: tuple[int, ...] = ()
    model_type: str = field(default="")

    @property
    def root(self) -> Any:
        return self.path[0]

    @property
    def text_model(self) -> Any:
        return self.path[-1]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        return int(self.text_config.num_attention_heads)

    @property
    def num_kv_heads(self) -> int:
        """By the modules: configurations may carry a `num_key_value_heads` that their model ignores (GPT-NeoX)."""
        return self.num_heads // int(getattr(self.attentions[0], "num_key_value_groups", 1))

    @property
    def head_dim(self) -> int:
        return int(getattr(self.text_config, "head_dim", None) or self.text_config.hidden_size // self.num_heads)

    @property
    def full_attention_layers(self) -> tuple[int, ...]:
        """Layers without an attention window of their own."""
        return tuple(i for i, window in enumerate(self.windows) if window is None)

    @property
    def attention_logits_capped(self) -> bool:
        """Whether attention scores go through a soft cap (Gemma 2)."""
        return getattr(self.text_config, "attn_logit_softcapping", None) is not None

    @property
    def learned_sinks(self) -> bool:
        """Whether attention has a learned extra softmax term (gpt-oss)."""
        return any(isinstance(getattr(a, "sinks", None), torch.Tensor) for a in self.attentions)


def describe(model: nn.Module) -> ModelParts:
    """Find the parts of a loaded transformers model.

    Raises
    ------
    UnsupportedModelError
        When a part is missing or of a kind that cannot be patched; the message names what was looked for.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"expected a transformers model (a PreTrainedModel), got {type(model).__name__}. Load it with "
            "from_pretrained; unwrap DataParallel, PEFT or compiled wrappers first and patch what is inside."
        )
    config = model.config
    kind = str(getattr(config, "model_type", "") or type(model).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind} is an encoder-decoder; only decoder-only models can be patched.")

    text_config = config.get_text_config(decoder=True)
    kinds = set(getattr(text_config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if kinds:
        raise UnsupportedModelError(f"{kind} has layers of kind {sorted(kinds)}; all must be softmax attention.")
    if getattr(text_config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(f"{kind} shares keys and values between layers, which is not supported.")
    if getattr(text_config, "kv_lora_rank", None):
        raise UnsupportedModelError(f"{kind} uses multi-head latent attention, which is not supported.")

    name, layers, attentions = _find_decoder(model, text_config, kind)
    path = [model]
    for part in name.split(".") if name else []:
        path.append(getattr(path[-1], part))
    text_model = path[-1]
    if not getattr(type(text_model), "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"{kind}: {type(text_model).__name__} does not call attention through transformers' registry "
            "(its class does not set _supports_attention_backend), so it cannot be patched without copying its code."
        )
    stock = DynamicCache(config=config).layers
    if len(stock) not in (0, len(layers)):
        raise UnsupportedModelError(f"{kind}: {len(layers)} decoder layers but a cache of {len(stock)} layers.")
    windows = tuple(int(getattr(s, "sliding_window")) if getattr(s, "is_sliding", False) else None for s in stock)
    return ModelParts(
        path=tuple(path),
        layers=tuple(layers),
        attentions=tuple(attentions),
        text_config=text_config,
        windows=windows or (None,) * len(layers),
        image_token_ids=_image_token_ids(config),
        model_type=kind,
    )


def _find_decoder(model: PreTrainedModel, text_config: Any, kind: str) -> tuple[str, list[nn.Module], list[nn.Module]]:
    """Name of the module that owns the decoder layers, the layers, and the self-attention of each."""
    found = []
    for name, module in model.named_modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == text_config.num_hidden_layers:
                attentions = [_self_attentions(layer) for layer in child]
                if all(len(a) == 1 for a in attentions):
                    found.append((name, list(child), [a[0] for a in attentions]))
    if len(found) == 1:
        return found[0]
    looked_for = (
        f"a list of {text_config.num_hidden_layers} decoder layers, each with one self-attention that has a layer_idx"
    )
    if not found:
        raise UnsupportedModelError(f"{kind}: looked for {looked_for}; found none in {type(model).__name__}.")
    places = ", ".join(name or "the model itself" for name, _, _ in found)
    raise UnsupportedModelError(f"{kind}: looked for {looked_for}; found several, in {places}.")


def _self_attentions(layer: nn.Module) -> list[nn.Module]:
    return [m for m in layer.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]


def _image_token_ids(config: Any) -> tuple[int, ...]:
    """Placeholder ids that stand for visual tokens; empty for text-only models."""
    if getattr(config, "vision_config", None) is None:
        return ()
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    ids = [getattr(config, name, None) for name in names]
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))
