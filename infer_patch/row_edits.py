"""Attention rows as earlier methods of the same layer left them, for a method that comes after.

Methods that change attention act in a fixed order (`Method.calibration_order`): scores first, then probabilities. The
first works from the model's own attention by its streaming form. A later one gets the probabilities written out, a
block of rows at a time, with every earlier edit applied: exact, without a T x T matrix, and dearer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from infer_patch.kernels import row_attention as rows_of

# (probabilities a [b, h, r, S], scores z like a, query heads of a, rows of the call) -> probabilities like a
RowEdit = Callable[[Tensor, Tensor, Sequence[int], slice], Tensor]


def edited_rows(
    q: Tensor,
    k: Tensor,
    heads: Sequence[int],
    kv: tuple[int, ...],
    scale: float,
    edits: Sequence[RowEdit],
    first: int = 0,
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a call from `first` on, block by block: which rows, and their probabilities, fp32 [b, h, r, S'].

    q [b, h, T, D] are the queries of the last T keys of k [b, H_kv, S, D]; `heads` and `kv` number each one's query
    head and key head. S' counts the keys that the last row of a block sees.
    """
    batch, count, rows, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    for block in rows_of.row_blocks(batch, count, rows - first, keys, q.device):
        here = slice(block.start + first, block.stop + first)
        z = rows_of.scores(q[:, :, here], k, kv, scale, keys - rows + here.start)
        a = z.softmax(-1)
        for edit in edits:
            a = edit(a, z, heads, here)
        yield here, a


def attended(a: Tensor, v: Tensor, kv: tuple[int, ...]) -> Tensor:
    """Probabilities [b, h, r, S'] times the values [b, H_kv, S, D_v] of their key heads: fp32 [b, h, r, D_v]."""
    return rows_of.per_key_head(a, v[:, :, : a.shape[-1]], kv)
