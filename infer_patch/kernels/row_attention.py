"""Attention rows a few at a time, for methods that need probabilities: log-sum-exp, column sums, listed keys.

Nothing here holds a T x S matrix: rows come in blocks, and with LSE_i, the log-sum-exp of row i, any single probability
is A_ij = exp(z_ij - LSE_i). Everything is fp32.

Query heads may be any subset of the model's: `kv` names the key head that each one reads, in ascending order.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import cast

import torch
from torch import Tensor

from infer_patch.kernels.dispatch import choose

FACES = ("reference", "cpu", "triton")
NOWHERE = -1  # fills up lists of keys
_SCORES_PER_BLOCK = {"cpu": 1 << 20, "cuda": 1 << 26}


def key_heads(heads: int, kv_heads: int) -> tuple[int, ...]:
    """The key head of each query head."""
    return tuple(h // (heads // kv_heads) for h in range(heads))


def row_blocks(batch: int, heads: int, rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows that are handled together, so that the working set stays bounded."""
    limit = _SCORES_PER_BLOCK.get(device.type, 1 << 26)
    step = max(1, limit // max(batch * heads * columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def scores(q: Tensor, k: Tensor, kv: tuple[int, ...], scale: float, past: int) -> Tensor:
    """scale q . k, -inf where key j > past + i: q [b, h, r, D], k [b, H_kv, S, D] -> fp32 [b, h, r, S']

    with S' = past + r, the keys that the last of these rows sees.
    """
    rows, visible = q.shape[2], past + q.shape[2]
    product = scale * per_key_head(q.float(), k[:, :, :visible].transpose(-1, -2), kv)
    if rows > 1:
        later = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
        product[..., past:].masked_fill_(later, float("-inf"))
    return product


def per_key_head(rows: Tensor, matrix: Tensor, kv: tuple[int, ...]) -> Tensor:
    """rows [b, h, r, n] times the matrix [b, H_kv, n, m] of the key head of each -> [b, h, r, m], in the rows' dtype.

    Rows of heads that share a key head are stacked, so no matrix is repeated.
    """
    batch, heads, count, _ = rows.shape
    lowest, span = kv[0], kv[-1] + 1 - kv[0]
    even = heads % span == 0 and kv == tuple(lowest + h // (heads // span) for h in range(heads))
    if even and (batch == 1 or span == matrix.shape[1]):  # otherwise the product would copy the matrix
        used = matrix[:, lowest : lowest + span].to(rows.dtype)
        return (rows.reshape(batch, span, heads // span * count, -1) @ used).view(batch, heads, count, -1)
    parts, first = [], 0
    for head, run in groupby(kv):
        last = first + len(list(run))
        stacked = rows[:, first:last].reshape(batch, -1, rows.shape[-1]) @ matrix[:, head].to(rows.dtype)
        parts.append(stacked.view(batch, last - first, count, -1))
        first = last
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@torch.no_grad()
def lse_and_column_sums(
    q: Tensor,
    k: Tensor,
    kv: tuple[int, ...],
    scale: float,
    lse: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """LSE_i and sum_i A_ij of causal attention: q [b, h, T, D], k [b, H_kv, S, D] -> fp32 [b, h, T] and [b, h, S].

    The T queries are those of the last T keys; `lse` may be known. One product of queries and keys; two in Triton,
    where LSE come first.
    """
    if choose(implementation, FACES, q, k) == "triton":
        from infer_patch.kernels import calibrated_triton

        lse, received = calibrated_triton.lse_and_column_sums(q, k, kv, scale)
        return lse, cast(Tensor, received)
    batch, heads, rows, _ = q.shape
    keys = k.shape[2]
    past = keys - rows
    found = torch.empty(batch, heads, rows, device=q.device) if lse is None else lse
    sums = torch.zeros(batch, heads, keys, device=q.device)
    blocks = list(row_blocks(batch, 2, rows, keys, q.device))  # half of one, a head at a time: stays in fast memory
    room = torch.empty(batch * blocks[0].stop * keys, device=q.device)
    later = torch.ones(blocks[0].stop, blocks[0].stop, dtype=torch.bool, device=q.device).triu(1)
    for head, key_head in enumerate(kv):
        columns = k[:, key_head].float().transpose(-1, -2)
        for here in blocks:
            count, visible = here.stop - here.start, past + here.stop
            z = room[: batch * count * visible].view(batch, count, visible)
            torch.bmm(scale * q[:, head, here].float(), columns[..., :visible], out=z)
            z[..., past + here.start :].masked_fill_(later[:count, :count], float("-inf"))
            if lse is not None:
                z.sub_(lse[:, head, here, None]).exp_()
            else:
                top = z.amax(-1)
                torch.softmax(z, -1, out=z)
                found[:, head, here] = top - z.amax(-1).log()  # the largest probability is exp(top - LSE)
            sums[:, head, :visible] += z.sum(1)
    return found, sums


def row_lse(q: Tensor, k: Tensor, kv: tuple[int, ...], scale: float) -> Tensor:
    """LSE_i alone, with gradients: [b, h, T]."""
    batch, heads, rows, _ = q.shape
    past = k.shape[2] - rows
    blocks = row_blocks(batch, heads, rows, k.shape[2], q.device)
    return torch.cat([scores(q[:, :, x], k, kv, scale, past + x.start).logsumexp(-1) for x in blocks], 2)


@torch.no_grad()
def newest_row(q: Tensor, k: Tensor, kv: tuple[int, ...], scale: float) -> tuple[Tensor, Tensor]:
    """Probabilities and LSE of one query that sees all keys: q [b, h, 1, D] -> fp32 [b, h, S] and [b, h, 1]."""
    rows, of_its_own = scale * q.float(), len(set(kv)) == len(kv) == kv[-1] + 1 - kv[0]
    if q.shape[0] == 1 and of_its_own:  # keys times a query is faster than a query times keys
        z = (k[:, kv[0] : kv[-1] + 1].float() @ rows.transpose(-1, -2)).squeeze(-1)
    else:
        z = per_key_head(rows, k.transpose(-1, -2), kv).squeeze(2)
    a = z.softmax(-1)
    return a, z.amax(-1, keepdim=True) - a.amax(-1, keepdim=True).log()


def key_lists(mask: Tensor, width: int | None = None) -> Tensor:
    """Where a bool mask [..., S] is true: indices [..., m], ascending, then `NOWHERE`.

    m is that of the longest list, for which this waits for the device; or `width`, where it is given.
    """
    if width is None:
        width = int(mask.sum(-1).max()) if mask.numel() else 0
    numbers = torch.arange(mask.shape[-1], device=mask.device)
    index = torch.where(mask, numbers, mask.shape[-1]).sort(-1).values[..., :width]
    return index.masked_fill(index == mask.shape[-1], NOWHERE)


def listed_rows(x: Tensor, index: Tensor, kv: tuple[int, ...]) -> Tensor:
    """Rows of keys or values [b, H_kv, S, D] that lists [b, h, m] name -> [b, h, m, D]; row 0 where they name none."""
    sample = torch.arange(x.shape[0], device=x.device)[:, None, None]
    head = torch.tensor(kv, device=x.device)[:, None]
    return x[sample, head, index.clamp(min=0)]


def listed_probabilities(q: Tensor, keys: Tensor, index: Tensor, lse: Tensor, scale: float, past: int) -> Tensor:
    """A_ij of listed keys: q [b, h, r, D], keys [b, h, m, D] of the lists [b, h, m], lse [b, h, r] -> [b, h, r, m].

    Zero where a list is filled up, and where a key is later than its row: row i stands at past + i.
    """
    z = scale * (q.float() @ keys.float().transpose(-1, -2)) - lse[..., None]
    row = torch.arange(past, past + q.shape[2], device=q.device)[:, None]
    listed = index[:, :, None]
    return z.masked_fill((listed > row) | (listed < 0), float("-inf")).exp()
