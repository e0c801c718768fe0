"""Exact attention mass of key blocks, and the block lists of an oracle and of chance.

Notation as in `kernels.block_mask`. Everything is computed one query block at a time: the T x S map of all heads never
exists.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from infer_patch.kernels.block_mask import BlockMask


def block_mass(q: Tensor, k: Tensor, start: int, stop: int, block: int, scale: float) -> Tensor:
    """Softmax mass of each key block for the queries at positions [start, stop).

    q [B, H, T, D], k [B, H_kv, S, D], the last T keys belong to the queries -> fp32 [B, H, stop - start, n_k]; rows
    sum to 1.
    """
    kv_heads, keys, past = k.shape[1], k.shape[2], k.shape[2] - q.shape[2]
    rows = q[:, :, start - past : stop - past].float().unflatten(1, (kv_heads, -1))
    scores = rows @ k.float()[:, :, None].transpose(-1, -2) * scale
    future = torch.arange(keys, device=q.device) > torch.arange(start, stop, device=q.device)[:, None]
    p = scores.masked_fill_(future, float("-inf")).softmax(-1).flatten(1, 2)
    return torch.nn.functional.pad(p, (0, -keys % block)).unflatten(-1, (-1, block)).sum(-1)


def listed_mass(mass: Tensor, lists: Tensor, count: Tensor) -> Tensor:
    """Mass in the listed blocks: mass [B, H, R, n_k], lists [B, M, W] and count [B, M] of one query block -> [B, H, R].

    M is 1, the number of key heads, or H.
    """
    heads = mass.shape[1]
    used = torch.arange(lists.shape[-1], device=lists.device) < count[..., None]
    inside = torch.zeros(*lists.shape[:2], mass.shape[-1], dtype=mass.dtype, device=mass.device)
    inside.scatter_add_(-1, lists.clamp(0, mass.shape[-1] - 1), used.to(mass.dtype))
    inside = inside.clamp(max=1).repeat_interleave(heads // lists.shape[1], dim=1)
    return (mass * inside[:, :, None]).sum(-1)


def lists_of(mask: BlockMask, position: int, queries: int, keys: int) -> tuple[Tensor, Tensor]:
    """List [B, M, W] and count [B, M] of the query block that holds `position`."""
    row = position // mask.block_q - mask.diagonal(queries, keys)[0]
    return mask.idx[:, :, row], mask.count[:, :, row]


def oracle_lists(mass: Tensor, kv_heads: int, width: int, always: Sequence[int]) -> Tensor:
    """The `width` blocks that hold most mass of a whole query block, one list per key head: int64 [B, H_kv, width].

    mass [B, H, R, n] of the query block's rows in the n blocks they see; `always` are blocks listed in any case.
    """
    score = mass.unflatten(1, (kv_heads, -1)).sum((2, 3))
    score[..., list(always)] = float("inf")
    return score.topk(min(width, score.shape[-1]), -1).indices


def random_lists(
    batch: int, kv_heads: int, visible: int, width: int, always: Sequence[int], generator: torch.Generator
) -> Tensor:
    """`width` of the blocks 0 .. visible - 1 drawn for each key head, `always` among them: int64 [B, H_kv, width]."""
    score = torch.rand(batch, kv_heads, visible, generator=generator)
    score[..., list(always)] = float("inf")
    return score.topk(min(width, visible), -1).indices
