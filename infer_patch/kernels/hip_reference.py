"""The searches of `kernels/hip.py` as plain loops in fp32: one list and one query block at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from infer_patch.kernels.hip import BLOCK_Q, Spans, Stage

Pieces = list[list[list[list[int]]]]  # [B][L][n_q] -> first keys of the kept pieces, ascending


def tree(
    q: Tensor,
    k: Tensor,
    spans: Spans,
    *,
    budget: int = 512,
    tree_block: int = 2,
    representative: str = "center",
    stride: int = 2,
    key_stride: int = 1,
    lists: int | None = None,
) -> Pieces:
    """What `hip_tree` keeps."""

    def search(rows: Tensor, keys: Tensor, end: int) -> list[int]:
        rows, slots = rows[:, ::stride].flatten(0, 1), budget // tree_block
        blocks = -(-(end - spans.start) // tree_block)

        def score(first: int, size: int) -> float:
            if size == 0:
                return -math.inf
            block = first + size // 2 if representative == "center" else first
            at = spans.start + block * tree_block
            return float((rows @ keys[at : at + tree_block : key_stride].T).max())

        if blocks <= slots:
            return [spans.start + block * tree_block for block in range(blocks)]
        edges = [blocks * j // slots for j in range(slots + 1)]
        branches = [(edges[j], edges[j + 1] - edges[j]) for j in range(slots)]
        size = blocks / slots
        while size > 1:
            children = [child for first, n in branches for child in ((first, n // 2), (first + n // 2, n - n // 2))]
            branches = sorted(children, key=lambda child: -score(*child))[:slots]
            size /= 2
        return sorted(spans.start + first * tree_block for first, _ in branches)

    return _each_list(q, k, spans, search, lists)


def stages(q: Tensor, k: Tensor, spans: Spans, stages: Sequence[Stage], *, lists: int | None = None) -> Pieces:
    """What the last stage of `hip_stages` keeps."""

    def search(rows: Tensor, keys: Tensor, end: int) -> list[int]:
        def token_score(head: int, at: int, stride: int) -> float:
            return float((rows[head, ::stride] @ keys[at]).max())

        def chunk_score(head: int, at: int, size: int, stride: int) -> float:
            while size > 1:
                half = size // 2
                left = token_score(head, at + half // 2, stride)
                right = token_score(head, at + half + (size - half) // 2, stride)
                at, size = (at, half) if left > right else (at + half, size - half)
            return token_score(head, at, stride)

        starts: list[int] = list(range(spans.start, end, stages[0].chunk))
        for i, stage in enumerate(stages):
            if i:
                starts = [
                    s for start in starts for s in range(start, start + stages[i - 1].chunk, stage.chunk) if s < end
                ]

            def score(start: int, stage: Stage = stage) -> float:
                size = min(stage.chunk, end - start)
                return max(chunk_score(head, start, size, stage.stride) for head in range(len(rows)))

            starts = sorted(sorted(starts, key=score, reverse=True)[: stage.keep // stage.chunk])
        return starts

    return _each_list(q, k, spans, search, lists)


def _each_list(
    q: Tensor, k: Tensor, spans: Spans, search: Callable[[Tensor, Tensor, int], list[int]], lists: int | None
) -> Pieces:
    """search(rows [heads of the list, T', D] from the newest back, keys [S, D], end of the span) for every list."""
    queries, keys = q.shape[2], k.shape[2]
    past, lists = keys - queries, lists or k.shape[1]
    kept: Pieces = []
    for sample in range(q.shape[0]):
        heads = q[sample].float().unflatten(0, (lists, -1))
        kept.append([])
        for n in range(lists):
            kept[-1].append([])
            for i in range(spans.count):
                low, high = (
                    max((spans.first + i) * BLOCK_Q - past, 0),
                    min((spans.first + i + 1) * BLOCK_Q, keys) - past,
                )
                rows = torch.flip(heads[n, :, low:high], (1,))
                kept[-1][-1].append(search(rows, k[sample, n * k.shape[1] // lists].float(), spans.end(i)))
    return kept
