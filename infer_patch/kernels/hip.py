"""Hierarchical choice of key blocks: the tree of HiP (arXiv 2406.09827) and the stages of InfiniteHiP (2502.08910).

Neighbouring keys tend to score alike, so a few representatives stand for many keys. Both searches look, for each block
of 64 queries, at the keys between sinks and window (`Spans`) and return the numbers of the first keys of the pieces
they keep; `block_lists` rounds these out to attention blocks and adds sinks and window.

Notation: B batch, H query heads, L lists per sample (H_kv, or H: one for each query head), n_q query blocks, D head
size. Scores are q . k in fp32, over every stride-th row of a query block counted back from its last, and over all
query heads that share the list; softmax scale does not matter. Results for keys that tie may differ between devices.

`hip_reference.py` has the same searches, as plain loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infer_patch.kernels.block_mask import BlockMask
from infer_patch.kernels.key_pieces import KeyPieces

BLOCK_Q = 64
_SCORES_PER_CALL = {"cpu": 1 << 18, "cuda": 1 << 26}  # near the L2 cache; enough to fill a GPU


@dataclass(frozen=True)
class Spans:
    """The keys each query block searches: from `start` to `end(i)`, between sinks and window.

    All are multiples of the attention block, so that sinks, searched keys and window share no block.

    Parameters
    ----------
    first, count : int
        Number of the first query block, number of query blocks.
    start : int
        First key behind the sinks.
    window : int
        Recent tokens that the first query of a block keeps in sight; they are listed, not searched.
    block : int
        Keys in an attention block.
    """

    first: int
    count: int
    start: int
    window: int
    block: int

    @classmethod
    def of(cls, queries: int, keys: int, sinks: int, window: int, block: int = 64) -> Spans:
        """The spans of a call with T queries and S keys."""
        first, last = (keys - queries) // BLOCK_Q, -(-keys // BLOCK_Q)
        return cls(first, last - first, -(-sinks // block) * block, window, block)

    def end(self, i: int) -> int:
        """First key behind the span of the i-th query block of the call."""
        return max(self.start, ((self.first + i) * BLOCK_Q - self.window + 1) // self.block * self.block)

    def ends(self, device: torch.device) -> Tensor:
        """`end` of all query blocks: int64 [n_q]."""
        low = torch.arange(self.first, self.first + self.count, device=device) * BLOCK_Q - self.window + 1
        return (low.div(self.block, rounding_mode="floor") * self.block).clamp(min=self.start)


@dataclass(frozen=True)
class Stage:
    """One pruning stage: pieces of `chunk` tokens, of which `keep` tokens survive, judged by every stride-th row."""

    chunk: int
    keep: int
    stride: int = 1


@torch.no_grad()
def hip_tree(
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
) -> Tensor:
    """Top-k keys by halving: m = budget / tree_block slots, each halved until it is one tree block, best m of 2 m kept.

    Parameters
    ----------
    q, k : Tensor [B, H, T, D], [B, H_kv, S, D]
    budget, tree_block : int
        Tokens kept, and tokens in the smallest piece; budget is a multiple of tree_block, which divides the
        attention block.
    representative : {"center", "first"}
        The tree block that stands for a branch.
    stride, key_stride : int
        Every stride-th row of a query block and every key_stride-th key of a representative is scored.
    lists : int, optional
        L, default H_kv.

    Returns
    -------
    int64 [B, L, n_q, m]
        First key of each kept tree block, in no order; a key behind the span where a slot stayed empty. A span of at
        most `budget` keys is kept whole.
    """
    slots, keys = budget // tree_block, k.shape[2]
    table = KeyPieces(_fp32_if_many(q, k), lists or k.shape[1], tree_block, key_stride)
    nothing = keys + spans.start
    kept = torch.full((q.shape[0], table.lists, spans.count, slots), nothing, dtype=torch.int64, device=q.device)
    scored = q.shape[1] // table.lists * -(-min(BLOCK_Q, q.shape[2]) // stride)
    per_row = q.shape[0] * table.lists * max(scored, q.shape[3]) * 2 * slots * table.per
    offset = spans.start // tree_block
    slot = torch.arange(slots + 1, device=q.device)
    ends = spans.ends(q.device)
    for i, j in _stacks(spans.count, per_row, q.device):
        most = (spans.end(j - 1) - spans.start) // tree_block
        if most == 0:
            continue
        blocks = (ends[i:j, None] - spans.start) // tree_block  # n, of each query block
        edges = (blocks * slot).div(slots, rounding_mode="floor")
        first = edges[:, :-1].expand(*kept.shape[:2], -1, -1)
        size = edges[:, 1:] - first
        rows = _sampled_rows(q, spans, i, j, keys, stride, table.lists)
        score = None  # of the representatives of `first`, once known
        for r in range(_rounds(most, slots)):
            half = size // 2
            child, width = torch.cat([first, first + half], -1), torch.cat([half, size - half], -1)
            if representative == "first":  # a left child is represented by the same block as its parent
                left = table.best(rows, first + offset) if score is None else score
                scores = torch.cat([left, table.best(rows, first + half + offset)], -1)
            else:
                scores = table.best(rows, child + width // 2 + offset)
            scores = scores.masked_fill(width == 0, float("-inf"))
            best = scores.topk(slots, -1, sorted=False)
            going = (slots << r) < blocks  # query blocks with a shorter span are done
            first = torch.where(going, child.gather(-1, best.indices), first)
            size = torch.where(going, width.gather(-1, best.indices), size)
            score = best.values
        kept[:, :, i:j] = torch.where(size > 0, (first + offset) * tree_block, nothing)
    return kept


@torch.no_grad()
def hip_stages(
    q: Tensor,
    k: Tensor,
    spans: Spans,
    stages: Sequence[Stage],
    *,
    lists: int | None = None,
    reuse: Sequence[Tensor] = (),
) -> list[Tensor]:
    """Stages of pruning: the span in chunks, the best kept; these in smaller chunks, the best kept; and so on.

    A chunk is judged by one token, which each query head finds by bisection: of two halves the one whose middle token
    scores higher, the right one if they tie. Its score is the largest that any sampled row of any query head of the
    list gives this token.

    Parameters
    ----------
    stages : sequence of Stage
        Chunks shrink from stage to stage, each a multiple of the next.
    reuse : sequence of Tensor
        What the first stages returned earlier for the same spans; only the others are computed.

    Returns
    -------
    list of int64 [B, L, n_q, keep / chunk]
        Per stage the first token of each kept chunk, in no order; some key behind the span in empty places.
    """
    keys, done = k.shape[2], len(reuse)
    lists = lists or k.shape[1]
    table = KeyPieces(_fp32_if_many(q, k), q.shape[1], 1, 1)
    kept = [*reuse]
    widths = _widths(spans.end(spans.count - 1) - spans.start, stages)
    for _, width in widths[done:]:
        shape = q.shape[0], lists, spans.count, width
        kept.append(torch.full(shape, keys + spans.start, dtype=torch.int64, device=q.device))
    ends = spans.ends(q.device)[:, None]
    most = max(chunks for chunks, _ in widths)
    scored = -(-min(BLOCK_Q, q.shape[2]) // min(stage.stride for stage in stages))
    per_row = q.shape[0] * q.shape[1] * max(scored, q.shape[3]) * 2 * most
    for i, j in _stacks(spans.count, per_row, q.device):
        span = spans.end(j - 1) - spans.start
        start = kept[done - 1][:, :, i:j] if done else None
        for s, (chunks, width) in enumerate(_widths(span, stages)):
            if s < done:
                continue
            chunk = stages[s].chunk
            if start is None:
                start = spans.start + chunk * torch.arange(chunks, device=q.device)
                start = start.expand(q.shape[0], lists, j - i, -1)
            elif s:
                parts = torch.arange(0, stages[s - 1].chunk, chunk, device=q.device)
                start = (start[..., None] + parts).flatten(-2)
            if start.shape[-1] > width:
                rows = _sampled_rows(q, spans, i, j, keys, stages[s].stride, q.shape[1])
                score = _chunk_scores(table, rows, start, ends[i:j], chunk)
                start = start.gather(-1, score.topk(width, -1, sorted=False).indices)
            kept[s][:, :, i:j, : start.shape[-1]] = start
    return kept


def block_lists(kept: Tensor, spans: Spans, queries: int, keys: int) -> BlockMask:
    """Sinks, the attention blocks that hold a kept piece, and everything from the end of the searched span on.

    Parameters
    ----------
    kept : int64 [B, L, n_q, C]
        First keys of the kept pieces; those outside the span do not count.
    spans : Spans
        Where `kept` was searched: in decode that may have been a few tokens ago (n_q is 1 then).
    """
    block, none = spans.block, -(-keys // spans.block)
    per, first = BLOCK_Q // block, (keys - queries) // BLOCK_Q
    row = torch.arange(first, first + spans.count, device=kept.device)[:, None]
    end, last = spans.ends(kept.device)[:, None], ((row + 1) * per).clamp(max=none)
    found = torch.where(kept < end, kept // block, none).sort(-1).values
    again = torch.zeros_like(found, dtype=torch.bool)
    again[..., 1:] = found[..., 1:] == found[..., :-1]
    found = found.masked_fill(again, none)
    sink = torch.arange(spans.start // block, device=kept.device).expand(spans.count, -1)
    # blocks from the end of the span on: most in the last whole query block, or in the last
    recent = max(0, *(min((first + i + 1) * per, none) - spans.end(i) // block for i in range(spans.count)[-2:]))
    newest = end // block + torch.arange(recent, device=kept.device)
    always = [x.masked_fill(x >= last, none).expand(*kept.shape[:2], -1, -1) for x in (sink, newest)]
    idx = torch.cat([always[0], found, always[1]], -1).sort(-1).values
    between = (spans.end(spans.count - 1) - spans.start) // block
    width = min(none, sink.shape[1] + min(kept.shape[-1], between) + recent)
    return BlockMask(idx[..., :width], (idx < none).sum(-1), BLOCK_Q, block)


def _widths(span: int, stages: Sequence[Stage]) -> list[tuple[int, int]]:
    """(chunks to choose from, chunks kept) of each stage, for a span of that many tokens."""
    widths: list[tuple[int, int]] = []
    for s, stage in enumerate(stages):
        chunks = -(-span // stage.chunk) if s == 0 else widths[-1][1] * (stages[s - 1].chunk // stage.chunk)
        widths.append((chunks, min(chunks, stage.keep // stage.chunk)))
    return widths


def _chunk_scores(table: KeyPieces, rows: Tensor, start: Tensor, ends: Tensor, chunk: int) -> Tensor:
    """Scores of chunks: rows [B, H, n, R, D], start [B, L, n, C], ends [n, 1] -> [B, L, n, C]; -inf past the end."""
    group = rows.shape[1] // start.shape[1]
    low = start.repeat_interleave(group, 1)
    size = (ends - low).clamp(0, chunk)
    score = torch.full(low.shape, float("-inf"), device=low.device)
    exists = size > 0
    for _ in range((chunk - 1).bit_length()):
        half = size // 2
        right = low + half
        middles = torch.cat([low + half // 2, right + (size - half) // 2], -1)
        left_score, right_score = table.best(rows, middles).chunk(2, -1)
        go_left = (left_score > right_score) & (half > 0)
        score = torch.where(go_left, left_score, right_score)
        low, size = torch.where(go_left, low, right), torch.where(go_left, half, size - half)
    return score.masked_fill(~exists, float("-inf")).unflatten(1, (-1, group)).amax(2)


def _sampled_rows(q: Tensor, spans: Spans, i: int, j: int, keys: int, stride: int, lists: int) -> Tensor:
    """Every stride-th row of query blocks i to j, counted back from the last: [B, L, j - i, rows * H / L, D], fp32."""
    past = keys - q.shape[2]
    block = torch.arange(spans.first + i, spans.first + j, device=q.device)[:, None]
    last = ((block + 1) * BLOCK_Q).clamp(max=keys) - 1
    row = last - torch.arange(0, min(BLOCK_Q, q.shape[2]), stride, device=q.device)
    row = torch.where(row < (block * BLOCK_Q).clamp(min=past), last, row)  # a partial block: its last row again
    rows = q.index_select(2, (row - past).flatten()).float()
    rows = rows.unflatten(2, row.shape).unflatten(1, (lists, -1)).transpose(2, 3)
    return rows.flatten(3, 4)


def _fp32_if_many(q: Tensor, k: Tensor) -> Tensor:
    """All keys in fp32, which pays where more than one query block gathers from them; others gather first."""
    return k.float() if q.shape[2] > BLOCK_Q else k


def _rounds(blocks: int, slots: int) -> int:
    """How often branches of `blocks / slots` blocks are halved until none holds more than one."""
    return (-(-blocks // slots) - 1).bit_length() if blocks > slots else 0


def _stacks(rows: int, per_row: int, device: torch.device) -> list[tuple[int, int]]:
    """Query blocks scored together: as many as keep the scores of a call within bounds."""
    step = max(1, _SCORES_PER_CALL.get(device.type, 1 << 26) // max(per_row, 1))
    return [(i, min(i + step, rows)) for i in range(0, rows, step)]
