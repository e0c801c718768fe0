"""Dense causal attention in the layout of the other kernels (used where a list would hold every block)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [B, H, T, D], k and v [B, H_kv, S, D] with the queries last among the keys -> [B, H, T, D]."""
    queries, keys = q.shape[2], k.shape[2]
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, scale=scale, enable_gqa=True)
    mask = None
    if queries > 1:
        mask = torch.arange(keys, device=q.device) <= torch.arange(keys - queries, keys, device=q.device)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
