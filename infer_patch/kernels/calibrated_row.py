"""One row of each head corrected as `calibrated_attention.lower_columns` does, from its probabilities: decode steps.

With b the mass of the row on listed keys, O_S their part of the output and c = 1 + (1 - beta) b / (1 - b):

    o' = c o + (beta - c) O_S

Only the values of listed keys are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infer_patch.kernels.calibrated_attention import EPSILON, LARGEST_FACTOR, lowered_probabilities
from infer_patch.kernels.row_attention import per_key_head


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
