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
from infer_patch.kernels.image_shift import ImageRule, reference_shifted, shift_to_images, shifted_probabilities
from infer_patch.kernels.row_attention import key_heads
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


def shifting(chosen: Tensor, sinks: Tensor, visual: Tensor, move: float) -> RowEdit:
    """What methods after this one find: rows chosen [b, H, T] with their attention moved; sinks, visual [b, S]."""

    def edit(a: Tensor, z: Tensor, heads: Sequence[int], rows: slice) -> Tensor:
        here, seen = chosen[:, list(heads), rows, None], slice(a.shape[-1])
        return torch.where(here, shifted_probabilities(a, sinks[:, seen], visual[:, seen], move), a)

    return edit


class _Seen(NamedTuple):
    """The tokens of one sample in one layer, as far as they were looked at: bool [n] each; those after are neither
    sinks nor visual. `reason`: why no row of it is edited, None where rows may be."""

    sinks: Tensor
    visual: Tensor
    reason: str | None


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
        keys = call.k.shape[2]
        sinks, visual = (
            torch.stack([F.pad(mask, (0, keys - len(mask))) for mask in masks])
            for masks in ([x.sinks for x in seen], [x.visual for x in seen])
        )
        asked = (sinks & visual).any(1, keepdim=True) & ~(visual[:, call.past :].flip(1).cumsum(1) > 0).flip(
            1
        )  # behind the last picture of this call
        if call.edits:
            new, chosen = self._over_edited(call, output, sinks, visual, asked)
        else:
            new, chosen = shift_to_images(
                output, call.q, call.k, call.v, sinks, visual, asked, self.rule, call.scale, call.lse
            )
        call.edits.append(shifting(chosen, sinks, visual, self.rule.move))
        call.counts.update(rows=chosen.sum(), rows_asked=asked.sum() * call.q.shape[1])
        if (self, layer) in call.tokens.shared:
            call.counts.update(visual_sinks=(sinks & visual).sum(), text_sinks=(sinks & ~visual).sum())
        return new

    def _over_edited(
        self, call: Any, output: Tensor, sinks: Tensor, visual: Tensor, asked: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`shift_to_images` over rows that another method had changed."""
        heads = call.q.shape[1]
        kv = key_heads(heads, call.k.shape[1])
        new, chosen = output.clone(), torch.zeros(output.shape[:3], dtype=torch.bool, device=output.device)
        for here, a in edited_rows(call.q, call.k, range(heads), kv, call.scale, call.edits):
            if not bool(asked[:, here].any()):
                continue
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
        held = memory.get(self)
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
        memory[self] = held
        return held

    def _judged(self, sinks: Tensor, visual: Tensor) -> _Seen:
        reason = None
        if not bool(visual.any()):
            reason = "no picture"
        elif not bool((sinks & visual).any()):
            reason = "no visual token is a sink"
            if self.config.tau >= math.sqrt(self.width):
                reason = f"no token can be a sink: tau {self.config.tau:g} is not below sqrt({self.width})"
        return _Seen(sinks, visual, reason)


def _shows_picture(tokens: Any, sample: int) -> bool:
    return tokens.image is not None and bool((tokens.image[sample] >= 0).any())
