"""Vertical-slash prefill (MInference, arXiv 2407.02490): a few key columns and a few diagonals of the attention map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infer_patch.kernels.block_mask import BlockMask
from infer_patch.method import Method, Runtime, option, register
from infer_patch.selection import plain_attention_layers

BLOCK = 64
LAST_QUERIES = 64


@register("vertical_slash")
@dataclass(frozen=True, kw_only=True)
class VerticalSlash(Method):
    """Prefill reads the key columns and the diagonals that the last 64 queries attend to most.

    In many heads of long-context models the attention map is a set of vertical lines (keys that every query reads) and
    slashes (keys at a fixed distance from the query). Both are estimated from the exact attention of the last 64
    queries: a column's score is the probability it gets from them, a diagonal's score the probability along it. Each
    block of 64 queries then reads every key block that holds a kept column or that a kept diagonal crosses.

    Prefill only: decoding runs dense. Meant for prompts whose end asks for what the rest should be read for.

    Parameters
    ----------
    columns : int
        Key columns kept per key head, the `first` ones included.
    diagonals : int
        Diagonals kept per key head, the `nearest` ones included.
    first, nearest : int
        Columns at the start of the prompt, and diagonals at distance 0, 1, ... from the query, that are always kept.
    per_query_head : bool
        Estimate and list for each query head on its own, as the paper does, instead of once for the query heads that
        share a key head (their probabilities summed). Keys are then read once per query head.
    dense_below : int
        Up to this many keys, layers run dense (exact, and faster there).

    References
    ----------
    Jiang et al., "MInference 1.0", arXiv 2407.02490. One pattern for all heads, the lists per key head and the
    rounding of columns to blocks are this project's.
    """

    columns: int = option(96, "key columns kept per key head, the first ones included")
    diagonals: int = option(128, "diagonals kept per key head, the nearest ones included")
    first: int = option(30, "columns at the start that are always kept")
    nearest: int = option(100, "diagonals next to the query that are always kept")
    per_query_head: bool = option(False, "one list per query head instead of one per key head")
    dense_below: int = option(2048, "run dense up to this many keys")

    ports = ("select",)
    paper = "arXiv 2407.02490"
    summary = "vertical columns and diagonals estimated from the last 64 queries (prefill)"

    def validate(self) -> None:
        self.require(self.first >= 0, f"first must be 0 or more columns, got {self.first}")
        self.require(self.nearest >= 1, f"nearest must be 1 or more diagonals, got {self.nearest}")
        self.require(
            self.columns >= self.first,
            f"columns include the first {self.first}, so there must be at least as many; got {self.columns}",
        )
        self.require(
            self.diagonals >= self.nearest,
            f"diagonals include the {self.nearest} nearest, so there must be at least as many; got {self.diagonals}",
        )
        self.require(self.dense_below >= 0, f"dense_below must be 0 or more tokens, got {self.dense_below}")

    def applicable_layers(self, parts: Any) -> tuple[int, ...]:
        return plain_attention_layers(self.name, parts)

    def runtime(self, parts: Any, layers: tuple[int, ...]) -> Runtime:
        return _VerticalSlash(self, parts, layers)


def column_and_diagonal_scores(q: Tensor, k: Tensor, scale: float, per_query_head: bool) -> tuple[Tensor, Tensor]:
    """What each key column and each diagonal gets from the last queries, in probability.

    q [B, H, R, D] (the last R queries), k [B, H_kv, S, D] -> two of [B, M, S] in fp32, M = H_kv or H: by key, and by
    distance d = query position - key position. Both sum to R (times the query heads of a key head).
    """
    kv_heads, rows, keys = k.shape[1], q.shape[2], k.shape[2]
    position = torch.arange(keys - rows, keys, device=q.device)[:, None]
    future = torch.arange(keys, device=q.device) > position
    columns, diagonals = [], []
    for own, key in zip(q.float().unflatten(1, (kv_heads, -1)).unbind(1), k.unbind(1)):  # a key head's [R, S] at a time
        scores = own @ key.float()[:, None].transpose(-1, -2) * scale
        p = scores.masked_fill_(future, float("-inf")).softmax(-1)
        p = p if per_query_head else p.sum(1, keepdim=True)
        columns.append(p.sum(-2))
        diagonals.append(_along_diagonals(p))
    return torch.cat(columns, 1), torch.cat(diagonals, 1)


def _along_diagonals(p: Tensor) -> Tensor:
    """Sums over the entries at equal distance: p [..., R, S] of the last R queries -> [..., S], distance 0 first."""
    rows, keys = p.shape[-2:]
    width = keys + rows - 1
    skewed = torch.nn.functional.pad(p, (rows - 1, 0)).contiguous()  # row r moves r places to the left when read skewed
    shape, strides = (*p.shape[:-2], rows, keys), (*skewed.stride()[:-2], width + 1, 1)
    return skewed.as_strided(shape, strides).sum(-2).flip(-1)


def keep_best(scores: Tensor, count: int, always: int) -> Tensor:
    """Numbers [..., min(count, S)] of the best entries of scores [..., S]; the first `always` are among them."""
    keys = scores.shape[-1]
    forced = torch.arange(keys, device=scores.device) < always
    return scores.masked_fill(forced, float("inf")).topk(min(count, keys), -1).indices


def list_blocks(
    columns: Tensor, diagonals: Tensor, queries: int, keys: int, width: int, block: int = BLOCK
) -> BlockMask:
    """Lists of the key blocks that hold a kept column or that a kept diagonal crosses.

    Parameters
    ----------
    columns, diagonals : int64 Tensor [B, M, v], [B, M, s]
        Key numbers, and distances between query and key (0 must be among them).
    width : int
        A number of blocks that no list exceeds, see `most_blocks`.
    """
    first, last = (keys - queries) // block, -(-keys // block)
    batch, lists = columns.shape[:2]
    held = torch.zeros(batch, lists, last, dtype=torch.bool, device=columns.device)
    held.scatter_(-1, columns // block, True)
    # distance d = block * a + r: rows of query block i reach key blocks i - a (those from row r on) and i - a - 1
    apart = torch.zeros(batch, lists, last + 1, dtype=torch.bool, device=columns.device)
    apart.scatter_(-1, diagonals // block, True)
    apart.scatter_(-1, -(-diagonals // block), True)
    row = torch.arange(first, last, device=columns.device)[:, None]
    column = torch.arange(last, device=columns.device)
    listed = (held[:, :, None] | apart[..., (row - column).clamp(min=0)]) & (column <= row)
    count = listed.sum(-1)
    idx = torch.where(listed, column, last).sort(-1).values[..., : min(width, last)]
    return BlockMask(idx, count, block, block)


def most_blocks(columns: int, diagonals: int, first: int, nearest: int, block: int = BLOCK) -> int:
    """A bound on every list that needs no look at the device: each free column lies in one block, each free diagonal
    crosses at most two, the first columns and the nearest diagonals stand side by side."""
    always = -(-first // block) + -(-(nearest - 1) // block) + 1
    return always + columns - first + 2 * (diagonals - nearest)


class _VerticalSlash(Runtime):
    config: VerticalSlash

    def select(self, layer: int, call: Any) -> BlockMask | str:
        config, queries, keys = self.config, call.q.shape[2], call.k.shape[2]
        if queries < LAST_QUERIES:
            return f"fewer than {LAST_QUERIES} new tokens: decoding is dense"
        if keys <= config.columns or keys <= config.diagonals:
            return "columns or diagonals cover every key"
        if keys <= config.dense_below:
            return f"at most {config.dense_below} keys"
        with torch.no_grad():
            by_key, by_distance = column_and_diagonal_scores(
                call.q[:, :, -LAST_QUERIES:], call.k, call.scale, config.per_query_head
            )
        return list_blocks(
            keep_best(by_key, config.columns, config.first),
            keep_best(by_distance, config.diagonals, config.nearest),
            queries,
            keys,
            most_blocks(config.columns, config.diagonals, config.first, config.nearest),
        )
