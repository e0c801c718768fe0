"""ACT: in chosen heads, take attention from later sinks and give it to the rest of the row (arXiv 2406.15765)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infer_patch.column_sums import ColumnSums, lower_newest_row, newest_rows
from infer_patch.errors import UnsupportedCallError, UnsupportedModelError
from infer_patch.head_lists import HeadList, is_number, read_heads
from infer_patch.kernels import row_attention as rows_of
from infer_patch.kernels.calibrated_attention import lower_columns, lowered_probabilities
from infer_patch.kernels.calibrated_row import running_row
from infer_patch.kernels.sink_candidates import SinkRule, are_few
from infer_patch.method import Method, Runtime, option, register
from infer_patch.row_edits import attended, edited_rows
from infer_patch.selection import plain_attention_layers

_REMEDY = "Make one with `infer-patch calibrate act`, or give `heads` as (layer, head) pairs."


@register("act")
@dataclass(frozen=True, kw_only=True)
class ACT(Method):
    """Keys that receive unusually much attention lose a share of it; the rest of each row gains that, in proportion.

    The first token draws much attention in nearly every model, harmlessly. Later tokens that do the same often hurt. In
    the heads it is given, ACT finds keys whose mean received attention is above a threshold, leaves the first of them
    alone, and multiplies the others by `beta`. Beside the cache, the column sums of those heads are kept and what rows
    that come one by one need.

    The sinks of a prompt are found from all its rows at once, so early rows depend on later tokens. A row that comes
    later (decoding, a draft, a second turn, a further chunk of a prompt) is corrected by the rows so far; rows that
    were computed before it are not revisited. So a prompt in chunks does not give quite what it gives whole.

    Parameters
    ----------
    heads_file : str
        JSON file with the heads to act on: that of `infer-patch calibrate act`, or a published list (its first row is
        layer 2). A bare name that is no file here is looked for among those that ship with the package.
    heads : tuple of (int, int)
        Layer and head, pair by pair, instead of a file.
    beta : float
        Share of its attention that a sink keeps, 0 to 1. 1 changes nothing.
    threshold : float
        Of a key's mean received attention: as it is ("absolute"), or in units of 1 / T for T keys ("relative").
    threshold_mode : {"absolute", "relative"}
        The released code takes 0.1 absolute (0.15 for open-ended chat); the paper 5 / T.
    spare : {"first_detected", "first_token"}
        Which sink is left alone: the first one found (released code), or token 0 and no other.
    min_queries : int
        Keys that fewer rows see are never sinks; with 1, the newest tokens can be.
    decode : {"running", "frozen", "off"}
        Rows after the first call: sinks from all rows so far; the sinks of the prompt; or plain attention.

    References
    ----------
    Yu et al., "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training
    through Attention Calibration", arXiv 2406.15765, ICML 2024.
    """

    heads_file: str = option("", "JSON file with the heads, made by `infer-patch calibrate act`")
    heads: tuple[tuple[int, int], ...] = option((), "(layer, head) pairs instead of a file")
    beta: float = option(0.4, "share of its attention that a sink keeps")
    threshold: float = option(0.1, "mean received attention above which a key is a sink")
    threshold_mode: str = option("absolute", "threshold as it is, or in units of 1/T: absolute, relative")
    spare: str = option("first_detected", "the sink that is left alone: first_detected, first_token")
    min_queries: int = option(1, "keys that fewer rows see are no sinks")
    decode: str = option("running", "rows after the prompt: running, frozen, off")

    ports = ("calibrate",)
    paper = "arXiv 2406.15765"
    calibration_order = 3
    summary = "take attention from later sinks in chosen heads"
    artifact = "a head list (infer-patch calibrate act)"

    def validate(self) -> None:
        pairs = tuple(tuple(pair) if isinstance(pair, (list, tuple)) else pair for pair in self.heads)
        good = all(isinstance(p, tuple) and len(p) == 2 and all(is_number(x) for x in p) for p in pairs)
        self.require(good, f"heads are (layer, head) pairs of numbers from 0 up, got {self.heads!r}")
        object.__setattr__(self, "heads", tuple(sorted(set(pairs))))
        given = isinstance(self.heads_file, str) and bool(self.heads_file) != bool(self.heads)
        self.require(
            given, f"give heads_file or heads, one of them, got {self.heads_file!r} and {self.heads!r}. {_REMEDY}"
        )
        self.require_numbers("beta", "threshold")
        self.require(0 <= self.beta <= 1, f"beta is a share, from 0 to 1, got {self.beta}")
        self.require(self.threshold >= 0, f"threshold must be 0 or more, got {self.threshold}")
        whole = is_number(self.min_queries) and self.min_queries >= 1
        self.require(whole, f"min_queries must be a whole number, 1 or more, got {self.min_queries!r}")
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            self.require(value in known, f"{name} must be one of {', '.join(known)}, got {value!r}")

    def head_list(self) -> HeadList:
        """The heads to act on; raises `PlanError` for a file that cannot be read or names none."""
        found = HeadList.of(self.heads) if self.heads else read_heads(self.heads_file, self.name, _REMEDY)
        self.require(bool(found.heads), f"the head list {self.heads_file} names no head. {_REMEDY}")
        return found

    def applicable_layers(self, parts: Any) -> tuple[int, ...]:
        found = self.head_list()
        found.check(self.name, parts.num_layers, parts.num_heads, self.heads_file or "heads")
        possible = plain_attention_layers(self.name, parts)
        windowed = [layer for layer in found.heads if layer not in possible]
        if windowed:
            raise UnsupportedModelError(
                f"{self.name}: heads of layers {windowed} are listed, which have an attention window of their own in "
                f"{parts.model_type}. Take them out of the list."
            )
        return tuple(found.heads)

    def runtime(self, parts: Any, layers: tuple[int, ...]) -> Runtime:
        return _ACT(self, parts, layers)


_CHOICES = {
    "threshold_mode": ("absolute", "relative"),
    "spare": ("first_detected", "first_token"),
    "decode": ("running", "frozen", "off"),
}


def received_attention(sums: Tensor, rows: Tensor) -> Tensor:
    """c_j, the mean attention a key receives from the rows that see it: sums [..., S] over row counts [..., S]."""
    return sums / rows.clamp(min=1)


def find_sinks(received: Tensor, rows: Tensor, threshold: float | Tensor, min_queries: int = 1) -> Tensor:
    """S: bool like received [..., S], keys above the threshold that at least `min_queries` of rows [..., S] see."""
    return (received > threshold) & (rows >= min_queries)


def without_spared(sinks: Tensor, spare: str = "first_detected") -> Tensor:
    """S': the sinks [..., S] to calibrate, without the one that is left alone."""
    if spare == "first_token":
        return sinks & (torch.arange(sinks.shape[-1], device=sinks.device) > 0)
    return sinks & (sinks.cumsum(-1) > 1)


def _wants_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class _ACT(Runtime):
    config: ACT
    reads_lse = True

    def __init__(self, config: ACT, parts: Any, layers: tuple[int, ...]):
        super().__init__(config, parts, layers)
        group = parts.num_heads // parts.num_kv_heads
        listed = config.head_list().heads
        self.heads = {layer: listed[layer] for layer in layers}
        self.kv = {layer: tuple(h // group for h in heads) for layer, heads in self.heads.items()}
        self._rule = SinkRule(config.beta, config.spare, config.min_queries)
        self._indices: dict[Any, tuple[Tensor, ...]] = {}

    def calibrate(self, layer: int, call: Any, output: Tensor) -> Tensor | str:
        config = self.config
        if config.beta == 1:
            return "beta is 1"
        if call.past and config.decode == "off":
            return "rows after the prompt are left as they are: decode is off"
        known: list[ColumnSums] = []
        if call.past:
            held = [memory.pop(self.key, None) for memory in call.memory]
            known = [self._cropped(x, call, i, layer) for i, x in enumerate(held) if x is not None]
            if len(known) < len(held) or any(x.rows != call.past for x in known):
                return "not all rows so far were read under this plan"
        single = call.q.shape[2] == 1 and not call.edits and not _wants_gradients(call.q, output)
        threshold, on_cpu = self._threshold(call.k.shape[2]), output.device.type == "cpu"
        if known and single and on_cpu and config.decode == "running" and are_few(threshold, call.k.shape[2]):
            row = lower_newest_row(call, output, known, self.heads[layer], self.kv[layer], threshold, self._rule)
            for memory, kept in zip(call.memory, row.kept):
                memory[self.key] = kept
            call.counts["rows"] = row.rows
            return row.output
        heads, _ = self._index(layer, output.device)
        q, chosen = call.q.index_select(1, heads), output.index_select(1, heads)
        if call.past == 0:
            found = self._prompt(layer, call, q, chosen)
            if found is None:
                return "no sink but the one that is left alone"
            new, call.counts["rows"] = found
        elif config.decode == "frozen":
            new, call.counts["rows"] = self._frozen(layer, call, q, chosen, known)
        elif single:
            new, call.counts["rows"] = self._step_by_all_keys(layer, call, q, chosen, known)
        else:
            new, call.counts["rows"] = self._running(layer, call, q, chosen, known)
        return output.index_copy(1, heads, new)

    def _index(self, layer: int, device: torch.device) -> tuple[Tensor, ...]:
        """The chosen query heads of a layer, and the key head of each."""
        if (layer, device) not in self._indices:
            with torch.inference_mode(False):  # they may serve calls with gradients later
                self._indices[layer, device] = torch.tensor([self.heads[layer], self.kv[layer]], device=device).unbind()
        return self._indices[layer, device]

    def _threshold(self, keys: Any) -> Any:
        return self.config.threshold / (keys if self.config.threshold_mode == "relative" else 1)

    def _known_lse(self, layer: int, call: Any) -> Tensor | None:
        """Log-sum-exp of the chosen heads' rows, [b, h, T], if the model's own attention told it."""
        return None if call.lse is None else call.lse.index_select(1, self._index(layer, call.lse.device)[0])

    def _edited(self, layer: int, call: Any, q: Tensor) -> Iterator[tuple[slice, Tensor]]:
        return edited_rows(q, call.k, self.heads[layer], self.kv[layer], call.scale, call.edits)

    def _prompt(self, layer: int, call: Any, q: Tensor, output: Tensor) -> tuple[Tensor, Tensor] | None:
        """Every row of a prompt by all of them; None where no column is to be lowered."""
        config, kv, keys = self.config, self.kv[layer], call.k.shape[2]
        lse = last = None
        if call.edits:
            sums = torch.zeros(*q.shape[:2], keys, device=q.device)
            for _, a in self._edited(layer, call, q):
                last = newest_rows(last, a.detach())
                sums[:, :, : a.shape[-1]] += a.detach().sum(2)
        else:
            lse, sums = rows_of.lse_and_column_sums(q, call.k, kv, call.scale, self._known_lse(layer, call))
        seen_by = torch.arange(keys, 0, -1, device=q.device)
        sinks = find_sinks(received_attention(sums, seen_by), seen_by, self._threshold(keys), config.min_queries)
        listed = without_spared(sinks, config.spare)
        call.counts["calibrated_columns"] = listed.sum()
        nothing = [ColumnSums.none(frozen) for frozen in listed]
        if config.decode == "running":
            self._keep(call, nothing, q, sums, lse, last)
        elif config.decode == "frozen":
            for memory, held in zip(call.memory, nothing):
                memory[self.key] = held.only_counted(keys)
        if not bool(listed.any()):
            return None
        if not call.edits:
            new, rows = lower_columns(output, q, call.k, call.v, kv, listed, config.beta, call.scale, lse)
            return new, rows.sum()
        return self._lowered(layer, call, q, output, listed)

    def _lowered(self, layer: int, call: Any, q: Tensor, output: Tensor, listed: Tensor) -> tuple[Tensor, Tensor]:
        """The columns `listed` [b, h, S] of edited rows lowered."""
        parts, count = [], torch.zeros((), dtype=torch.long, device=q.device)
        for here, a in self._edited(layer, call, q):
            lowered, rows = lowered_probabilities(a, listed[:, :, None, : a.shape[-1]], self.config.beta)
            new = attended(lowered, call.v, self.kv[layer]).to(output.dtype)
            parts.append(torch.where(rows[..., None], new, output[:, :, here]))
            count = count + rows.sum()
        return torch.cat(parts, 2), count

    def _step_by_all_keys(
        self, layer: int, call: Any, q: Tensor, output: Tensor, known: list[ColumnSums]
    ) -> tuple[Tensor, Tensor]:
        """One row of each sample by all keys: on other devices, and where most keys can be sinks soon."""
        config, kv, index = self.config, self.kv[layer], self._index(layer, q.device)[1]
        known = [x.settled(call.k[i, :, : call.past], kv, call.scale) for i, x in enumerate(known)]
        sums = known[0].sums[None] if len(known) == 1 else torch.stack([x.sums for x in known])
        rule = self._threshold(call.k.shape[2]), config.spare, config.min_queries, config.beta, call.scale
        new, changed, sums, lse = running_row(output, q, call.k, call.v, sums, kv, index, *rule)
        self._keep(call, known, q, sums, lse, None)
        return new, changed.sum()

    def _running(
        self, layer: int, call: Any, q: Tensor, output: Tensor, known: list[ColumnSums]
    ) -> tuple[Tensor, Tensor]:
        """Every row by the column sums up to it, as if the rows came one by one."""
        config, kv, count = self.config, self.kv[layer], q.shape[2]
        known = [x.settled(call.k[i, :, : call.past], kv, call.scale) for i, x in enumerate(known)]
        sums = F.pad(torch.stack([x.sums for x in known]), (0, count))
        parts, last = [], None
        changed = torch.zeros((), dtype=torch.long, device=q.device)
        for here, a in self._edited(layer, call, q):
            visible = a.shape[-1]
            last = newest_rows(last, a.detach()) if call.edits else None
            so_far = sums[:, :, None, :visible] + a.detach().cumsum(2)
            number = torch.arange(visible - a.shape[2] + 1, visible + 1, device=q.device)[:, None]  # keys a row sees
            seen_by = number - torch.arange(visible, device=q.device)
            received = received_attention(so_far, seen_by)
            sinks = find_sinks(received, seen_by, self._threshold(number), config.min_queries)
            listed, plain = without_spared(sinks, config.spare), output[:, :, here]
            if bool(listed.any()):
                lowered, rows = lowered_probabilities(a, listed, config.beta)
                plain = torch.where(rows[..., None], attended(lowered, call.v, kv).to(output.dtype), plain)
                changed = changed + rows.sum()
            parts.append(plain)
            sums[:, :, :visible] = so_far[:, :, -1]
        lse = None if call.edits else self._known_lse(layer, call)
        if lse is None and not call.edits:
            lse = rows_of.row_lse(q.detach(), call.k.detach(), kv, call.scale)
        self._keep(call, known, q, sums, lse, last)
        return torch.cat(parts, 2), changed

    def _frozen(
        self, layer: int, call: Any, q: Tensor, output: Tensor, known: list[ColumnSums]
    ) -> tuple[Tensor, Tensor]:
        """Every row by the sinks of the prompt."""
        keys, kv = call.k.shape[2], self.kv[layer]
        listed = torch.stack([F.pad(x.frozen, (0, keys - x.frozen.shape[-1])) for x in known])
        for memory, held in zip(call.memory, known):
            memory[self.key] = held.only_counted(keys)
        if call.edits:
            return self._lowered(layer, call, q, output, listed)
        lse = self._known_lse(layer, call)
        new, rows = lower_columns(output, q, call.k, call.v, kv, listed, self.config.beta, call.scale, lse)
        return new, rows.sum()

    def _keep(
        self, call: Any, known: Sequence[ColumnSums], q: Tensor, sums: Tensor, lse: Tensor | None, last: Tensor | None
    ) -> None:
        for i, (memory, held) in enumerate(zip(call.memory, known)):
            if lse is None and last is not None:
                memory[self.key] = held.with_edited_rows(q.shape[2], last[i], sums[i])
            elif lse is not None:
                memory[self.key] = held.with_rows(q[i], lse[i], sums[i])

    def _cropped(self, held: ColumnSums, call: Any, sample: int, layer: int) -> ColumnSums:
        """Without what rows added that were taken back since."""
        if held.rows <= call.past:
            return held
        newest = held.rows - call.past
        if self.config.decode == "frozen":
            return held.only_counted(call.past)
        left = held.without(newest, call.k[sample, :, : call.past], self.kv[layer], call.scale)
        if left is None:
            raise UnsupportedCallError(
                f"{newest} tokens were taken back from the cache, and act knows the newest {held.known} rows only. "
                "Start again from the prompt, or patch with decode='off'."
            )
        return left
