"""What ACT keeps of one sample in one layer: how much every key has received, in a form that rows can leave again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from infer_patch.kernels import row_attention as rows_of
from infer_patch.kernels.calibrated_attention import LARGEST_FACTOR, lowered_probabilities
from infer_patch.kernels.sink_candidates import SinkCandidates, SinkRule

if TYPE_CHECKING:
    from infer_patch.run import AttentionCall

RECENT = 256  # rows that can be taken back (crop) at least
RECENT_EDITED = 32  # the same where probabilities themselves are kept
PIECES = 8  # calls whose rows are kept apart


class ColumnSums(NamedTuple):
    """Column sums of the chosen heads of one sample.

    Parameters
    ----------
    rows : int
        Rows so far, as many as keys.
    sums : float32 Tensor [h, n]
        What each key received from the first n rows. The others are among the recent ones and wait to be added.
    frozen : bool Tensor [h, m]
        Keys of the prompt that are lowered.
    recent : tuple of (Tensor [h, t, D], float32 Tensor [h, t])
        Queries and LSE of the newest rows, call by call: they tell what a row had added.
    edited : tuple of float32 Tensor [h, t, n]
        In place of that, the probabilities of the newest rows, where another method had changed them before.
    candidates : SinkCandidates, optional
        The keys that can be sinks next, where rows come one by one. They belong to whoever has counted as many rows:
        samples that were one (beams) may share them until one of them goes on.
    """

    rows: int
    sums: Tensor
    frozen: Tensor
    recent: tuple[tuple[Tensor, Tensor], ...] = ()
    edited: tuple[Tensor, ...] = ()
    candidates: SinkCandidates | None = None

    @classmethod
    def none(cls, frozen: Tensor) -> ColumnSums:
        """Before the first row."""
        return cls(0, torch.empty(len(frozen), 0, device=frozen.device), frozen)

    @property
    def waiting(self) -> int:
        """Rows that are not in `sums` yet."""
        return self.rows - self.sums.shape[-1]

    @property
    def known(self) -> int:
        """Newest rows that can be taken back."""
        return sum(lse.shape[1] for _, lse in self.recent) or sum(a.shape[1] for a in self.edited)

    def with_rows(self, q: Tensor, lse: Tensor, sums: Tensor, candidates: SinkCandidates | None = None) -> ColumnSums:
        """After rows with queries q [h, t, D] and LSE [h, t]; `sums` may leave them out, to be added later."""
        rows, before = self.rows + q.shape[1], self.recent
        if q.shape[1] > RECENT:
            q, lse, before = q[:, -RECENT:].clone(), lse[:, -RECENT:].clone(), ()
        recent = (*before, (q.detach(), lse.detach()))
        if len(recent) > PIECES:
            recent = (_newest(recent, RECENT),)
        return self._replace(rows=rows, sums=sums, recent=recent, edited=(), candidates=candidates)

    def with_edited_rows(self, count: int, newest: Tensor, sums: Tensor) -> ColumnSums:
        """After `count` rows that an earlier method had changed; the last of them are newest [h, t, S]."""
        edited = (*(self.edited if newest.shape[1] == count else ()), newest)
        while sum(a.shape[1] for a in edited[1:]) >= RECENT_EDITED:
            edited = edited[1:]
        return self._replace(rows=self.rows + count, sums=sums, recent=(), edited=edited, candidates=None)

    def only_counted(self, rows: int) -> ColumnSums:
        """At `rows` rows, whatever there was, for whom only the sinks of the prompt count."""
        return ColumnSums.none(self.frozen[:, :rows])._replace(rows=rows)

    def settled(self, k: Tensor, kv: tuple[int, ...], scale: float) -> ColumnSums:
        """With every row in `sums`; k [H_kv, rows, D] are the keys so far."""
        count = self.waiting
        if count == 0:
            return self._replace(candidates=None)
        q, lse = _newest(self.recent, count)
        z = rows_of.scores(q[None], k.detach()[None], kv, scale, self.rows - count)[0]
        sums = F.pad(self.sums, (0, count)) + (z - lse[..., None]).exp().sum(1)
        return self._replace(sums=sums, candidates=None)

    @property
    def is_ready(self) -> bool:
        """Whether there are candidates for one more row, and they are this sample's."""
        found = self.candidates
        return found is not None and found.rows == self.rows and not found.is_used_up

    def with_candidates(self, k: Tensor, v: Tensor, kv: tuple[int, ...], scale: float, threshold: float) -> ColumnSums:
        """With candidates chosen anew. k, v [H_kv, rows or more, D]."""
        settled = self.settled(k[:, : self.rows], kv, scale)
        return settled._replace(candidates=SinkCandidates(settled.sums, k, v, kv, threshold))

    def without(self, newest: int, k: Tensor, kv: tuple[int, ...], scale: float) -> ColumnSums | None:
        """Before the `newest` rows, which were taken back; None if not all are known. k [H_kv, rows left, D]."""
        known, rows = self.known, self.rows - newest
        if newest > known:
            return None
        if self.edited:
            a = torch.cat([F.pad(x, (0, self.rows - x.shape[-1])) for x in self.edited], 1)
            sums = self.sums[:, :rows] - a[:, known - newest :, :rows].sum(1)
            left: tuple[Tensor, ...] = (a[:, : known - newest, :rows],)
            return self._replace(rows=rows, sums=sums.clamp(min=0), edited=left, frozen=self.frozen[:, :rows])
        q, lse = _newest(self.recent, known)
        sums, added = self.sums, newest - self.waiting
        if added > 0:
            here = slice(known - newest, known - newest + added)
            z = scale * rows_of.per_key_head(q[None, :, here].float(), k.detach()[None].transpose(-1, -2), kv)[0]
            sums = (sums[:, :rows] - (z - lse[:, here, None]).exp().sum(1)).clamp(min=0)
        recent = ((q[:, : known - newest], lse[:, : known - newest]),)
        return self._replace(rows=rows, sums=sums, recent=recent, frozen=self.frozen[:, :rows], candidates=None)


def newest_rows(before: Tensor | None, a: Tensor) -> Tensor:
    """The newest `RECENT_EDITED` rows: of those before [b, h, t, S], and of the block a [b, h, r, S'] after them."""
    if before is not None and a.shape[2] < RECENT_EDITED:
        a = torch.cat([F.pad(before, (0, a.shape[-1] - before.shape[-1])), a], 2)
    return a[:, :, -RECENT_EDITED:].clone()


class LoweredRow(NamedTuple):
    """The whole output [b, H, 1, D_v], how many of its rows differ from the plain one, and what is kept by sample."""

    output: Tensor
    rows: int
    kept: list[ColumnSums]


def lower_newest_row(
    call: AttentionCall,
    output: Tensor,
    known: Sequence[ColumnSums],
    heads: Sequence[int],
    kv: tuple[int, ...],
    threshold: float,
    rule: SinkRule,
) -> LoweredRow:
    """ACT on one new row of each sample, by the few keys that can be sinks: decoding on CPUs, without gradients.

    output [b, H, 1, D_v] is the plain attention of the call; `heads` are the chosen query heads, `kv` the key head of
    each. numpy throughout: every small operation counts.
    """
    q, k, v, scale, chosen = call.q, call.k, call.v, call.scale, list(heads)
    corrected = output.to(torch.float32, copy=True)
    new, queries = corrected.numpy(), q.float().numpy()
    if call.lse is None:
        lses = rows_of.row_lse(q[:, chosen], k, kv, scale).numpy()[..., 0]
    else:
        lses = call.lse.numpy()[:, chosen, 0]
    own_k, own_v = (x[:, :, -1].float().numpy() for x in (k, v))
    limit, count, kept = LARGEST_FACTOR.get(output.dtype, 4.0), 0, []
    for i, held in enumerate(known):
        if not held.is_ready:
            held = held.with_candidates(k[i], v[i], kv, scale, threshold)
        row, query, own_lse = new[i, chosen, 0], queries[i, chosen, 0], lses[i]
        candidates = cast(SinkCandidates, held.candidates)
        factors = candidates.lowered_row(row, scale * query, own_k[i, kv], own_v[i, kv], own_lse, threshold, rule)
        if factors.max() > 1:
            new[i, chosen, 0] = row
        count += int((factors > 1).sum())
        for head in (factors > limit).nonzero()[0].tolist():  # nearly all is on listed keys: not from the plain output
            here = i, chosen[head]
            z = scale * (k[i, kv[head]].float() @ q[here][0].float()) - lses[i, head].item()
            a, changed = lowered_probabilities(z.exp()[None], candidates.listed(head), rule.beta)
            corrected[here] = a @ v[i, kv[head]].float() if changed else output[here].float()
            count -= int(not changed)
        recent = torch.from_numpy(query)[:, None], torch.from_numpy(own_lse)[:, None]
        kept.append(held.with_rows(*recent, held.sums, candidates))
    return LoweredRow(corrected.to(output.dtype), count, kept)


def _newest(pieces: Iterable[tuple[Tensor, Tensor]], rows: int) -> tuple[Tensor, Tensor]:
    """The newest `rows` rows, joined."""
    q, lse = (torch.cat(x, 1) for x in zip(*pieces))
    return cast("tuple[Tensor, Tensor]", (q[:, max(q.shape[1] - rows, 0) :], lse[:, max(lse.shape[1] - rows, 0) :]))
