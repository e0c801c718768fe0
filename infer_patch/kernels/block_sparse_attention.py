"""Block-sparse causal attention over the lists of a `BlockMask`: prefill and decode.

out[t] = sum_j softmax_j(scale * q_t . k_j) v_j over the keys j <= position of t that lie in a listed block.

Faces: `reference` (fp32, masks a dense product), `cpu` (fast torch, any device), `triton` (GPU kernels).
`block_sparse_attention` picks one (see `dispatch`); its argument or INFER_PATCH_KERNELS overrides the choice.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from infer_patch.kernels.block_mask import BlockMask
from infer_patch.kernels.dispatch import choose

_ROWS_PER_CALL = 16  # query blocks a call: gathered keys and values stay inside the L2 cache
_DEBUG = os.environ.get("INFER_PATCH_DEBUG") == "1"


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Attention of q [B, H, T, D] to the listed blocks of k, v [B, H_kv, S, D]; returns [B, H, T, D].

    Parameters
    ----------
    mask : BlockMask
        Lists for ceil(S / block_q) - (S - T) // block_q query blocks.
    scale : float, optional
        Factor on q . k; default 1 / sqrt(D).
    implementation : {"reference", "cpu", "triton"}, optional
        Override of the automatic choice.

    Raises
    ------
    ValueError
        If `implementation` is unknown, or is "triton" and cannot run here.
    """
    name = choose(implementation, IMPLEMENTATIONS, q, k, v)
    if _DEBUG:
        mask.check(q.shape[2], k.shape[2])
    return IMPLEMENTATIONS[name](q, k, v, mask, scale if scale is not None else q.shape[-1] ** -0.5)


def reference(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """The formula, in fp32, with the whole T x S mask written out."""
    visible = token_mask(mask, q.shape[1], q.shape[2], k.shape[2])
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q.float() @ k.transpose(-1, -2) * scale).masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1) @ v).to(q.dtype)


def token_mask(mask: BlockMask, heads: int, queries: int, keys: int) -> Tensor:
    """The lists as a bool mask over tokens, [B, H, T, S] (causal triangle included)."""
    first, n_q = mask.diagonal(queries, keys)
    batch, lists, _, width = mask.idx.shape
    n_k = -(-keys // mask.block_k)
    used = torch.arange(width, device=mask.idx.device) < mask.count[..., None]
    blocks = torch.zeros(batch, lists, n_q, n_k + 1, dtype=torch.bool, device=mask.idx.device)
    blocks.scatter_(-1, torch.where(used, mask.idx.clamp(0, n_k), n_k), True)
    position = torch.arange(keys - queries, keys, device=mask.idx.device)
    key = torch.arange(keys, device=mask.idx.device)
    visible = blocks[:, :, position // mask.block_q - first][..., key // mask.block_k]
    visible = visible & (key <= position[:, None])
    return visible.repeat_interleave(heads // lists, dim=1)


def cpu(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Fast torch path: query blocks with equally long lists are stacked, their key blocks gathered, one SDPA a stack.

    The query heads of a key head are stacked as rows, so keys and values are gathered once per group. Working set:
    a few stacks of gathered blocks, whatever T is.
    """
    heads, lists = q.shape[1], mask.idx.shape[1]
    if lists not in (1, k.shape[1]):  # one list per query head: no sharing left to exploit
        group = heads // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if q.shape[2] <= mask.block_q // 4:
        return _few_queries(q, k, v, mask, scale)
    return _many_queries(q, k, v, mask, scale)


def _few_queries(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Decode, drafts and short chunks: one SDPA for each of the (at most two) query blocks."""
    batch, heads, queries, size = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    group, width, past = heads // kv_heads, mask.idx.shape[-1], keys - queries
    first, n_q = mask.diagonal(queries, keys)
    blocks = [_Blocks(x, mask.block_k) for x in (k, v)]
    within = torch.arange(mask.block_k, device=q.device)
    out = []
    for i in range(n_q):
        low, high = max((first + i) * mask.block_q, past), min((first + i + 1) * mask.block_q, keys)
        listed = torch.arange(width, device=q.device) < mask.count[:, :, i, None]
        idx = mask.idx[:, :, i].masked_fill(~listed, 0)
        key = (idx[..., None] * mask.block_k + within).flatten(2)
        visible = (key[:, :, None] <= torch.arange(low, high, device=q.device)[:, None]) & listed.repeat_interleave(
            mask.block_k, -1
        )[:, :, None]
        visible = visible.expand(batch, kv_heads, -1, -1).repeat(1, 1, group, 1).flatten(0, 1)[:, None]
        keys_read, values_read = (x.gather(idx.expand(batch, kv_heads, width).flatten(0, 1)) for x in blocks)
        rows = q[:, :, low - past : high - past].reshape(batch * kv_heads, 1, -1, size)
        part = F.scaled_dot_product_attention(rows, keys_read, values_read, attn_mask=visible, scale=scale)
        out.append(part.reshape(batch, heads, high - low, -1))
    return out[0] if len(out) == 1 else torch.cat(out, 2)


def _many_queries(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    batch, heads, queries, size = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    group, past, b = heads // kv_heads, keys - queries, mask.block_q
    first, n_q = mask.diagonal(queries, keys)
    lead = past - first * b
    padded = F.pad(q, (0, 0, lead, n_q * b - lead - queries))
    rows = padded.view(batch, kv_heads, group, n_q, b, size).transpose(2, 3).reshape(-1, 1, group * b, size)
    out = torch.empty(*rows.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
    width = mask.idx.shape[-1]
    idx = mask.idx.expand(batch, kv_heads, n_q, width).reshape(-1, width)
    count = mask.count.expand(batch, kv_heads, n_q).reshape(-1)
    head = torch.arange(batch * kv_heads, device=q.device).repeat_interleave(n_q)
    # blocks of the diagonal that exist: fewer only in a ragged last query block
    n_k, per = -(-keys // mask.block_k), b // mask.block_k
    block = torch.arange(first, first + n_q, device=q.device)
    diagonal = ((block + 1) * per).clamp(max=n_k) - block * per
    shape = count * (per + 1) + diagonal.repeat(batch * kv_heads)
    blocks = [_Blocks(x, mask.block_k) for x in (k, v)]
    for kind in shape.unique().tolist():
        listed, on_diagonal = divmod(kind, per + 1)
        bias = _causal_bias(group, b, mask.block_k, listed, on_diagonal, q)
        for stack in (shape == kind).nonzero().squeeze(1).split(_ROWS_PER_CALL):
            keys_read, values_read = (x.gather(idx[stack, :listed], head[stack]) for x in blocks)
            out[stack] = F.scaled_dot_product_attention(
                rows[stack], keys_read, values_read, attn_mask=bias, scale=scale
            )
    out = out.view(batch, kv_heads, n_q, group, b, -1).transpose(2, 3).reshape(batch, heads, n_q * b, -1)
    return out[:, :, lead : lead + queries]


def _causal_bias(group: int, block_q: int, block_k: int, listed: int, on_diagonal: int, like: Tensor) -> Tensor:
    """Additive mask [G * b_q, listed * b_k]: zero, but for the causal triangle in the last entries."""
    bias = like.new_zeros(block_q, listed * block_k)
    triangle = torch.ones(block_q, on_diagonal * block_k, dtype=torch.bool, device=like.device).triu(1)
    bias[:, (listed - on_diagonal) * block_k :].masked_fill_(triangle, float("-inf"))
    return bias.repeat(group, 1)


def triton(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """The GPU kernels: one tile for all heads and queries of a key head where these are few, else one a query block."""
    from infer_patch.kernels import block_sparse_decode_triton, block_sparse_prefill_triton

    size = max(q.shape[3], v.shape[3])
    if block_sparse_decode_triton.serves(q.shape[1], k.shape[1], mask.idx.shape[1], q.shape[2], size, q.dtype):
        return block_sparse_decode_triton.decode(q, k, v, mask, scale)[0]
    return block_sparse_prefill_triton.prefill(q, k, v, mask, scale)[0]


class _Blocks:
    """Keys or values [B, H, S, D] as a list of blocks that can start at any row, without a copy where possible."""

    def __init__(self, x: Tensor, block: int):
        batch, heads, keys, size = x.shape
        needed = -(-keys // block) * block
        own = x.stride(1) // size - x.storage_offset() % max(x.stride(1), 1) // size  # rows to the end of this head
        aligned = x.stride()[2:] == (size, 1) and x.stride(1) % size == 0 and x.stride(0) % size == 0
        if not aligned or own < needed or x.requires_grad:
            x = F.pad(x, (0, 0, 0, needed - keys)).contiguous()
        self.block = block
        self.base = (
            torch.arange(batch, device=x.device)[:, None] * (x.stride(0) // size)
            + torch.arange(heads, device=x.device) * (x.stride(1) // size)
        ).flatten()
        starts = int((batch - 1) * (x.stride(0) // size) + (heads - 1) * (x.stride(1) // size)) + needed - block + 1
        self.windows = x.as_strided((starts, block, size), (size, size, 1))

    def gather(self, idx: Tensor, head: Tensor | None = None) -> Tensor:
        """Blocks idx [R, W] of the heads [R] (numbered over batch and heads), stacked to [R, 1, W * block, D]."""
        base = self.base if head is None else self.base[head]
        rows = (base[:, None] + idx * self.block).flatten()
        return self.windows.index_select(0, rows).view(idx.shape[0], 1, -1, self.windows.shape[-1])


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, BlockMask, float], Tensor]] = {
    "reference": reference,
    "cpu": cpu,
    "triton": triton,
}
