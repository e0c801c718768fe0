"""Scores of chosen small pieces of the keys, for searches that look at a few of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class KeyPieces:
    """Keys in pieces of `block` tokens, to be scored by number.

    Parameters
    ----------
    k : Tensor [B, H_kv, S, D]
        Read in place (a view of a larger buffer will do).
    lists : int
        L, a multiple of H_kv: who asks, each of them its own key head.
    block, stride : int
        Tokens in a piece; every stride-th of them is scored.
    """

    def __init__(self, k: Tensor, lists: int, block: int, stride: int):
        size, samples, heads = k.shape[3], k.shape[0], k.shape[1]
        jumps = [step for step, n in zip(k.stride(), (samples, heads)) if n > 1]
        if k.stride()[2:] != (size, 1) or any(step % size for step in jumps):
            k = k.contiguous()
        self.lists, self._size, self._block, self._last = lists, size, block, k.shape[2] // block - 1
        self.per = len(range(0, block, stride))
        self._within = torch.arange(0, block, stride, device=k.device) if stride > 1 else None
        window = 1 if stride > 1 else block
        # rows of storage from the first key to the last, and windows that start at each of them
        rows = ((samples - 1) * k.stride(0) + (heads - 1) * k.stride(1)) // size + k.shape[2]
        self._windows = k.as_strided((max(rows - window + 1, 0), window * size), (size, 1))
        sample = torch.arange(samples, device=k.device)[:, None] * (k.stride(0) // size)
        head = torch.arange(lists, device=k.device) // (lists // heads) * (k.stride(1) // size)
        self._base = (sample + head)[:, :, None, None]
        self._buffers: dict[str, Tensor] = {}

    def best(self, rows: Tensor, at: Tensor) -> Tensor:
        """Largest q . k of each piece: rows [B, L, n, R, D] fp32, pieces at [B, L, n, C] -> [B, L, n, C] fp32."""
        products = rows.shape[:3].numel()
        start = self._base + at.clamp(max=self._last) * self._block
        if self._within is not None:
            start = start[..., None] + self._within
        found = self._take(start.flatten()).view(products, -1, self._size)
        # one buffer for all products: fresh ones cost page faults
        scores = self._buffer("scores", products, found.shape[1], rows.shape[3])
        torch.bmm(found, rows.flatten(0, 2).transpose(1, 2), out=scores)
        best = scores.amax(-1).view(*at.shape, self.per)
        return best.amax(-1) if self.per > 1 else best.squeeze(-1)

    def _take(self, start: Tensor) -> Tensor:
        if self._windows.dtype != torch.float32:
            return self._windows.index_select(0, start).float()
        out = self._buffer("keys", start.numel(), self._windows.shape[1])
        return torch.index_select(self._windows, 0, start, out=out)

    def _buffer(self, name: str, *shape: int) -> Tensor:
        size, held = math.prod(shape), self._buffers.get(name)
        if held is None or held.numel() < size:
            held = self._buffers[name] = torch.empty(size, device=self._base.device)
        return held[:size].view(shape)
