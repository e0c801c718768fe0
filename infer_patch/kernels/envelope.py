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

import math
from collections.abc import Callable

import torch
from torch import Tensor

from infer_patch.kernels.block_mask import BlockMask
from infer_patch.kernels.dispatch import choose

Envelope = tuple[Tensor, Tensor | None]

_SCORES_PER_CALL = {"cpu": 1 << 16, "cuda": 1 << 26}  # few enough for the L2 cache; enough to fill a GPU


def block_envelope(k: Tensor, block: int, implementation: str | None = None) -> Envelope:
    """(centre, half-width) of all blocks: k [B, H_kv, S, D] -> two of [B, H_kv, ceil(S / block), D]; or (k, None)."""
    if block == 1:
        return k, None
    if choose(implementation, IMPLEMENTATIONS, k) == "triton":
        from infer_patch.kernels import envelope_triton

        return envelope_triton.envelope(k, block)
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
    scores = scores.log_softmax(-1).nan_to_num(float("-inf"), neginf=float("-inf"))
    return scores.unflatten(-1, (-1, per)).amax((-3, -1))


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
    implementation: str | None = None,
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
    implementation : {"reference", "cpu", "triton"}, optional
        Override of the automatic choice of what computes the scores.

    Returns
    -------
    BlockMask with M = H_kv and W = budget / block (or fewer when there are fewer keys).
    """
    batch, _, queries, size = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    first, last = (keys - queries) // block, -(-keys // block)
    scale = size**-0.5 if scale is None else scale
    with torch.no_grad():
        score = score_key_blocks(q, envelope, keys, block, block // score_block, stride, slack, scale, implementation)
    row = torch.arange(first, last, device=q.device)[:, None]
    column = torch.arange(last, device=q.device)
    always = (column < -(-sinks // block)) | (column >= ((row * block - window + 1) // block).clamp(min=0))
    score = score.masked_fill(always, float("inf")).masked_fill(column > row, float("-inf"))
    width = min(budget // block, last)
    best = score.topk(width, -1).indices
    best = best.masked_fill(best > row, last).sort(-1).values
    count = (row[:, 0] + 1).clamp(max=width).expand(batch, kv_heads, -1)
    return BlockMask(best, count, block, block)


def score_key_blocks(
    q: Tensor,
    envelope: Envelope,
    keys: int,
    block: int,
    per: int,
    stride: int,
    slack: float,
    scale: float,
    implementation: str | None = None,
) -> Tensor:
    """log of the largest probability any sampled row gives any of the `per` score blocks: [B, H_kv, n_q, n_k], fp32.

    q [B, H, T, D]; -inf where a key block does not lie before the query block. The arguments are those of
    `select_blocks`, with `per` = block / score_block.
    """
    centre, half_width = envelope
    tensors = (q, centre) if half_width is None else (q, centre, half_width)
    refusal = None
    if per & (per - 1) or per > 64:
        refusal = f"{per} score blocks to a key block; need a power of two, at most 64"
    name = choose(implementation, IMPLEMENTATIONS, *tensors, refusal=refusal)
    return IMPLEMENTATIONS[name](q, envelope, keys, block, per, stride, slack, scale)


def reference(
    q: Tensor, envelope: Envelope, keys: int, block: int, per: int, stride: int, slack: float, scale: float
) -> Tensor:
    """`score_blocks` on one query block after the other."""
    queries, kv_heads = q.shape[2], envelope[0].shape[1]
    past = keys - queries
    first, last = past // block, -(-keys // block)
    score = torch.full((q.shape[0], kv_heads, last - first, last), float("-inf"), device=q.device)
    for i in range(max(first, 1), last):
        rows = q[:, :, max(i * block, past) - past : min((i + 1) * block, keys) - past].flip(2)[:, :, ::stride]
        rows = rows.unflatten(1, (kv_heads, -1)).flatten(2, 3)[:, :, None]
        before = tuple(x if x is None else x[:, :, : i * per] for x in envelope)
        everything = torch.ones(1, i * per, dtype=torch.bool, device=q.device)
        score[:, :, i - first, :i] = score_blocks(rows, before, everything, per, scale, slack)[:, :, 0]  # type: ignore[arg-type]
    return score


def triton(
    q: Tensor, envelope: Envelope, keys: int, block: int, per: int, stride: int, slack: float, scale: float
) -> Tensor:
    """Two passes of GPU kernels over the envelopes: log-sum-exp of each row, then the largest score of each block."""
    from infer_patch.kernels import envelope_triton

    return envelope_triton.scores(q, envelope, keys, block, per, stride, slack, scale)


def cpu(
    q: Tensor, envelope: Envelope, keys: int, block: int, per: int, stride: int, slack: float, scale: float
) -> Tensor:
    """Fast torch path, any device: stacks of query blocks against all key blocks before them."""
    batch, heads, queries, _ = q.shape
    kv_heads, past = envelope[0].shape[1], keys - queries
    first, last = past // block, -(-keys // block)
    if queries > 1 and not _fast_half(q):
        q, envelope = q.float(), tuple(x if x is None else x.float() for x in envelope)  # type: ignore[assignment]
    q = (q * scale).unflatten(1, (kv_heads, heads // kv_heads))
    flat = [x if x is None else x.flatten(0, 1) for x in envelope]
    rows_per_block = heads // kv_heads * -(-min(block, queries) // stride)
    # one buffer for all products: a fresh one for each costs more in page faults than the product itself
    workspace = _Workspace()
    limit = _SCORES_PER_CALL.get(q.device.type, 1 << 26)
    score = torch.full((batch * kv_heads, last - first, last), float("-inf"), device=q.device)
    for i, j in _spans(first, last, queries, keys, block, batch * kv_heads * rows_per_block * per, limit):
        if j == 1:
            continue  # the first query block has nothing before it
        before = j - 1  # key blocks wholly before the last of these query blocks
        rows = q[:, :, :, max(i * block, past) - past : min(j * block, keys) - past].unflatten(3, (j - i, -1))
        rows = rows.flip(4)[..., ::stride, :].transpose(2, 3)  # [B, H_kv, j - i, G, sampled rows, D]
        shape = batch * kv_heads, j - i, rows.shape[3] * rows.shape[4], before, per
        rows = rows.reshape(shape[0], -1, rows.shape[-1])
        scores = workspace.scores(rows, [x if x is None else x[:, : before * per] for x in flat], slack).view(shape)
        for later in range(j - i - 1):  # key blocks that do not lie before this query block of the stack
            scores[:, later, :, i + later :] = float("-inf")
        best = scores.amax(-1)
        top = best.amax(-1, keepdim=True).clamp(min=torch.finfo(best.dtype).min)
        total = scores.flatten(-2).sub_(top).exp_().sum(-1, keepdim=True).log_().add_(top)
        score[:, i - first : j - first, :before] = (
            (best - total).nan_to_num_(nan=float("-inf"), neginf=float("-inf")).amax(2)
        )
    return score.unflatten(0, (batch, kv_heads))


class _Workspace:
    """Products of queries with envelopes, in memory that is used again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def scores(self, rows: Tensor, envelope: list[Tensor | None], slack: float) -> Tensor:
        """`envelope_scores` in fp32: rows [N, R, D], envelope [N, n, D] -> [N, R, n]."""
        centre, half_width = envelope
        shape = rows.shape[0], rows.shape[1], centre.shape[1]  # type: ignore[union-attr]
        out = self._buffer("product", shape, rows)
        torch.bmm(rows, centre.transpose(1, 2), out=out)  # type: ignore[union-attr]
        if half_width is not None and slack:
            torch.baddbmm(out, rows.abs(), half_width.transpose(1, 2), alpha=slack, out=out)
        return out if out.dtype == torch.float32 else self._buffer("fp32", shape, rows, torch.float32).copy_(out)

    def _buffer(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        size = math.prod(shape)
        held = self._buffers.get(name)
        if held is None or held.numel() < size:
            held = self._buffers[name] = torch.empty(size, dtype=dtype or like.dtype, device=like.device)
        return held[:size].view(shape)


def _fast_half(x: Tensor) -> bool:
    """Whether matrix products in this tensor's dtype are at least as fast as in fp32."""
    return x.is_cuda or x.dtype == torch.float32 or torch.backends.cpu.get_cpu_capability() == "AVX512"


def _spans(
    first: int, last: int, queries: int, keys: int, block: int, per_block: int, limit: int
) -> list[tuple[int, int]]:
    """Query blocks [i, j) scored together: whole blocks in stacks, a partial first and last block alone.

    `per_block` is the number of scores of one query block with one key block, `limit` that of scores per stack.
    """
    head = first + 1 if (keys - queries) % block or last == first + 1 else first
    tail = last - 1 if keys % block and last - 1 >= head else last
    spans = [(first, head)] if head > first else []
    i = head
    while i < tail:
        j = min(tail, i + max(1, limit // max(per_block * (i + 1), 1)))
        spans.append((i, j))
        i = j
    return spans + ([(tail, last)] if tail < last else [])


IMPLEMENTATIONS: dict[str, Callable[[Tensor, Envelope, int, int, int, int, float, float], Tensor]] = {
    "reference": reference,
    "cpu": cpu,
    "triton": triton,
}
