"""One row of each head corrected as `calibrated_attention.lower_columns` does, from its probabilities: decode steps.

With b the mass of the row on listed keys, O_S their part of the output and c = 1 + (1 - beta) b / (1 - b):

    o' = c o + (beta - c) O_S

Only the values of listed keys are read. `running_row` is ACT's whole step, `lower_row` its last part.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from infer_patch.kernels import row_attention as rows_of
from infer_patch.kernels.calibrated_attention import (
    EPSILON,
    LARGEST_FACTOR,
    lowered_probabilities,
    reference_probabilities,
)
from infer_patch.kernels.dispatch import choose
from infer_patch.kernels.row_attention import per_key_head


@torch.no_grad()
def running_row(
    output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sums: Tensor,
    kv: tuple[int, ...],
    kv_index: Tensor,
    threshold: float,
    spare: str,
    min_queries: int,
    beta: float,
    scale: float,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A new row of each head, with the sinks of all rows up to it lowered to beta in it; no gradients.

    Parameters
    ----------
    output : Tensor [b, h, 1, D_v]
        Plain attention of q [b, h, 1, D] over k [b, H_kv, S, D] and v [b, H_kv, S, D_v], all of which it sees.
    sums : float32 Tensor [b, h, S - 1]
        Column sums of the rows before it.
    kv : tuple of int
        Key head of each of the h query heads, ascending.
    kv_index : int64 Tensor [h]
        The same, where `v` is.
    threshold : float
        Mean received attention above which a key is a sink.
    spare : {"first_detected", "first_token"}
        Which sink is left alone: the first one, or token 0 and no other.
    min_queries : int
        Keys that fewer rows see are no sinks.

    Returns
    -------
    Tensor like `output`; the rows that differ, bool [b, h, 1], as of `lower_columns`; the column sums with this row,
    float32 [b, h, S]; its log-sum-exp, float32 [b, h, 1].

    Raises
    ------
    ValueError
        As of `dispatch.choose`.
    """
    face = choose(implementation, rows_of.FACES, q, k, v, output)
    rule = threshold, spare, min_queries
    if face == "triton":
        from infer_patch.kernels import calibrated_row_triton

        limit = LARGEST_FACTOR.get(output.dtype, 4.0)
        return calibrated_row_triton.running_row(
            output, q, k, v, sums, kv_index, threshold, spare == "first_token", min_queries, beta, scale, limit
        )
    if face == "reference":
        a, lse = reference_probabilities(q, k, kv, scale), rows_of.row_lse(q, k, kv, scale)
        sums = F.pad(sums, (0, 1)) + a[:, :, 0]
        lowered, changed = lowered_probabilities(a, _later_sinks(sums, *rule)[:, :, None], beta)
        new = per_key_head(lowered, v.float(), kv).to(output.dtype)
        return torch.where(changed[..., None], new, output), changed, sums, lse
    p, lse = rows_of.newest_row(q, k, kv, scale)
    with_row = p.clone()
    with_row[..., :-1] += sums
    row, key = _later_sinks(with_row, *rule).flatten(0, 1).nonzero(as_tuple=True)
    if len(row) == 0:
        return output, torch.zeros_like(lse, dtype=torch.bool), with_row, lse
    return *lower_row(output, p, v, kv, kv_index, (row, key), beta), with_row, lse


def _later_sinks(sums: Tensor, threshold: float, spare: str, min_queries: int) -> Tensor:
    """S' like sums [b, h, S]: keys that receive more than the threshold, without the one that is spared."""
    seen_by = torch.arange(sums.shape[-1], 0, -1, device=sums.device)
    sinks = (sums / seen_by > threshold) & (seen_by >= min_queries)
    if spare == "first_token":
        sinks[..., 0] = False
        return sinks
    return sinks & (sinks.cumsum(-1) > 1)


def lower_row(
    output: Tensor,
    a: Tensor,
    v: Tensor,
    kv: tuple[int, ...],
    kv_index: Tensor,
    listed: tuple[Tensor, Tensor],
    beta: float,
) -> tuple[Tensor, Tensor]:
    """`output` with the probabilities of listed keys lowered to beta; no gradients.

    Parameters
    ----------
    output : Tensor [b, h, 1, D_v]
        Plain attention of one query that sees all S keys.
    a : float32 Tensor [b, h, S]
        Its probabilities.
    v : Tensor [b, H_kv, S, D_v]
    kv : tuple of int
        Key head of each of the h query heads, ascending.
    kv_index : int64 Tensor [h]
        The same, where `v` is.
    listed : (int64 Tensor [n], int64 Tensor [n])
        The listed keys: sample and head as one number, h sample + head, and the key.

    Returns
    -------
    Tensor like `output`, and the rows that differ, bool [b, h, 1], as of `lower_columns`.
    """
    batch, heads, keys = a.shape
    row, key = listed
    p = a.view(-1, keys)[row, key]
    if batch == 1:
        values = v[0, kv_index[row], key]
    else:
        values = v[row.div(heads, rounding_mode="floor"), kv_index[row % heads], key]
    mass = p.new_zeros(batch * heads).index_add_(0, row, p).view(batch, heads, 1, 1)
    part = p.new_zeros(batch * heads, v.shape[-1]).index_add_(0, row, p[:, None] * values.float())
    c = 1 + (1 - beta) * mass / (1 - mass).clamp(min=EPSILON)
    new = torch.addcmul(c * output, beta - c, part.view(batch, heads, 1, -1))
    changed = mass.squeeze(-1) > 0  # without mass, c is 1 and part 0
    limit = LARGEST_FACTOR.get(output.dtype, 4.0)
    if float(c.max()) > limit:  # nearly everything is on listed keys: such rows are computed afresh
        columns = torch.zeros_like(a, dtype=torch.bool)
        columns.view(-1, keys)[row, key] = True
        lowered, changed = lowered_probabilities(a[:, :, None], columns[:, :, None], beta)
        afresh = torch.where(changed[..., None], per_key_head(lowered, v, kv), output)
        new = torch.where(c > limit, afresh, new)
    return new.to(output.dtype), changed
