"""The vision encoder of a multimodal model: where its blocks are, and what their attention says about patches.

Found by structure, as the decoder is: outside the text model, one list of blocks, each with exactly one attention that
calls transformers' registry. `vision_scores.py` records what methods ask for and hands it to the decoder's call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from infer_patch.errors import UnsupportedModelError
from infer_patch.families import ModelParts

_CLS = ("class_embedding", "cls_token")  # parameters of towers that put a CLS token in front
_REGISTERS = "register_tokens"
_RESAMPLERS = ("qformer", "resampler")  # their outputs stand for no place in the picture
_SCORES_AT_ONCE, _ROWS_AT_ONCE = 2**24, 128  # attention scores that `received_attention` holds at a time, at most


@dataclass(frozen=True)
class VisionTower:
    """The vision encoder of one model.

    Parameters
    ----------
    owner : nn.Module
        The module with `get_image_features`.
    attentions : tuple of nn.Module
        One per block.
    leading : int
        Tokens in front of the patches: CLS and registers.
    has_cls : bool
        Whether the first of them is a CLS token.
    whole : tuple of int
        Blocks in which every patch sees the whole picture (some of Qwen2.5-VL see windows).
    modules : tuple of nn.Module
        The blocks themselves.
    """

    owner: Any
    attentions: tuple[nn.Module, ...]
    leading: int
    has_cls: bool
    whole: tuple[int, ...]
    modules: tuple[nn.Module, ...]

    @property
    def blocks(self) -> int:
        return len(self.attentions)

    def feature_block(self, feature_layer: int | Sequence[int] | None) -> int:
        """The last block (0-based) that the features pass through, -1 for the embeddings.

        `feature_layer` numbers hidden states, of which there is one more than blocks; of a list the deepest counts.
        """
        if feature_layer is None:
            return self.blocks - 1
        layers = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
        return max(layer - 1 if layer >= 0 else self.blocks + layer for layer in layers)

    def last_blocks(self, count: int, feature_block: int) -> tuple[int, ...]:
        """The last `count` blocks up to `feature_block` that see the whole picture; fewer where there are fewer."""
        return tuple(i for i in self.whole if i <= feature_block)[-count:]


@dataclass
class TowerCall:
    """Attention of one block of the vision encoder, before it runs.

    q and k [b, Hv, n, dh] hold the `leading` tokens (CLS, registers) first, then patches; `mask` is what the block got.
    """

    q: Tensor
    k: Tensor
    scale: float
    mask: Any
    leading: int
    has_cls: bool

    def hidden_keys(self) -> Tensor | None:
        """bool [b, n], True where no patch may look (padded pictures); None when there are none."""
        mask = self.mask
        if not isinstance(mask, Tensor):
            return None
        seen = mask if mask.dtype == torch.bool or mask.ndim == 2 else mask >= 0
        visible = seen.any(dim=(1, 2)) if mask.ndim == 4 else seen.bool()
        return None if bool(visible.all()) else ~visible.expand(self.q.shape[0], -1)


def cls_attention(call: TowerCall) -> Tensor:
    """How much the CLS token looks at each token, mean over heads: float32 [b, n], summing to 1 with CLS itself."""
    logits = (call.q[:, :, :1].float() @ call.k.float().transpose(-1, -2)) * call.scale
    hidden = call.hidden_keys()
    if hidden is not None:
        logits = logits.masked_fill(hidden[:, None, None], float("-inf"))
    return logits.softmax(-1).mean(1)[:, 0]


def received_attention(call: TowerCall, *, by_patches: bool = False) -> Tensor:
    """How much each token is looked at, mean over heads and over the tokens that look: float32 [b, n].

    The substitute where there is no CLS token. `by_patches`: CLS and registers do not look. A slice of queries at a
    time.
    """
    batch, heads, n, _ = call.q.shape
    keys, hidden = call.k.float().transpose(-1, -2), call.hidden_keys()
    looking = torch.ones(batch, n, device=call.q.device) if hidden is None else (~hidden).float()
    if by_patches:
        looking[:, : call.leading] = 0
    total = torch.zeros(batch, n, device=call.q.device)
    step = max(1, min(_ROWS_AT_ONCE, _SCORES_AT_ONCE // (batch * heads * n)))
    for start in range(0, n, step):
        rows = slice(start, start + step)
        logits = (call.q[:, :, rows].float() @ keys) * call.scale
        if hidden is not None:
            logits = logits.masked_fill(hidden[:, None, None], float("-inf"))
        total += (logits.softmax(-1).mean(1) * looking[:, rows, None]).sum(1)
    return total / looking.sum(1, keepdim=True)


def find_vision_tower(parts: ModelParts) -> VisionTower:
    """Find the vision encoder of a loaded model.

    Raises
    ------
    UnsupportedModelError
        When there is none whose blocks and attention can be told, or its output is resampled (Q-Former); the message
        names what was looked for.
    """
    kind = parts.model_type
    owners = [m for m in parts.path if hasattr(type(m), "get_image_features")]
    if not owners:
        raise UnsupportedModelError(f"{kind}: no module on the way to its text model has `get_image_features`.")
    owner, text = owners[-1], {id(m) for m in parts.text_model.modules()}
    seeing = [(name, m) for name, m in owner.named_modules() if id(m) not in text]
    for _, module in seeing:
        if any(word in type(module).__name__.lower() for word in _RESAMPLERS):
            raise UnsupportedModelError(
                f"{kind} resamples its pictures ({type(module).__name__}): its visual tokens stand for no place of the "
                "vision encoder, which could tell what they are worth."
            )
    found: list[tuple[str, tuple[nn.Module, ...], tuple[nn.Module, ...]]] = []
    for name, module in seeing:
        attentions = [_attentions(block) for block in module] if isinstance(module, nn.ModuleList) else []
        if attentions and all(len(a) == 1 for a in attentions):
            found.append((name, tuple(a[0] for a in attentions), tuple(module)))
    if len(found) != 1:
        places = ", ".join(name for name, _, _ in found) or "none"
        raise UnsupportedModelError(
            f"{kind}: looked for one list of vision blocks, each with one attention that calls transformers' registry; "
            f"found {places}."
        )
    name, attentions_found, modules = found[0]
    tower = owner.get_submodule(name.split(".")[0])
    parameters = {path.rsplit(".", 1)[-1]: value for path, value in tower.named_parameters()}
    has_cls = any(cls in parameters for cls in _CLS)
    registers = parameters[_REGISTERS].shape[-2] if _REGISTERS in parameters else 0
    whole = getattr(tower, "fullatt_block_indexes", None)
    blocks = range(len(attentions_found))
    return VisionTower(
        owner=owner,
        attentions=attentions_found,
        leading=int(has_cls) + registers,
        has_cls=has_cls,
        whole=tuple(blocks if whole is None else sorted(i % len(blocks) for i in whole)),
        modules=modules,
    )


def _attentions(block: nn.Module) -> list[nn.Module]:
    return [m for m in block.modules() if hasattr(m, "is_causal") and hasattr(m, "config")]
