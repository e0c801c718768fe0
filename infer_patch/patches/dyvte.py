"""DyVTE: small gates decide layer by layer whether all visual tokens may leave (arXiv 2411.19628)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from infer_patch.artifacts import load_artifact
from infer_patch.errors import ArtifactError, UnsupportedModelError
from infer_patch.method import Method, Runtime, option, register
from infer_patch.pruning import with_whole_prompt

FEATURES = "text_mean+last"


@register("dyvte")
@dataclass(frozen=True, kw_only=True)
class DyVTE(Method):
    """Once the text has taken in what it needs, all visual tokens of a sample leave; gates see when, sample by sample.

    After each decoder layer a tiny network reads the text behind the picture: the mean of its states and the state of
    the prompt's last token. Where it says so, the visual tokens of that sample are not computed and not cached from
    the next layer on. This is decided in prefill, once, and holds for the whole answer. Positions of the text stay. In
    a batch each sample leaves at its own layer.

    The gates are trained on one model by `infer-patch calibrate dyvte`; the model itself is not touched.

    Parameters
    ----------
    gates : str
        Folder made by `infer-patch calibrate dyvte` for this very model. A bare name that is no folder here is looked
        for among those that ship with the package.
    threshold : float
        A gate fires when it gives leaving more than this probability: 1 never, 0 always.
    min_layer : int
        First layer (from 0) after which tokens may leave.
    policy : {"gates", "fixed"}
        "fixed" is not DyVTE: all samples leave after `exit_layer`, whatever they are. It needs no gates, and is what
        gates have to beat.
    exit_layer : int, optional
        For the fixed policy: the last layer that sees pictures.

    References
    ----------
    Wu et al., "Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical
    Findings", arXiv 2411.19628, NeurIPS 2025.
    """

    gates: str = option("", "folder with the gates, made by `infer-patch calibrate dyvte`")
    threshold: float = option(0.5, "probability of leaving above which a gate fires")
    min_layer: int = option(0, "first layer after which tokens may leave")
    policy: str = option("gates", "gates, or fixed: leave after exit_layer (not DyVTE)")
    exit_layer: int | None = option(None, "for the fixed policy: the last layer that sees pictures")

    ports = ("reduce",)
    modality = "vision"
    paper = "arXiv 2411.19628"
    summary = "all visual tokens leave at the layer where a small gate says the text needs them no more"
    artifact = "a folder with gates (infer-patch calibrate dyvte)"

    def validate(self) -> None:
        self.require(self.layers is None, "set `min_layer` or `exit_layer`, not `layers`")
        self.require(self.policy in ("gates", "fixed"), f"policy must be gates or fixed, got {self.policy!r}")
        number = isinstance(self.threshold, (int, float)) and 0 <= self.threshold <= 1
        self.require(number, f"threshold must be a probability from 0 to 1, got {self.threshold!r}")
        self.require(_is_layer(self.min_layer), f"min_layer must be a layer number from 0 up, got {self.min_layer!r}")
        if self.policy == "gates":
            self.require(
                isinstance(self.gates, str) and bool(self.gates),
                f"gates must name a folder, got {self.gates!r}; make one with `infer-patch calibrate dyvte`",
            )
            self.require(self.exit_layer is None, "exit_layer is for policy fixed; gates choose the layer themselves")
        else:
            self.require(not self.gates, "the fixed policy has no gates; leave `gates` out")
            self.require(
                self.exit_layer is not None and _is_layer(self.exit_layer),
                f"policy fixed needs exit_layer, a layer number from 0 up, got {self.exit_layer!r}",
            )

    def applicable_layers(self, parts: Any) -> tuple[int, ...]:
        if not parts.image_token_ids:
            raise UnsupportedModelError(
                f"{self.name} prunes visual tokens, and {parts.model_type} has none (no vision configuration with an "
                "image token id was found)."
            )
        last = parts.num_layers - 2  # after the last layer there is nothing to save
        first = self.min_layer if self.exit_layer is None else self.exit_layer
        option_name = "min_layer" if self.exit_layer is None else "exit_layer"
        self.require(first <= last, f"{option_name} must be at most {last} for {parts.num_layers} layers, got {first}")
        return tuple(range(first + 1, parts.num_layers)) if self.exit_layer is None else (first + 1,)

    def runtime(self, parts: Any, layers: tuple[int, ...]) -> Runtime:
        return _Fixed(self, parts, layers) if self.policy == "fixed" else _Gated(self, parts, layers)


def _is_layer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def gate_features(hidden: Tensor, visual: Tensor, last: Tensor) -> Tensor:
    """What a gate reads: fp32 [B, 2 C].

    Parameters
    ----------
    hidden : Tensor [B, T, C]
        Output of a decoder layer, before any further norm.
    visual : bool Tensor [B, T]
    last : int64 Tensor [B]
        Index of the prompt's last token.

    Returns
    -------
    Tensor
        Mean state of the text behind the first visual token without the last token (the last state, where there is no
        such text), then the last state.
    """
    place = torch.arange(hidden.shape[1], device=hidden.device)
    behind = (place > visual.int().argmax(1)[:, None]) & (place < last[:, None]) & ~visual
    final = hidden[torch.arange(len(hidden), device=hidden.device), last].float()
    columns = behind.any(0).nonzero()[:, 0]
    member = behind[:, columns, None]
    count = member.sum(1)
    mean = hidden[:, columns].float().masked_fill(~member, 0).sum(1) / count.clamp(min=1)
    return torch.cat([torch.where(count > 0, mean, final), final], 1)


def gate_logits(features: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """W2 gelu(W1 f), no biases: [B, 2 C], (h, 2 C), (2, h) -> [B, 2]; class 0 stays, class 1 leaves."""
    return F.gelu(features @ w1.T) @ w2.T


def fires(logits: Tensor, threshold: float) -> Tensor:
    """softmax(logits)[1] > threshold, bool [B]; never at 1, always at 0, rounding or not."""
    if threshold in (0, 1):
        return torch.full_like(logits[:, 0], threshold == 0, dtype=torch.bool)
    return logits[:, 1] - logits[:, 0] > math.log(threshold / (1 - threshold))


def exit_labels(full: Tensor, cut: Tensor, labels: Tensor) -> Tensor:
    """Might the visual tokens have left? bool [B], the labels that gates are trained on.

    True where the model without visual tokens chooses as with them on more than 99 % of the answer, and its loss is
    below 1.03 times theirs.

    Parameters
    ----------
    full, cut : Tensor [B, T, V]
        Logits that predict `labels`, with visual tokens in all layers and without them past the layer in question.
    labels : int64 Tensor [B, T]
        The reference answer, -100 elsewhere. As in the published code, the loss leaves out token 0 too.
    """
    answer = labels >= 0
    same = (full.argmax(-1) == cut.argmax(-1)) & answer
    agreement = same.sum(1) / answer.sum(1).clamp(min=1)
    counted = labels > 0

    def loss(logits: Tensor) -> Tensor:
        each = F.cross_entropy(logits.double().transpose(1, 2), labels.clamp(min=0), reduction="none")
        return (each * counted).sum(1) / counted.sum(1).clamp(min=1)

    return (agreement > 0.99) & (loss(cut) < 1.03 * loss(full))


def load_gates(path: str, model: Any) -> dict[int, tuple[Tensor, Tensor]]:
    """Gates by layer, fp32, from a folder made for this model; a bare name is looked for in `infer_patch/configs`."""
    folder: Any = Path(path)
    if not folder.is_dir() and folder.name == path:
        shipped = Path(str(resources.files("infer_patch").joinpath("configs", path)))
        folder = shipped if shipped.is_dir() else folder
    found = load_artifact(folder, "dyvte", model)
    if found.meta.get("features") != FEATURES:
        raise ArtifactError(
            f"{path} holds gates for the features {found.meta.get('features')!r}; this release has {FEATURES!r}. Make "
            "new ones with `infer-patch calibrate dyvte`."
        )
    text = model.config.get_text_config()
    gates = {}
    for layer in range(text.num_hidden_layers - 1):
        w1, w2 = (found.tensors.get(f"gates.{layer}.{name}") for name in ("w1", "w2"))
        whole = w1 is not None and w2 is not None and w1.ndim == 2 and w2.shape == (2, len(w1))
        if not whole or cast(Tensor, w1).shape[1] != 2 * text.hidden_size:
            raise ArtifactError(
                f"{path} should hold gates.{layer}.w1 (h, {2 * text.hidden_size}) and gates.{layer}.w2 (2, h). Make "
                "new ones with `infer-patch calibrate dyvte`."
            )
        gates[layer] = cast(Tensor, w1).float(), cast(Tensor, w2).float()
    return gates


class _Fixed(Runtime):
    def reduce(self, layer: int, tokens: Any) -> Tensor | None:
        return (tokens.image < 0) | ~with_whole_prompt(tokens)[:, None]


class _Gated(Runtime):
    config: DyVTE

    def __init__(self, config: DyVTE, parts: Any, layers: tuple[int, ...]):
        super().__init__(config, parts, layers)
        places = [next(layer.parameters()).device for layer in parts.layers]
        self.gates = {
            layer: tuple(w.to(places[layer]) for w in gate)
            for layer, gate in load_gates(config.gates, parts.root).items()
        }
        self.watches = frozenset(layers)

    def watch(self, layer: int, hidden: Tensor, tokens: Any) -> None:
        """Ask the gate of the layer before, in calls that bring pictures: while generating, the decision stands."""
        if tokens.image is None:
            return
        image = tokens.image.to(hidden.device)
        left = tokens.shared.get(self)
        if left is None:
            left = torch.zeros(tokens.batch, dtype=torch.bool, device=hidden.device)
        left = left.to(hidden.device)
        features = gate_features(hidden, image >= 0, tokens.last_index.to(hidden.device))
        w1, w2 = (w.to(hidden.device) for w in self.gates[layer - 1])
        now = (
            fires(gate_logits(features, w1, w2), self.config.threshold)
            & with_whole_prompt(tokens).to(hidden.device)
            & ~left
        )
        tokens.shared[self] = left | now
        tokens.shared[self, layer] = bool(now.any())

    def reduce(self, layer: int, tokens: Any) -> Tensor | None:
        if not tokens.shared.pop((self, layer)):
            return None
        return (tokens.image < 0) | ~tokens.shared[self].to(tokens.image.device)[:, None]
