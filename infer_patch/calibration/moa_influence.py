"""How much each attention weight of a model is worth: the first-order change of the loss if it were taken away.

For a row of one head with probabilities a and loss gradient g = dL/da, removing weight j and renormalising the rest
changes the loss by E_j = -a_j / (1 - a_j) (g_j - sum_n g_n a_n). Sums of |E| over blocks of 64 x 64 are what MoA's
search is made of.

Gradients are taken layer by layer: one forward pass keeps the input of every layer, and each layer is run again, last
one first, with the gradient of its output. So memory is that of one layer's graph, however many layers there are, and
probabilities exist for one head at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infer_patch.attention import Port
from infer_patch.errors import UnsupportedModelError
from infer_patch.families import ModelParts
from infer_patch.installation import Installation

_EPSILON = 1e-6


def weight_influence(probabilities: Tensor, gradients: Tensor) -> Tensor:
    """E for the rows of causal attention, fp32 [T, T]; row t sees the keys 0 to t.

    The first row has one key: nothing is left to renormalise, and E is -g a.
    """
    a, g = probabilities.float(), gradients.float()
    found = -a / (1 - a).clamp(min=_EPSILON) * (g - (g * a).sum(-1, keepdim=True))
    found[..., 0, :] = -(g * a)[..., 0, :]
    return found


def block_influence(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, scale: float, block: int = 64) -> Tensor:
    """Sums of |E| over blocks of the causal triangle, fp32 [H, ceil(T / block), ceil(T / block)].

    Parameters
    ----------
    q : Tensor [H, T, D]
    k, v : Tensor [H_kv, T, D]
        Of one prompt without padding, as they enter attention; query head h reads key head h // (H / H_kv).
    gradient : Tensor [H, T, D]
        Of the loss with respect to the attention output, before the output projection.
    """
    heads, length, _ = q.shape
    group, blocks = heads // k.shape[0], -(-length // block)
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    found = torch.empty(heads, blocks, blocks)
    for head in range(heads):
        keys, values = k[head // group].float(), v[head // group].float()
        scores = (q[head].float() @ keys.T * scale).masked_fill_(future, float("-inf"))
        weights = weight_influence(scores.softmax(-1), gradient[head].float() @ values.T).masked_fill_(future, 0)
        room = blocks * block - length
        tiles = F.pad(weights.abs_(), (0, room, 0, room)).view(blocks, block, blocks, block)
        found[head] = tiles.sum((1, 3)).cpu()
    return found


def answer_loss(model: Any, input_ids: Tensor, answer_tokens: int) -> Tensor:
    """Mean cross-entropy over the last `answer_tokens` of input_ids [1, T]."""
    takes_few = "logits_to_keep" in inspect.signature(model.forward).parameters
    few = {"logits_to_keep": answer_tokens + 1} if takes_few else {}
    logits = model(input_ids=input_ids, use_cache=False, **few).logits[0, -answer_tokens - 1 : -1]
    return F.cross_entropy(logits.float(), input_ids[0, -answer_tokens:])


def prompt_influence(
    model: Any, parts: ModelParts, input_ids: Tensor, answer_tokens: int, block: int = 64
) -> tuple[dict[int, Tensor], float]:
    """Block influence [H, blocks, blocks] of every layer without a window of its own, and the loss of the answer.

    Parameters
    ----------
    input_ids : int64 Tensor [1, T]
        Prompt and answer; no padding.
    answer_tokens : int
        Tokens at the end that carry the loss.
    """
    with _frozen(model), _tapped(parts) as tap:
        with _recorded(parts) as calls, torch.enable_grad():
            loss = answer_loss(model, input_ids, answer_tokens)
            loss.backward()
        gradient, following = calls.top.grad, calls.top.detach()
        found = {}
        for layer in reversed(range(parts.num_layers)):
            args, kwargs, hidden = calls.inputs[layer]
            leaf = hidden.detach().requires_grad_()
            tap.open = layer in parts.full_attention_layers
            with torch.enable_grad():
                output = _tensor(parts.layers[layer](*(leaf, *args), **kwargs))
                if gradient is None or not _same(output, following):
                    raise UnsupportedModelError(
                        f"{parts.model_type}: something happens between its layers {layer} and {layer + 1}, so that "
                        "gradients cannot be taken layer by layer."
                    )
                output.backward(gradient)
            gradient, following, calls.inputs[layer] = leaf.grad, hidden, None
            if tap.open:
                q, k, v, scale, towards = tap.take()
                found[layer] = block_influence(q, k, v, towards, scale, block)
    return dict(sorted(found.items())), loss.item()


class _Tap:
    """Stands where an engine stands and lets everything pass; while open, it keeps what one layer's attention sees."""

    def __init__(self) -> None:
        self.open = False
        self.seen: Any = None
        self.gradient: Tensor | None = None

    def attend(
        self, port: Port, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        output, weights = port.dense(module, q, k, v, mask, **kwargs)
        if self.open:
            self.seen = *(x[0].detach() for x in (q, k, v)), kwargs.get("scaling") or q.shape[-1] ** -0.5
            output.register_hook(self._keep)
        return output, weights

    def _keep(self, gradient: Tensor) -> None:
        self.gradient = gradient[0].transpose(0, 1)

    def take(self) -> tuple[Tensor, Tensor, Tensor, float, Tensor]:
        """q, k, v, scale, and the gradient of the output [H, T, D]."""
        if self.seen is None or self.gradient is None:
            raise UnsupportedModelError("no gradient arrived at the attention of a layer; is the model quantised?")
        (q, k, v, scale), gradient = self.seen, self.gradient
        self.seen = self.gradient = None
        return q, k, v, scale, gradient


class _Calls:
    """What the layers were called with: `inputs[i]` is (further positional arguments, keywords, hidden states)."""

    def __init__(self, layers: int):
        self.inputs: list[Any] = [None] * layers
        self.top = torch.empty(0)


@contextmanager
def _tapped(parts: ModelParts) -> Iterator[_Tap]:
    installation, tap = Installation(parts), _Tap()
    try:
        installation.swap_configs(lazy_masks=False)
        installation.add_ports(lambda layer, dense: Port(tap, layer, dense, True))  # type: ignore[arg-type]
        yield tap
    finally:
        installation.remove()


@contextmanager
def _recorded(parts: ModelParts) -> Iterator[_Calls]:
    """Note the inputs of every layer; the output of the last becomes a leaf, so that the graph begins there."""
    calls, hooks = _Calls(parts.num_layers), []

    def note(number: int) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            calls.inputs[number] = (args[1:], kwargs, hidden.detach())

        return before

    def cut(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        calls.top = _tensor(output).detach().requires_grad_()
        return (calls.top, *output[1:]) if isinstance(output, tuple) else calls.top

    try:
        for number, layer in enumerate(parts.layers):
            hooks.append(layer.register_forward_pre_hook(note(number), with_kwargs=True))
        hooks.append(parts.layers[-1].register_forward_hook(cut))
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients of the weights; they get back what they had."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _same(output: Tensor, other: Tensor) -> bool:
    """Equal but for rounding."""
    difference = (output.detach() - other).float().abs().max()
    return bool(difference <= 0.02 * other.float().abs().max())


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
