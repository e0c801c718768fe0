"""Attention among some of the tokens of a prompt: gathered in order, they form an ordinary causal problem."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from infer_patch.kernels.block_mask import causal_blocks
from infer_patch.kernels.dense_attention import dense_attention

BLOCK = 64  # what reports count in
_QUERIES_PER_PASS = 1024


@dataclass(frozen=True)
class TokenSubset:
    """The tokens of a prompt that take part in one layer's attention.

    Parameters
    ----------
    keep : bool Tensor [B, n]
        Of every sample, at least the first token.
    others_attend : bool
        Do the rows of the other tokens read the kept keys before them? Otherwise they get zeros.
    counts : tuple of int
        Kept tokens of each sample.
    """

    keep: Tensor
    others_attend: bool
    counts: tuple[int, ...]

    def blocks_read(self, batch: int, kv_heads: int) -> int:
        """Causal key blocks of so many tokens, over samples and key heads (one count where rows of others read too)."""
        n = self.keep.shape[1]
        if self.others_attend:
            return sum(kv_heads * round(causal_blocks(n, n, BLOCK, BLOCK) * kept / n) for kept in self.counts)
        return sum(kv_heads * causal_blocks(kept, kept, BLOCK, BLOCK) for kept in self.counts)


def subset_attention(q: Tensor, k: Tensor, v: Tensor, subset: TokenSubset, scale: float) -> Tensor:
    """q [B, H, n, D], k and v [B, H_kv, n, D] -> [B, H, n, D], exact softmax over the kept keys before each row."""
    output = q.new_zeros(*q.shape[:3], v.shape[-1])
    for sample in range(q.shape[0]):
        kept = subset.keep[sample].nonzero()[:, 0]
        one = slice(sample, sample + 1)
        keys, values = k[one].index_select(2, kept), v[one].index_select(2, kept)
        output[one, :, kept] = dense_attention(q[one].index_select(2, kept), keys, values, scale)
        if not subset.others_attend:
            continue
        for rows in (~subset.keep[sample]).nonzero()[:, 0].split(_QUERIES_PER_PASS):
            visible = kept <= rows[:, None]
            some = q[one].index_select(2, rows)
            output[one, :, rows] = F.scaled_dot_product_attention(
                some, keys, values, attn_mask=visible, scale=scale, enable_gqa=True
            )
    return output


def reference(q: Tensor, k: Tensor, v: Tensor, subset: TokenSubset, scale: float) -> Tensor:
    """The same with the whole score matrix, in fp32."""
    n, group = q.shape[2], q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v))
    causal = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    visible = causal & subset.keep[:, None, None]
    output = (q.float() @ keys.mT * scale).masked_fill(~visible, float("-inf")).softmax(-1) @ values
    if not subset.others_attend:
        output = output.masked_fill(~subset.keep[:, None, :, None], 0.0)
    return output.to(q.dtype)
