"""VAR: give the attention that sinks take back to the picture (arXiv 2503.03321)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from infer_patch.errors import PlanError, UnsupportedModelError
from infer_patch.head_lists import is_number
from infer_patch.kernels.image_shift import (
    ImageRule,
    VisualKeys,
    reference_shifted,
    shift_row,
    shift_to_images,
    shifted_probabilities,
)
from infer_patch.kernels.row_attention import key_heads, row_lse
from infer_patch.method import Method, Runtime, option, register
from infer_patch.row_edits import RowEdit, attended, edited_rows
from infer_patch.selection import plain_attention_layers

FIRST_LAYER = 2  # in layers 0 and 1 no token is a sink
_REMEDY = "Find them with `infer-patch calibrate var`, or give `dims`."


@register("var")
@dataclass(frozen=True, kw_only=True)
class VAR(Method):
    """In rows that look at the picture, sinks lose a share of their attention to the other visual tokens.

    Some visual tokens carry a huge value in the same few hidden dimensions as the first token, draw much attention and
    hold almost nothing. Layer by layer, in prefill, tokens whose residual stream is that large there are sinks. A row
    of a head, of the text behind the pictures, is edited if enough of its attention is on visual tokens and enough of
    that on tokens that are no sinks; so is every row while generating. Nothing is written to the cache.

    Models without such values in their residual stream have no sinks: then nothing is edited, and the report says so.

    Parameters
    ----------
    dims : tuple of int
        Hidden dimensions in which sinks are large: 1415 and 2533 in LLaVA-1.5-7B, 2100 and 4743 in LLaVA-1.5-13B.
    dims_file : str
        Instead: the JSON file of `infer-patch calibrate var`.
    tau : float
        |x_d| / rms(x) above which a token is a sink, for any d of `dims`. Never above the square root of the width.
    nonsink_ratio_min : float
        Least share of a row's visual attention that lies on tokens that are no sinks. The paper takes 0.8 for general
        questions, 0.5 for hallucination, 0.9 for vision-centric ones. The release bounds the other share, rho = 0.5.
    vision_mass_min : float
        Least share of a row's attention that lies on visual tokens.
    move_fraction : float
        Share of the sinks' attention that is moved: 0.4 in the released code, 0.6 as the paper is read by others.
    skip_last_layer : bool
        Leave the last layer out, as in the paper; the released code meant to.

    References
    ----------
    Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv 2503.03321, ICLR 2025.
    """

    dims: tuple[int, ...] = option((), "hidden dimensions in which sinks are large")
    dims_file: str = option("", "JSON file with them, made by `infer-patch calibrate var`")
    tau: float = option(20.0, "|x_d| / rms(x) above which a token is a sink")
    nonsink_ratio_min: float = option(0.5, "least share of the visual attention that is on no sink")
    vision_mass_min: float = option(0.2, "least share of the attention that is on visual tokens")
    move_fraction: float = option(0.4, "share of the sinks' attention that is moved")
    skip_last_layer: bool = option(True, "leave the last layer out")

    ports = ("calibrate",)
    paper = "arXiv 2503.03321"
    calibration_order = 2
    summary = "give the attention of sinks to the other visual tokens"
    modality = "vision"
    artifact = "sink dimensions (infer-patch calibrate var)"

    def validate(self) -> None:
        good = isinstance(self.dims, tuple) and all(is_number(d) for d in self.dims)
        self.require(good, f"dims are numbers of hidden dimensions, from 0 up, got {self.dims!r}")
        given = isinstance(self.dims_file, str) and bool(self.dims_file) != bool(self.dims)
        self.require(given, f"give dims or dims_file, one of them, got {self.dims!r} and {self.dims_file!r}. {_REMEDY}")
        self.require_numbers("tau", "nonsink_ratio_min", "vision_mass_min", "move_fraction")
        self.require(self.tau > 0, f"tau must be above 0, got {self.tau}")
        for name in ("nonsink_ratio_min", "vision_mass_min", "move_fraction"):
            value = getattr(self, name)
            self.require(0 <= value <= 1, f"{name} is a share, from 0 to 1, got {value}")

    def sink_dims(self, width: int) -> tuple[int, ...]:
        """The hidden dimensions to look at, in a model of this width."""
        dims = self.dims or read_dims(self.dims_file)
        self.require(max(dims) < width, f"dimension {max(dims)} of a model with {width} hidden dimensions. {_REMEDY}")
        return dims

    def applicable_layers(self, parts: Any) -> tuple[int, ...]:
        if not parts.image_token_ids:
            raise UnsupportedModelError(
                f"var moves attention to visual tokens, and {parts.model_type} has none (no vision configuration with "
                "an image token id was found)."
            )
        self.sink_dims(parts.text_config.hidden_size)
        last = parts.num_layers - 1 if self.skip_last_layer else parts.num_layers
        layers = tuple(i for i in plain_attention_layers(self.name, parts) if FIRST_LAYER <= i < last)
        self.require(bool(layers), f"no layer between {FIRST_LAYER} and {last} attends to everything before it")
        return layers

    def runtime(self, parts: Any, layers: tuple[int, ...]) -> Runtime:
        return _VAR(self, parts, layers)


def read_dims(path: str | Path) -> tuple[int, ...]:
    """The `dims` of a JSON file; raises `PlanError` for anything else."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"var: cannot read {path}: {error.strerror or error}. {_REMEDY}") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise PlanError(f"var: {path} is not valid JSON ({error}). {_REMEDY}") from error
    dims = values.get("dims") if isinstance(values, dict) else None
    if not isinstance(dims, list) or not dims or not all(is_number(d) for d in dims):
        raise PlanError(f"var: {path} should hold an object with `dims`, numbers of hidden dimensions. {_REMEDY}")
    return tuple(dims)


def sink_activation(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """phi [..., T], fp32: max over dims d of |x_d| / rms(x), of the residual stream x [..., T, D]. At most sqrt(D)."""
    x = x.float()
    return x[..., list(dims)].abs().amax(-1) * torch.rsqrt(x.square().mean(-1) + 1e-6)


class _Seen(NamedTuple):
    """The tokens of one sample in one layer, as far as they were looked at: bool [n] each; those after are neither
    sinks nor visual. `reason`: why no row of it is edited; None where rows may be, on CPUs by `keys`."""

    sinks: Tensor
    visual: Tensor
    reason: str | None
    keys: VisualKeys | None


def _masks(seen: Sequence[_Seen], keys: int) -> tuple[Tensor, Tensor]:
    """Sinks and visual tokens among the first so many keys, bool [b, keys] each."""
    padded = [[F.pad(mask[:keys], (0, max(keys - len(mask), 0))) for mask in (x.sinks, x.visual)] for x in seen]
    sinks, visual = (torch.stack(masks) for masks in zip(*padded))
    return sinks, visual


def _before_last(visual: Tensor) -> Tensor:
    """Up to the last visual token of each row, it included: bool like visual [b, T]."""
    return (visual.flip(1).cumsum(1) > 0).flip(1)


def shifting(chosen: Tensor, seen: Sequence[_Seen], move: float) -> RowEdit:
    """What methods after this one find: rows chosen [b, H, T] with their attention moved."""

    def edit(a: Tensor, z: Tensor, heads: Sequence[int], rows: slice) -> Tensor:
        sinks, visual = _masks(seen, a.shape[-1])
        return torch.where(chosen[:, list(heads), rows, None], shifted_probabilities(a, sinks, visual, move), a)

    return edit


class _VAR(Runtime):
    config: VAR
    reads_images = True
    reads_lse = True

    def __init__(self, config: VAR, parts: Any, layers: tuple[int, ...]):
        super().__init__(config, parts, layers)
        self.watches = self.layers
        self.width = parts.text_config.hidden_size
        self.dims = config.sink_dims(self.width)
        self.rule = ImageRule(1 - config.nonsink_ratio_min, config.vision_mass_min, config.move_fraction)

    def watch(self, layer: int, hidden: Tensor, tokens: Any) -> None:
        starts = tokens.past == 0 or any(first >= tokens.past for first, _ in tokens.bounds or ())
        if not starts and tokens.image is None:
            return  # what is generated, and later turns without pictures, bring no sinks
        tokens.shared[self, layer] = sink_activation(hidden.detach(), self.dims) > self.config.tau

    def calibrate(self, layer: int, call: Any, output: Tensor) -> Tensor | str:
        if self.config.move_fraction == 0:
            return "move_fraction is 0"
        looked_at = [self._seen(layer, call, i) for i in range(len(call.samples))]
        seen = [x for x in looked_at if x is not None]
        if len(seen) < len(looked_at):
            return "not all rows so far were read under this plan"
        reasons = [x.reason for x in seen if x.reason is not None]
        if len(reasons) == len(seen):
            return reasons[0]
        starts = (self, layer) in call.tokens.shared  # the call brought tokens that can be sinks
        single = call.q.shape[2] == 1 and output.device.type == "cpu" and not call.edits
        if single and not starts and not (torch.is_grad_enabled() and (call.q.requires_grad or output.requires_grad)):
            new, chosen = self._step(call, output, seen)
            asked: Any = len(seen) - len(reasons)
        else:
            sinks, visual = _masks(seen, call.k.shape[2])
            rows = (sinks & visual).any(1, keepdim=True) & ~_before_last(visual[:, call.past :])
            asked = rows.sum()
            if call.edits:
                new, chosen = self._over_edited(call, output, sinks, visual, rows)
            else:
                tensors = output, call.q, call.k, call.v, sinks, visual, rows
                new, chosen = shift_to_images(*tensors, self.rule, call.scale, call.lse)
            if starts:
                call.counts.update(visual_sinks=(sinks & visual).sum(), text_sinks=(sinks & ~visual).sum())
        call.edits.append(shifting(chosen, seen, self.rule.move))
        call.counts.update(rows=chosen.sum(), rows_asked=asked * call.q.shape[1])
        return new

    def _step(self, call: Any, output: Tensor, seen: list[_Seen]) -> tuple[Tensor, Tensor]:
        """One row of each sample, behind all that is visual."""
        lse, kv = call.lse, key_heads(call.q.shape[1], call.k.shape[1])
        if lse is None:
            lse = row_lse(call.q, call.k, kv, call.scale)
        new, chosen = [], []
        for i, held in enumerate(seen):
            here = slice(i, i + 1)
            part, taken = output[here], torch.zeros(1, *output.shape[1:3], dtype=torch.bool)
            if held.keys is not None:
                tensors = call.q[here], call.k[here], call.v[here], lse[here]
                part, taken = shift_row(part, *tensors, held.keys, self.rule, call.scale)
            new.append(part)
            chosen.append(taken)
        return (new[0], chosen[0]) if len(new) == 1 else (torch.cat(new), torch.cat(chosen))

    def _over_edited(
        self, call: Any, output: Tensor, sinks: Tensor, visual: Tensor, asked: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`shift_to_images` over rows that another method had changed."""
        heads = call.q.shape[1]
        kv = key_heads(heads, call.k.shape[1])
        new, chosen = output.clone(), torch.zeros(output.shape[:3], dtype=torch.bool, device=output.device)
        some = asked.any(0).nonzero()
        first = int(some[0]) if len(some) else output.shape[2]  # rows before it are asked of no sample
        for here, a in edited_rows(call.q, call.k, range(heads), kv, call.scale, call.edits, first):
            seen = slice(a.shape[-1])
            moved, rows = reference_shifted(a, sinks[:, seen], visual[:, seen], asked[:, here], self.rule)
            chosen[:, :, here] = rows
            new[:, :, here] = torch.where(
                rows[..., None], attended(moved, call.v, kv).to(output.dtype), output[:, :, here]
            )
        return new, chosen

    def _seen(self, layer: int, call: Any, i: int) -> _Seen | None:
        """What is known of the i-th sample after this call; None if earlier calls went by unseen."""
        memory, past = call.memory[i], call.past
        held = memory.get(self.key)
        if past and held is None:
            return None
        if held is not None and len(held.sinks) > past:  # tokens were taken back, or this is a new text
            held = self._judged(held.sinks[:past], held.visual[:past])
        found, sample, tokens = call.tokens.shared.get((self, layer)), call.samples[i], call.tokens
        if found is not None and (past == 0 or _shows_picture(tokens, sample)):
            here = call.positions[i, past:] - tokens.past  # which token of the call each row is
            sinks, image = found[sample, here], tokens.image
            visual = torch.zeros_like(sinks) if image is None else image[sample, here] >= 0
            if held is not None:
                missing = past - len(held.sinks)
                sinks, visual = (torch.cat([F.pad(x, (0, missing)), y]) for x, y in zip(held[:2], (sinks, visual)))
            held = self._judged(sinks, visual)
        memory[self.key] = held
        return held

    def _judged(self, sinks: Tensor, visual: Tensor) -> _Seen:
        reason = None
        if not bool(visual.any()):
            reason = "no picture"
        elif not bool((sinks & visual).any()):
            reason = "no visual token is a sink"
            if self.config.tau >= math.sqrt(self.width):
                reason = f"no token can be a sink: tau {self.config.tau:g} is not below sqrt({self.width})"
        listed = VisualKeys.of(sinks, visual) if reason is None and sinks.device.type == "cpu" else None
        return _Seen(sinks, visual, reason, listed)


def _shows_picture(tokens: Any, sample: int) -> bool:
    return tokens.image is not None and bool((tokens.image[sample] >= 0).any())
