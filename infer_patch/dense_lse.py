"""The model's own attention together with the log-sum-exp of its rows, which it works out and throws away.

With it any probability is exp(z_ij - LSE_i), and a method needs no pass of its own over all keys to find it. Where a
model runs SDPA on a CPU, PyTorch's kernel gives both; called directly, it gives the same output, bit for bit.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH = 1  # what PyTorch calls that kernel among those that SDPA chooses from
_TENSORS = {"module", "query", "key", "value", "attention_mask"}
_OPTIONS = {"dropout", "scaling", "is_causal", "position_bias", "cache", "kwargs"}
_NOT_SERVED = ("dropout", "position_bias", "cache", "softcap", "output_attentions")


def dense_with_lse(
    dense: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """What `dense` would return for q [B, H, T, D], k and v [B, H_kv, S, D]: [B, T, H, D], and the LSE, fp32 [B, H, T].

    None where that cannot be had: served is SDPA of transformers on CPUs, for whole prompts and single rows, without a
    mask written out, dropout and gradients.
    """
    if mask is not None or q.device.type != "cpu" or dense is not ALL_ATTENTION_FUNCTIONS["sdpa"] or not _known(dense):
        return None
    rows = q.shape[2]
    if (rows > 1 and rows != k.shape[2]) or k.shape[3] != v.shape[3] or any(kwargs.get(x) for x in _NOT_SERVED):
        return None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return None
    causal = kwargs.get("is_causal")
    causal = rows > 1 and bool(getattr(module, "is_causal", True) if causal is None else causal)
    scale, grouped = kwargs.get("scaling"), q.shape[1] != k.shape[1]
    if torch._fused_sdp_choice(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped) != _FLASH:
        return None
    output, lse = _KERNEL(q, k, v, 0.0, causal, scale=scale)
    return output.transpose(1, 2).contiguous(), lse


@cache
def _known(dense: Any) -> bool:
    """Whether the function takes nothing but what is looked at here (a later transformers may add options)."""
    return inspect.signature(dense).parameters.keys() <= _TENSORS | _OPTIONS
