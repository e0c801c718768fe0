"""YOPO: fewer efforts for visual tokens: some heads do not read them, the last layers do not hold them
(arXiv 2410.06169)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from infer_patch.errors import UnsupportedModelError
from infer_patch.head_lists import HeadList, read_heads
from infer_patch.head_scores import parse_head
from infer_patch.kernels.hidden_keys import HiddenKeys
from infer_patch.method import Method, Runtime, option, register
from infer_patch.pruning import with_whole_prompt
from infer_patch.selection import plain_attention_layers

_REMEDY = "It lists the heads that do not read pictures, by layer; see docs/methods/yopo.md."
_VISUAL = "visual tokens"  # of a sample, remembered by the cache layer: bool, one for each logical token so far


@register("yopo")
@dataclass(frozen=True, kw_only=True)
class YOPO(Method):
    """From layer c on without visual tokens; before it, chosen heads do not read them. The same for every prompt.

    The training-free parts of the paper, as its authors use them on Qwen2-VL. What they fine-tune for is not offered:
    visual tokens that see only their neighbours in the picture, and narrower MLPs for them.

    The cut is real removal in both modes: visual tokens are neither computed nor cached from layer c on, and positions
    of the text stay. Heads differ. "exact" is the published computation: a blind head's softmax runs over all keys, and
    the weights of visual keys are then set to 0 without sharing them out, in all rows; nothing is saved in such heads.
    "fast" approximates it and does less: a blind head works on the text alone, and gives visual tokens nothing.

    Parameters
    ----------
    cut_layer : int, optional
        c, the first layer without visual tokens; as many as there are layers for no cut. Default: after 6 of 7 layers,
        which is 24 of the 28 of Qwen2-VL-7B.
    blind : tuple of str
        Heads that do not read visual tokens, layer and query head from 0: ("5-0", "5-3"). Layers from c on need none.
    heads_file : str
        Instead, a JSON file with `heads`, lists of query heads by layer. A bare name that is no file here is looked for
        among those that ship with the package.
    mode : {"fast", "exact"}
        How blind heads work.

    References
    ----------
    Zhang et al., "Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See", arXiv 2410.06169, 2024.
    """

    cut_layer: int | None = option(None, "c: first layer without visual tokens (default: after 6/7 of the layers)")
    blind: tuple[str, ...] = option((), "heads that do not read visual tokens, as layer-head names")
    heads_file: str = option("", "JSON file that lists such heads, instead")
    mode: Literal["fast", "exact"] = option("fast", "blind heads: fast (text alone), exact (as published)")

    ports = ("reduce", "select")
    modality = "vision"
    paper = "arXiv 2410.06169"
    summary = "the last layers run without visual tokens, and chosen heads do not read them"

    def validate(self) -> None:
        named = (self.blind,) if isinstance(self.blind, str) else tuple(self.blind)
        object.__setattr__(self, "blind", named)
        self.require(self.layers is None, "set `cut_layer` and `blind`, not `layers`")
        cut = self.cut_layer
        number = cut is None or (isinstance(cut, int) and not isinstance(cut, bool) and cut >= 0)
        self.require(number, f"cut_layer must be a layer number from 0 up, got {cut!r}")
        odd = [name for name in named if parse_head(name) is None]
        self.require(not odd, f'blind heads are layer-head names like "5-0", got {odd}')
        self.require(len(set(named)) == len(named), f"blind heads are given once each, got {list(named)}")
        self.require(not (named and self.heads_file), "give either blind or a heads_file, not both")
        self.require(self.mode in ("fast", "exact"), f"mode must be fast or exact, got {self.mode!r}")

    def active_ports(self) -> tuple[str, ...]:
        return self.ports if self.blind or self.heads_file else ("reduce",)

    def layers_of(self, port: str, layers: tuple[int, ...], parts: Any) -> tuple[int, ...]:
        cut = self.cut(parts.num_layers)
        return tuple(layer for layer in layers if (layer >= cut) == (port == "reduce"))

    def cut(self, layers: int) -> int:
        """c in a model of so many layers."""
        return round(layers * 6 / 7) if self.cut_layer is None else self.cut_layer

    def blind_heads(self, parts: Any) -> dict[int, tuple[int, ...]]:
        """Blind heads by layer, of the layers before the cut."""
        if self.heads_file:
            found, source = read_heads(self.heads_file, self.name, _REMEDY), self.heads_file
        else:
            found, source = HeadList.of([head for name in self.blind if (head := parse_head(name))]), "blind"
        found.check(self.name, parts.num_layers, parts.num_heads, source)
        return {layer: heads for layer, heads in found.heads.items() if heads and layer < self.cut(parts.num_layers)}

    def applicable_layers(self, parts: Any) -> tuple[int, ...]:
        if not parts.image_token_ids:
            raise UnsupportedModelError(
                f"{self.name} spends less on visual tokens, and {parts.model_type} has none (no vision configuration "
                "with an image token id was found)."
            )
        cut, layers = self.cut(parts.num_layers), parts.num_layers
        self.require(cut <= layers, f"cut_layer must be at most {layers}, the number of layers, got {cut}")
        blind = self.blind_heads(parts)
        if blind:
            self._check_attention(parts, blind)
        return (*sorted(blind), *((cut,) if cut < layers else ()))

    def _check_attention(self, parts: Any, blind: dict[int, tuple[int, ...]]) -> None:
        odd = sorted(set(blind) - set(plain_attention_layers(self.name, parts)))
        if odd:
            raise UnsupportedModelError(
                f"{self.name}: layers {odd} of {parts.model_type} attend within a window of their own; blind heads are "
                "served in the other layers only."
            )

    def runtime(self, parts: Any, layers: tuple[int, ...]) -> Runtime:
        return _YOPO(self, parts, layers)


def visual_keys(call: Any) -> Tensor | None:
    """Which keys of a call are visual tokens, also those that earlier calls brought: bool [b, S]; None for none.

    Remembered in `call.memory`, by logical index.
    """
    tokens, rows = call.tokens, []
    for sample, memory, positions in zip(call.samples, call.memory, call.positions):
        known = memory.get(_VISUAL)
        if known is not None and len(known) > tokens.past:  # tokens were taken back
            known = memory[_VISUAL] = known[: tokens.past]
        if tokens.image is not None:
            new = tokens.image[sample] >= 0
            before = new.new_zeros(tokens.past)
            if known is not None:
                before[: len(known)] = known
            known = memory[_VISUAL] = torch.cat([before, new])
        if known is None or len(known) == 0:
            rows.append(torch.zeros_like(positions, dtype=torch.bool))
        else:
            rows.append((positions < len(known)) & known[positions.clamp(max=len(known) - 1)])
    hidden = torch.stack(rows)
    return hidden if bool(hidden.any()) else None


def visual_ratio(attention: Tensor, visual: Tensor) -> Tensor:
    """How much more a head reads visual tokens than text: [..., Q, K] and bool [K] -> [...].

    The sum over all queries of what falls on visual keys, over the sum of what falls on the others.
    """
    mass = attention.double().sum(-2)
    return mass[..., visual].sum(-1) / mass[..., ~visual].sum(-1)


def seeing_heads(ratios: Tensor, threshold: float, vote: float = 0.4, full: int = 2) -> Tensor:
    """The head mask M: ratios [samples, L, H] -> bool [L, H], True for heads that read visual tokens.

    A head sees where its ratio is above the threshold in strictly more than a share `vote` of the samples; the first
    `full` layers see throughout.
    """
    seeing = (ratios > threshold).sum(0) > vote * len(ratios)
    seeing[:full] = True
    return seeing


class _YOPO(Runtime):
    config: YOPO
    reads_images = True  # blind heads need to know them, also without a cut

    def __init__(self, config: YOPO, parts: Any, layers: tuple[int, ...]):
        super().__init__(config, parts, layers)
        self.blind = config.blind_heads(parts)

    def reduce(self, layer: int, tokens: Any) -> Tensor | None:
        return (tokens.image < 0) | ~with_whole_prompt(tokens)[:, None]

    def select(self, layer: int, call: Any) -> HiddenKeys | str:
        hidden = visual_keys(call)
        if hidden is None:
            return "no visual tokens"
        queries = call.q.shape[2]
        rows, keys = (~hidden[:, call.past :]).sum(1).tolist(), (~hidden).sum(1).tolist()
        return HiddenKeys(
            blind=self.blind[layer],
            heads=call.q.shape[1],
            queries=queries,
            hidden=hidden,
            loses_mass=self.config.mode == "exact",
            counts=tuple(zip(rows, keys)),
        )
