"""ACT: in chosen heads, take attention from later sinks and give it to the rest of the row (arXiv 2406.15765)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from infer_patch.errors import UnsupportedCallError, UnsupportedModelError
from infer_patch.head_lists import HeadList, is_number, read_heads
from infer_patch.kernels import row_attention as rows_of
from infer_patch.kernels.calibrated_attention import lower_columns, lowered_probabilities
from infer_patch.kernels.calibrated_row import lower_row, running_row
from infer_patch.method import Method, Runtime, option, register
from infer_patch.selection import plain_attention_layers

RECENT = 256  # rows that can be taken back (crop) at least
_PIECES = 8  # calls whose rows are kept apart
_REMEDY = "Make one with `infer-patch calibrate act`, or give `heads` as (layer, head) pairs."


@register("act")
@dataclass(frozen=True, kw_only=True)
class ACT(Method):
    """Keys that receive unusually much attention lose a share of it; the rest of each row gains that, in proportion.

    The first token draws much attention in nearly every model, harmlessly. Later tokens that do the same often hurt. In
    the heads it is given, ACT finds keys whose mean received attention is above a threshold, leaves the first of them
    alone, and multiplies the others by `beta`. Nothing is added to the cache but the column sums of those heads.

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
        self.require(0 <= self.beta <= 1, f"beta is a share, from 0 to 1, got {self.beta}")
        self.require(self.threshold >= 0, f"threshold must be 0 or more, got {self.threshold}")
        self.require(self.min_queries >= 1, f"min_queries must be 1 or more, got {self.min_queries}")
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


def calibrate_rows(a: Tensor, calibrated: Tensor, beta: float) -> Tensor:
    """A' from probabilities [b, h, T, S] and S', bool [b, h, S]: beta A on S', A (1 + w / (1 - b)) elsewhere,
    with b the row's mass on S' and w = (1 - beta) b. A row with nothing elsewhere is left as it is."""
    return lowered_probabilities(a, calibrated[:, :, None], beta)[0]


def _wants_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class _Columns(NamedTuple):
    """What is kept of one sample in one layer: column sums [h, S] of all rows so far; queries [h, t, D] and LSE [h, t]
    of recent rows, which tell what a row that is taken back had added; and S' of the prompt for `frozen`, [h, S']."""

    sums: Tensor
    recent: tuple[tuple[Tensor, ...], ...]
    frozen: Tensor


class _ACT(Runtime):
    config: ACT

    def __init__(self, config: ACT, parts: Any, layers: tuple[int, ...]):
        super().__init__(config, parts, layers)
        group = parts.num_heads // parts.num_kv_heads
        listed = config.head_list().heads
        self.heads = {layer: listed[layer] for layer in layers}
        self._indices: dict[Any, tuple[Tensor, ...]] = {}
        self._seen_by = torch.empty(0)
        self.kv = {layer: tuple(h // group for h in heads) for layer, heads in self.heads.items()}

    def calibrate(self, layer: int, call: Any, output: Tensor) -> Tensor | str:
        config = self.config
        if config.beta == 1:
            return "beta is 1"
        if call.past and config.decode == "off":
            return "rows after the prompt are left as they are: decode is off"
        heads = self._index(layer, output.device)[0]
        q, chosen = call.q.index_select(1, heads), output.index_select(1, heads)
        if call.past == 0:
            new, rows = self._prompt(layer, call, q, chosen)
        else:
            held = [memory.pop(self, None) for memory in call.memory]
            known = [self._cropped(x, call, i, layer) for i, x in enumerate(held) if x is not None]
            if len(known) < len(held) or any(x.sums.shape[-1] != call.past for x in known):
                return "not all rows so far were read under this plan"
            later = self._frozen if config.decode == "frozen" else self._running
            if later == self._running and q.shape[2] == 1 and not _wants_gradients(call.q, output):
                later = self._step
            new, rows = later(layer, call, q, chosen, known)
        call.counts["rows"] = rows.sum()
        return output.index_copy(1, heads, new)

    def _index(self, layer: int, device: torch.device) -> tuple[Tensor, ...]:
        """The chosen query heads of a layer, and the key head of each."""
        if (layer, device) not in self._indices:
            with torch.inference_mode(False):  # they may serve calls with gradients later
                self._indices[layer, device] = torch.tensor([self.heads[layer], self.kv[layer]], device=device).unbind()
        return self._indices[layer, device]

    def _threshold(self, keys: Any) -> Any:
        return self.config.threshold / (keys if self.config.threshold_mode == "relative" else 1)

    def _prompt(self, layer: int, call: Any, q: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        config, keys = self.config, call.k.shape[2]
        lse, sums = rows_of.lse_and_column_sums(q, call.k, self.kv[layer], call.scale)
        seen_by = torch.arange(keys, 0, -1, device=q.device)
        sinks = find_sinks(received_attention(sums, seen_by), seen_by, self._threshold(keys), config.min_queries)
        listed = without_spared(sinks, config.spare)
        call.counts["calibrated_columns"] = listed.sum()
        self._keep(call, sums, (), q, lse, listed)
        return lower_columns(output, q, call.k, call.v, self.kv[layer], listed, config.beta, call.scale, lse)

    def _step(self, layer: int, call: Any, q: Tensor, output: Tensor, known: list[_Columns]) -> tuple[Tensor, Tensor]:
        """What `_running` does, for one row of each sample: every operation counts here."""
        config, kv, keys = self.config, self.kv[layer], call.k.shape[2]
        if q.is_cuda:
            sums = known[0].sums[None] if len(known) == 1 else torch.stack([x.sums for x in known])
            rule = self._threshold(keys), config.spare, config.min_queries, config.beta, call.scale
            index = self._index(layer, q.device)[1]
            new, changed, sums, lse = running_row(output, q, call.k, call.v, sums, kv, index, *rule)
            self._keep(call, sums, [x.recent for x in known], q, lse, [x.frozen for x in known])
            return new, changed
        a, lse = rows_of.newest_row(q, call.k, kv, call.scale)
        sums = a.clone()
        sums[..., :-1].add_(known[0].sums if len(known) == 1 else torch.stack([x.sums for x in known]))
        seen_by = self._seen_by
        if len(seen_by) != keys or seen_by.device != q.device:
            self._seen_by = seen_by = torch.arange(keys, 0, -1, dtype=torch.float32, device=q.device)  # for every layer
        sinks = sums / seen_by > self._threshold(keys)
        if config.min_queries > 1:
            sinks[..., 1 - config.min_queries :] = False
        if config.spare == "first_token":
            sinks[..., 0] = False
        else:
            sinks.scatter_(-1, sinks.view(torch.uint8).argmax(-1, keepdim=True), False)
        self._keep(call, sums, [x.recent for x in known], q, lse, [x.frozen for x in known])
        listed = sinks.flatten(0, 1).nonzero(as_tuple=True)
        if len(listed[0]) == 0:
            return output, torch.zeros_like(lse, dtype=torch.bool)
        return lower_row(output, a, call.v, kv, self._index(layer, q.device)[1], listed, config.beta)

    def _running(
        self, layer: int, call: Any, q: Tensor, output: Tensor, known: list[_Columns]
    ) -> tuple[Tensor, Tensor]:
        """Every row by the column sums up to it, as if the rows came one by one."""
        config, kv, (batch, heads, count, _) = self.config, self.kv[layer], q.shape
        sums = F.pad(torch.stack([x.sums for x in known]), (0, count))
        parts, changed, lses = [], [], []
        for here in rows_of.row_blocks(batch, heads, count, call.k.shape[2], q.device):
            z = rows_of.scores(q[:, :, here], call.k, kv, call.scale, call.past + here.start)
            lse = z.logsumexp(-1, keepdim=True)
            a, visible = (z - lse).exp(), z.shape[-1]
            so_far = sums[:, :, None, :visible] + a.detach().cumsum(2)
            number = torch.arange(visible - z.shape[2] + 1, visible + 1, device=q.device)[:, None]  # keys a row sees
            seen_by = number - torch.arange(visible, device=q.device)
            received = received_attention(so_far, seen_by)
            sinks = find_sinks(received, seen_by, self._threshold(number), config.min_queries)
            listed, plain = without_spared(sinks, config.spare), output[:, :, here]
            rows = torch.zeros_like(lse[..., 0], dtype=torch.bool)
            if bool(listed.any()):
                lowered, rows = lowered_probabilities(a, listed, config.beta)
                new = rows_of.per_key_head(lowered, call.v[:, :, :visible], kv).to(output.dtype)
                plain = torch.where(rows[..., None], new, plain)
            parts.append(plain)
            changed.append(rows)
            lses.append(lse.squeeze(-1))
            sums[:, :, :visible] = so_far[:, :, -1]
        self._keep(call, sums, [x.recent for x in known], q, torch.cat(lses, 2), [x.frozen for x in known])
        return torch.cat(parts, 2), torch.cat(changed, 2)

    def _frozen(self, layer: int, call: Any, q: Tensor, output: Tensor, known: list[_Columns]) -> tuple[Tensor, Tensor]:
        """Every row by the sinks of the prompt."""
        keys = call.k.shape[2]
        listed = torch.stack(
            [F.pad(x.frozen[:, : call.past], (0, keys - min(x.frozen.shape[-1], call.past))) for x in known]
        )
        sums = F.pad(torch.stack([x.sums for x in known]), (0, q.shape[2]))  # their length counts the rows so far
        lse = rows_of.row_lse(q.detach(), call.k.detach(), self.kv[layer], call.scale)
        self._keep(call, sums, [x.recent for x in known], q, lse, [x.frozen[:, : call.past] for x in known])
        return lower_columns(output, q, call.k, call.v, self.kv[layer], listed, self.config.beta, call.scale, lse)

    def _keep(self, call: Any, sums: Tensor, recent: Any, q: Tensor, lse: Tensor, frozen: Any) -> None:
        if q.shape[2] > RECENT:
            q, lse = q[:, :, -RECENT:].clone(), lse[:, :, -RECENT:].clone()
        q, lse = q.detach(), lse.detach()
        for i, memory in enumerate(call.memory):
            rows = (*(recent[i] if recent else ()), (q[i], lse[i]))
            if len(rows) > _PIECES:
                rows = (tuple(torch.cat(x, 1)[:, -RECENT:] for x in zip(*rows)),)
            memory[self] = _Columns(sums[i], rows, frozen[i])

    def _cropped(self, held: _Columns, call: Any, sample: int, layer: int) -> _Columns:
        """Without what rows added that were taken back since."""
        remove = held.sums.shape[-1] - call.past
        if remove <= 0:
            return held
        q, lse = (torch.cat(x, 1) for x in zip(*held.recent))
        if remove > q.shape[1]:
            raise UnsupportedCallError(
                f"{remove} tokens were taken back from the cache, and act knows the newest {q.shape[1]} rows only. "
                "Start again from the prompt, or patch with decode='off'."
            )
        sums, kept = held.sums[:, : call.past], q.shape[1] - remove
        if self.config.decode == "running":
            k = call.k[sample : sample + 1, :, : call.past].transpose(-1, -2)
            z = call.scale * rows_of.per_key_head(q[None, :, kept:].float(), k, self.kv[layer])
            sums = (sums - (z - lse[None, :, kept:, None]).exp().sum(2)[0]).clamp(min=0)
        return _Columns(sums, ((q[:, :kept], lse[:, :kept]),), held.frozen[:, : call.past])
