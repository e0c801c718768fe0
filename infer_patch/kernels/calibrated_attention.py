"""Attention whose probabilities are moved after the softmax, from the plain output and exact corrections: ACT's.

`lower_columns` (arXiv 2406.15765): in chosen heads, the probabilities of listed keys are multiplied by beta and what
they lose goes to the row's other keys in proportion. With b_i the mass of row i on listed keys,
c_i = 1 + (1 - beta) b_i / (1 - b_i) and O_S,i their part of the output:

    o'_i = c_i o_i + (beta - c_i) O_S,i

Faces: `reference` (fp32, writes the T x S probabilities out), `cpu` (fast torch, any device, rows in blocks) and
`triton` (NVIDIA GPUs; no gradients). An argument or INFER_PATCH_KERNELS overrides the choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from infer_patch.kernels import row_attention as rows_of
from infer_patch.kernels.dispatch import choose

# c_i above which o_i, in this precision, is too coarse to be multiplied by it: such rows are computed afresh
LARGEST_FACTOR = {torch.float32: 4.0, torch.float16: 4.0, torch.bfloat16: 2.0}
EPSILON = 1e-6
TINY = 1e-30


def lower_columns(
    output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: tuple[int, ...],
    listed: Tensor,
    beta: float,
    scale: float,
    lse: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`output` of causal attention with the columns `listed` lowered to beta.

    Parameters
    ----------
    output : Tensor [b, h, T, D_v]
        Plain attention of q [b, h, T, D] over k, v [b, H_kv, S, D]; the queries are those of the last T keys.
    kv : tuple of int
        Key head of each of the h query heads, ascending.
    listed : bool Tensor [b, h, S]
    lse : Tensor [b, h, T], optional
        Log-sum-exp of the rows, where it is known.

    Returns
    -------
    Tensor like `output`, and the rows that differ, bool [b, h, T]: all but those without mass on listed keys, and those
    with mass on nothing else.
    """
    face = choose(implementation, rows_of.FACES, q, k, v)
    if face != "reference":
        return _lower_columns(output, q, k, v, kv, listed, beta, scale, lse, face == "triton")
    a = reference_probabilities(q, k, kv, scale)
    changed, rows = lowered_probabilities(a, listed[:, :, None], beta)
    new = rows_of.per_key_head(changed, v.float(), kv).to(output.dtype)
    return torch.where(rows[..., None], new, output), rows


def reference_probabilities(q: Tensor, k: Tensor, kv: tuple[int, ...], scale: float) -> Tensor:
    """All of A, fp32 [b, h, T, S]."""
    return rows_of.scores(q, k, kv, scale, k.shape[2] - q.shape[2]).softmax(-1)


def lowered_probabilities(a: Tensor, columns: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """A' [b, h, T, S] from A and its listed columns, bool [b, h, 1 or T, S]; the rows that differ, bool [b, h, T]."""
    b, rest = (a * columns).sum(-1, keepdim=True), (a * ~columns).sum(-1, keepdim=True)
    rows = (b > 0) & (rest > TINY)
    c = 1 + (1 - beta) * b / rest.clamp(min=TINY)
    return torch.where(rows, torch.where(columns, beta * a, c * a), a), rows.squeeze(-1)


def _lower_columns(
    output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: tuple[int, ...],
    listed: Tensor,
    beta: float,
    scale: float,
    lse: Tensor | None,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    index = rows_of.key_lists(listed)
    batch, heads, count, _ = q.shape
    if index.shape[-1] == 0:
        return output, torch.zeros(batch, heads, count, dtype=torch.bool, device=q.device)
    past = k.shape[2] - count
    if triton:
        from infer_patch.kernels import calibrated_triton

        new, mass = calibrated_triton.lower_columns(output, q, k, v, kv, index, beta, scale, lse)
    else:
        new, mass = _lower_lists(output, q, k, v, kv, index, beta, scale, lse)
    coarse = (1 - beta) * mass > (LARGEST_FACTOR.get(output.dtype, 4.0) - 1) * (1 - mass)
    changed = mass > 0
    if not bool(coarse.any()):
        return new, changed
    new = new.clone()
    position = torch.arange(k.shape[2], device=q.device)
    for sample, head in coarse.any(-1).nonzero().tolist():
        keys, values = (x[sample, kv[head]].float() for x in (k, v))
        for row in coarse[sample, head].nonzero().squeeze(1).split(max(1, (1 << 20) // k.shape[2])):
            z = scale * (q[sample, head, row].float() @ keys.T)
            a = z.masked_fill(position > past + row[:, None], float("-inf")).softmax(-1)
            lowered, differs = lowered_probabilities(a[None, None], listed[sample, head][None, None, None], beta)
            afresh = (lowered[0, 0] @ values).to(new.dtype)
            new[sample, head, row] = torch.where(differs[0, 0, :, None], afresh, output[sample, head, row])
            changed[sample, head, row] = differs[0, 0]
    return new, changed


def _lower_lists(
    output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: tuple[int, ...],
    index: Tensor,
    beta: float,
    scale: float,
    lse: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`output` with listed keys [b, h, m] lowered, and the mass of each row on them [b, h, T]."""
    if lse is None or (torch.is_grad_enabled() and q.requires_grad):
        lse = rows_of.row_lse(q, k, kv, scale)
    keys, values = (rows_of.listed_rows(x, index, kv) for x in (k, v))
    batch, heads, count, _ = q.shape
    past, parts, masses = k.shape[2] - count, [], []
    for here in rows_of.row_blocks(batch, heads, count, index.shape[-1], q.device):
        p = rows_of.listed_probabilities(q[:, :, here], keys, index, lse[:, :, here], scale, past + here.start)
        b = p.sum(-1, keepdim=True)
        c = 1 + (1 - beta) * b / (1 - b).clamp(min=EPSILON)
        part = c * output[:, :, here].float() + (beta - c) * (p @ values.float())
        parts.append(torch.where(b > 0, part.to(output.dtype), output[:, :, here]))
        masses.append(b.squeeze(-1))
    return torch.cat(parts, 2), torch.cat(masses, 2)
