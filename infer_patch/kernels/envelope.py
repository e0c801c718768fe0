"""Block envelopes: a bound on every score of a few neighbouring keys, and the choice of key blocks from it.

The envelope of a score block is its element-wise minimum K- and maximum K+, kept as centre c = (K+ + K-) / 2 and
half-width h = (K+ - K-) / 2. For every key of the block
    q . k <= max(q, 0) . K+_j + min(q, 0) . K-_j = q . c_j + |q| . h_j
(Quest, arXiv 2406.10774). With rotary embedding the bound is loose: fast-turning channels fill their whole range in
any block. So the score is u = q . c_j + slack |q| . h_j; slack 1 is the bound, less of it ranks blocks better in
practice. A score block of one key is exact: c is the key and there is no h.
A query block scores a key block by the largest softmax_j(u) that any of its sampled rows, of any query head of the key
head, gives any score block in it. (A sum over rows would let many lukewarm rows outvote the one that needs the block.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from infer_patch.kernels.block_mask import BlockMask

Envelope = tuple[Tensor, Tensor | None]

_SCORES_PER_CALL = 1 << 22


def block_envelope(k: Tensor, block: int) -> Envelope:
    """(centre, half-width) of all blocks: k [B, H_kv, S, D] -> two of [B, H_kv, ceil(S / block), D]; or (k, None)."""
    if block == 1:
        return k, None
    full = k.shape[2] // block
    blocks = k[:, :, : full * block].unflatten(2, (full, block))
    low, high = blocks.amin(3), blocks.amax(3)
    if full * block < k.shape[2]:
        rest = k[:, :, full * block :]
        low = torch.cat([low, rest.amin(2, keepdim=True)], 2)
        high = torch.cat([high, rest.amax(2, keepdim=True)], 2)
    return (high + low) / 2, (high - low) / 2


def envelope_scores(q: Tensor, envelope: Envelope, slack: float) -> Tensor:
    """q . c + slack |q| . h: q [..., R, D] and envelopes [..., n, D] -> [..., R, n]; slack 1 bounds every q . k."""
    centre, half_width = envelope
    scores = q @ centre.transpose(-1, -2)
    if half_width is None or not slack:
        return scores
    return scores + q.abs() @ half_width.transpose(-1, -2) * slack


def score_blocks(q: Tensor, envelope: Envelope, visible: Tensor, per: int, scale: float, slack: float) -> Tensor:
    """log max over rows and score blocks of softmax_j(scale u): the reference form, in fp32.

    q [B, H_kv, n_q, R, D] (R sampled rows of a query block, all query heads of the key head), envelope of n score
    blocks, `per` of them to a key block, visible bool [n_q, n] -> [B, H_kv, n_q, n / per]; -inf where invisible.
    """
    wide = tuple(x if x is None else x.float()[:, :, None] for x in envelope)
    scores = envelope_scores(q.float(), wide, slack) * scale  # type: ignore[arg-type]
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    return scores.log_softmax(-1).nan_to_num(float("-inf")).unflatten(-1, (-1, per)).amax((-3, -1))


def select_blocks(
    q: Tensor,
    k: Tensor,
    envelope: Envelope,
    *,
    budget: int,
    sinks: int,
    window: int,
    block: int = 64,
    score_block: int = 1,
    slack: float = 0.1,
    stride: int = 4,
    scale: float | None = None,
) -> BlockMask:
    """The `budget` tokens' worth of key blocks that each query block reads, one list per key head.

    Parameters
    ----------
    q, k : Tensor [B, H, T, D], [B, H_kv, S, D]
    envelope : (centre, half-width) of `k` in blocks of `score_block`, as `block_envelope` gives them.
    budget, sinks, window : int
        Tokens; the budget includes the always-listed sinks and window.
    slack : float
        Share of the half-width that counts, 0 to 1.
    stride : int
        Every stride-th row of a query block is scored, its last row always.

    Returns
    -------
    BlockMask with M = H_kv and W = budget / block (or fewer when there are fewer keys).
    """
    batch, heads, queries, size = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    first, last = (keys - queries) // block, -(-keys // block)
    scale = size**-0.5 if scale is None else scale
    score = torch.cat(
        [
            _attention_block_scores(q, envelope, i, j, keys, stride, block, score_block, slack, scale)
            for i, j in _spans(
                first, last, queries, keys, block, batch * heads * block // stride * block // score_block
            )
        ],
        2,
    )
    row = torch.arange(first, last, device=q.device)[:, None]
    column = torch.arange(last, device=q.device)
    always = (column < -(-sinks // block)) | (column >= ((row * block - window + 1) // block).clamp(min=0))
    score = score.masked_fill(always, float("inf")).masked_fill(column > row, float("-inf"))
    width = min(budget // block, last)
    best = score.topk(width, -1).indices
    best = best.masked_fill(best > row, last).sort(-1).values
    count = (row[:, 0] + 1).clamp(max=width).expand(batch, kv_heads, -1)
    return BlockMask(best, count, block, block)


def _spans(first: int, last: int, queries: int, keys: int, block: int, per_block: int) -> list[tuple[int, int]]:
    """Query blocks [i, j) scored together: whole blocks in stacks, a partial first and last block alone.

    `per_block` is the number of scores of one query block with one key block.
    """
    head = first + 1 if (keys - queries) % block or last == first + 1 else first
    tail = last - 1 if keys % block and last - 1 >= head else last
    spans = [(first, head)] if head > first else []
    i = head
    while i < tail:
        j = min(tail, i + max(1, _SCORES_PER_CALL // max(per_block * (i + 1), 1)))
        spans.append((i, j))
        i = j
    return spans + ([(tail, last)] if tail < last else [])


def _attention_block_scores(
    q: Tensor,
    envelope: Envelope,
    i: int,
    j: int,
    keys: int,
    stride: int,
    block: int,
    score_block: int,
    slack: float,
    scale: float,
) -> Tensor:
    """Scores of query blocks [i, j): [B, H_kv, j - i, ceil(S / block)], the logarithm of the largest probability."""
    batch, heads, queries, _ = q.shape
    kv_heads, past = envelope[0].shape[1], keys - queries
    a, b = max(i * block, past), min(j * block, keys)
    per = block // score_block
    columns, before_last = -(-keys // block), j - 1
    if before_last == 0:
        return q.new_zeros(batch, kv_heads, j - i, columns, dtype=torch.float32)
    rows = (q[:, :, a - past : b - past] * scale).unflatten(1, (kv_heads, heads // kv_heads))
    rows = rows.unflatten(3, (j - i, -1)).transpose(2, 3)  # [B, H_kv, j - i, G, rows of a block, D]
    rows = rows.flip(4)[..., ::stride, :].flatten(3, 4)
    wholly_before = tuple(x if x is None else x[:, :, : before_last * per] for x in envelope)
    scores = envelope_scores(rows.flatten(2, 3), wholly_before, slack)  # type: ignore[arg-type]
    scores = scores.unflatten(2, (j - i, -1)).unflatten(-1, (before_last, per))
    for row in range(j - i - 1):  # the later blocks of this stack do not lie before this query block
        scores[:, :, row, :, i + row :] = float("-inf")
    best = scores.amax(-1).float()
    mass = (best - scores.flatten(-2).logsumexp(-1, keepdim=True).float()).amax(3)
    if i == 0:
        mass[:, :, 0] = 0.0  # the first query block has nothing before it
    return torch.nn.functional.pad(mass, (0, columns - before_last))
