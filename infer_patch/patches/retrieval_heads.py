"""Retrieval heads: take chosen attention heads away and see what the model can no longer do (arXiv 2404.15574)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from infer_patch.errors import PlanError, UnsupportedCallError, UnsupportedModelError
from infer_patch.head_scores import Head, HeadScores, parse_head
from infer_patch.method import Method, Runtime, option, register
from infer_patch.row_edits import RowEdit

_REMEDY = "Make a file with `infer-patch calibrate retrieval-heads`, or take a published one of this layout."


@register("retrieval_heads")
@dataclass(frozen=True, kw_only=True)
class RetrievalHeads(Method):
    """Chosen query heads are masked: they give the plain mean of all values they may see, or nothing.

    For study, not for speed: a few heads copy facts out of a long context, and without them a model answers from what
    it knows by heart, while as many other heads are hardly missed. The heads are named here, or are the `top` ones of
    a score file, or as many drawn at random from the rest: the control.

    Only the chosen heads' outputs change. Other query heads of the same key head, and what the layer's cache holds,
    are untouched.

    Parameters
    ----------
    heads : tuple of str
        Heads by name, layer and query head from 0: ("16-19", "11-15").
    scores_file : str
        Instead, scores made by `infer-patch calibrate retrieval-heads` or published: {"16-19": [0.94, ...], ...}. A
        bare name that is no file here is looked for among those that ship with the package.
    top : int
        How many heads of the file to mask, the highest mean scores first; 0 masks none and changes no bit.
    draw : {"best", "random"}
        Mask the top heads, or as many drawn without replacement from those below the `spare` best.
    spare : int
        How many of the best heads are never drawn.
    seed : int
        Of the draw.
    mode : {"uniform", "zero"}
        Attention spread evenly over the visible values (the paper's masking), or an output of zeros.
    phase : {"decode", "all"}
        Mask the rows that a token is predicted from, the prompt's last one and all that are generated (the paper's
        way); or every row, prefill included.

    References
    ----------
    Wu et al., "Retrieval Head Mechanistically Explains Long-Context Factuality", arXiv 2404.15574, ICLR 2025.
    """

    heads: tuple[str, ...] = option((), "heads to mask, as layer-head names")
    scores_file: str = option("", "JSON file with a score for every head")
    top: int = option(0, "how many heads of the file to mask")
    draw: Literal["best", "random"] = option("best", "best: the top ones; random: as many others, the control")
    spare: int = option(100, "random: how many of the best heads are never drawn")
    seed: int = option(0, "random: of the draw")
    mode: Literal["uniform", "zero"] = option("uniform", "uniform: mean of the visible values; zero: nothing")
    phase: Literal["decode", "all"] = option("decode", "decode: rows that predict; all: every row")

    ports = ("calibrate",)
    paper = "arXiv 2404.15574"
    calibration_order = 1
    summary = "mask chosen heads, to see which ones copy facts out of the context; for study"
    artifact = "a score file (infer-patch calibrate retrieval-heads), unless heads are named"

    def validate(self) -> None:
        named = (self.heads,) if isinstance(self.heads, str) else tuple(self.heads)
        object.__setattr__(self, "heads", named)
        odd = [name for name in named if parse_head(name) is None]
        self.require(not odd, f'heads are layer-head names like "16-19", got {odd}')
        self.require(len(set(named)) == len(named), f"heads are given once each, got {list(named)}")
        one = bool(named) != bool(self.scores_file)
        self.require(one, f"give either heads or a scores_file, got {list(named)} and {self.scores_file!r}. {_REMEDY}")
        self.require(self.top >= 0, f"top must be 0 heads or more, got {self.top}")
        self.require(not (named and self.top), "top is for a scores_file; with heads all of them are masked")
        self.require(self.draw in ("best", "random"), f"draw must be best or random, got {self.draw!r}")
        self.require(
            not (named and self.draw == "random"), "draw is for a scores_file; heads that are named are not drawn"
        )
        self.require(self.spare >= 0, f"spare must be 0 heads or more, got {self.spare}")
        self.require(self.mode in ("uniform", "zero"), f"mode must be uniform or zero, got {self.mode!r}")
        self.require(self.phase in ("decode", "all"), f"phase must be decode or all, got {self.phase!r}")

    def chosen(self, parts: Any) -> list[Head]:
        """The heads to mask in this model, sorted; of the layers in `layers`, where those are given."""
        shape = f"{parts.model_type} has {parts.num_layers} layers of {parts.num_heads} query heads"
        within = range(parts.num_layers) if self.layers is None else self.layers
        if not self.scores_file:
            found = sorted(head for name in self.heads if (head := parse_head(name)) is not None)
            outside = [f"{i}-{h}" for i, h in found if i >= parts.num_layers or h >= parts.num_heads or i not in within]
            self.require(
                not outside, f"heads {outside} are not there: {shape}, counted from 0, and layers={self.layers}"
            )
            return found
        scores = HeadScores.read(self.scores_file, _REMEDY)
        if (scores.layers, scores.heads) != (parts.num_layers, parts.num_heads):
            raise PlanError(
                f"{self.name}: {self.scores_file} holds {scores.layers} layers of {scores.heads} heads; {shape}. "
                f"{_REMEDY}"
            )
        return sorted(pick([head for head in scores.ranked() if head[0] in within], self))

    def resolve_layers(self, parts: Any) -> tuple[int, ...]:
        layers = tuple(sorted({layer for layer, _ in self.chosen(parts)}))
        kinds = getattr(parts.text_config, "layer_types", None) or ()
        chunked = [i for i in layers if i < len(kinds) and kinds[i] == "chunked_attention"]
        if chunked and self.mode == "uniform":
            raise UnsupportedModelError(
                f"{self.name}: layers {chunked} of {parts.model_type} attend in chunks, whose visible keys this mode "
                'does not know. Use mode="zero", or other heads.'
            )
        return layers

    def runtime(self, parts: Any, layers: tuple[int, ...]) -> Runtime:
        return _Masking(self, parts, layers)


def pick(ranked: list[Head], config: RetrievalHeads) -> list[Head]:
    """The best `top` heads, or as many of those below the `spare` best, drawn by the seed."""
    best, rest = ranked[: config.top], ranked[config.spare :]
    drawn = config.draw == "random"
    if config.top > len(rest if drawn else ranked):
        raise PlanError(
            f"{config.name}: {config.top} heads were asked for, and there are {len(rest if drawn else ranked)}"
            + (f" below the {config.spare} best. Lower `spare` or `top`." if drawn else ". Lower `top`.")
        )
    return random.Random(config.seed).sample(sorted(rest), config.top) if drawn else best


def causal_means(v: Tensor, rows: int, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What uniform attention gives: for each of the last `rows` queries, the mean of the values up to its own.

    v [b, h, S, D] -> means [b, h, rows, D] and the sum of all values [b, h, 1, D], fp32. `before` is the sum of the
    values before the last `rows`, where it is known.
    """
    keys = v.shape[2]
    if before is None:
        before = v[:, :, : keys - rows].float().sum(2, keepdim=True)
    sums = before + v[:, :, keys - rows :].float().cumsum(2)
    counts = torch.arange(keys - rows + 1, keys + 1, device=v.device)
    return sums / counts[:, None], sums[:, :, -1:]


def window_means(v: Tensor, positions: Tensor, rows: int, window: int) -> Tensor:
    """The same where a query sees the last `window` positions only, its own included: means [b, h, rows, D], fp32.

    positions int64 [b, S], ascending; the keys between them may have been dropped.
    """
    keys = v.shape[2]
    first = torch.searchsorted(positions.contiguous(), positions[:, keys - rows :].contiguous() - window, right=True)
    sums = F.pad(v.float().cumsum(2), (0, 0, 1, 0))
    earlier = sums.gather(2, first[:, None, :, None].expand(-1, v.shape[1], -1, v.shape[3]))
    counts = torch.arange(keys - rows + 1, keys + 1, device=v.device) - first
    return (sums[:, :, keys - rows + 1 :] - earlier) / counts[:, None, :, None]


def masking(masked: Sequence[int], first: int, uniform: bool) -> RowEdit:
    """What methods after this one find: from row `first` of a call on, masked heads attend evenly, or to nothing."""

    def edit(a: Tensor, z: Tensor, heads: Sequence[int], rows: slice) -> Tensor:
        here, since = [heads.index(head) for head in masked if head in heads], max(first - rows.start, 0)
        if not here or since >= a.shape[2]:
            return a
        a = a.clone()
        visible = z[:, here, since:] > float("-inf")
        a[:, here, since:] = (
            visible / visible.sum(-1, keepdim=True) if uniform else torch.zeros_like(z[:, here, since:])
        )
        return a

    return edit


class _Masking(Runtime):
    config: RetrievalHeads
    any_mask = True

    def __init__(self, config: RetrievalHeads, parts: Any, layers: tuple[int, ...]):
        super().__init__(config, parts, layers)
        group = parts.num_heads // parts.num_kv_heads
        self.heads: dict[int, list[int]] = {layer: [] for layer in layers}
        for layer, head in config.chosen(parts):
            self.heads[layer].append(head)
        self.key_heads = {layer: sorted({head // group for head in heads}) for layer, heads in self.heads.items()}
        self.places = {
            layer: [self.key_heads[layer].index(head // group) for head in heads] for layer, heads in self.heads.items()
        }

    def calibrate(self, layer: int, call: Any, output: Tensor) -> Tensor:
        queries = output.shape[2]
        rows = queries if self.config.phase == "all" else min(call.tokens.asked, queries)
        output = output.clone()
        call.counts["rows"] = rows * len(self.heads[layer]) * len(call.samples)
        call.edits.append(masking(self.heads[layer], queries - rows, uniform=self.config.mode == "uniform"))
        if self.config.mode == "zero":
            output[:, self.heads[layer], queries - rows :] = 0
            return output
        if not call.ordered and self.config.phase == "all" and queries > 1:
            raise UnsupportedCallError(
                f"{self.config.name}: this model's own mask lets some tokens look forward or hides earlier ones, so "
                'which values a prompt\'s tokens see is not known. Use phase="decode" or mode="zero".'
            )
        means = self._means(layer, call, rows)[:, self.places[layer]]
        output[:, self.heads[layer], queries - rows :] = means.to(output.dtype)
        return output

    def _means(self, layer: int, call: Any, rows: int) -> Tensor:
        """Means of the visible values for the key heads of this layer that masked heads read."""
        v = call.v[:, self.key_heads[layer]]
        window = self.parts.windows[layer]
        if window is not None:
            return window_means(v, call.positions, rows, window)
        known, keys = call.state.get(self.key), v.shape[2]
        before = known[1] if known is not None and known[0] == keys - rows else None
        means, total = causal_means(v, rows, before)
        if not total.requires_grad:
            call.state[self.key] = keys, total
        return means
