"""Attention of a layer in which methods take part: observe, select, run sparse or dense, calibrate."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from infer_patch.attention import LazyMask, Port
from infer_patch.dense_lse import dense_with_lse
from infer_patch.errors import UnsupportedCallError
from infer_patch.kernels.block_mask import BlockMask, causal_blocks
from infer_patch.kernels.block_sparse_attention import block_sparse_attention
from infer_patch.kernels.dense_attention import dense_attention
from infer_patch.kernels.hidden_keys import HiddenKeys, hidden_keys_attention
from infer_patch.kernels.subset_attention import BLOCK, TokenSubset, subset_attention
from infer_patch.method import Runtime
from infer_patch.run import AttentionCall, LayerInputs, index_of
from infer_patch.stats import Stats

if TYPE_CHECKING:
    from infer_patch.engine import Engine

DROPOUT = "attention dropout is on (training mode); call model.eval() first."


def attend(
    engine: Engine,
    port: Port,
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """q [B, H, T, D], k and v [B, H_kv, S, D] -> output [B, T, H, D] and the weights if the dense path gives any."""
    run, layer = engine.run, port.layer
    if run is None:
        return port.dense(module, q, k, v, mask.dense() if isinstance(mask, LazyMask) else mask, **kwargs)
    mask = mask if run.mask is None else run.mask
    if isinstance(mask, Tensor) and mask.ndim == 4:
        raise UnsupportedCallError("a hand-made 4-D attention mask cannot be patched; pass the 2-D padding mask.")
    scale = kwargs.get("scaling") or q.shape[-1] ** -0.5
    ordered = not isinstance(mask, LazyMask) or mask.is_ordered
    inputs = LayerInputs(run, layer, run.key_view(layer, k.shape[2]), q, k, v, scale, ordered)
    if run.tokens.image is not None:
        for runtime in engine.observers.get(layer, ()):
            for call in inputs.calls():
                runtime.observe(layer, call)
    output = weights = None
    held = run.held(layer)
    if held is not None and not held.attends:
        held = None
    if held is not None:
        if kwargs.get("dropout"):
            raise UnsupportedCallError(DROPOUT)
        output = held.attention(inputs, mask)
        if held.counted is not None and layer in engine.stores:
            name = engine.stores[layer].config.name
            engine.stats.selected(name, layer, *held.counted, decode=q.shape[2] == 1)
    if output is None and layer in engine.selectors:
        output = _sparse(engine.selectors[layer], inputs, mask, kwargs, engine.stats)
    if output is None:
        if inputs.view.positions is not None:  # flash-attn would take gaps between positions for several texts
            kwargs = {name: value for name, value in kwargs.items() if name != "position_ids"}
        dense_mask, both = _dense_mask(inputs, mask), None
        if any(runtime.reads_lse for runtime in engine.calibrators.get(layer, ())):
            both = dense_with_lse(port.dense, module, q, inputs.k, inputs.v, dense_mask, kwargs)
        if both is not None:
            output, inputs.lse = both
        else:
            output, weights = port.dense(module, q, inputs.k, inputs.v, dense_mask, **kwargs)
    if held is not None:
        held.attended(inputs)
    for runtime in engine.calibrators.get(layer, ()):
        if kwargs.get("dropout"):
            raise UnsupportedCallError(DROPOUT)
        output = _calibrated(runtime, inputs, output, mask, engine.stats)
    return output, weights


def _dense_mask(inputs: LayerInputs, mask: Any) -> Any:
    """What the model's own attention gets as its mask: over the rows that are here."""
    run, view = inputs.run, inputs.view
    if view.positions is None or (run.held(inputs.layer) is None and run.reduction is None):
        cached = inputs.q.shape[2] < inputs.k.shape[2]
        if cached and run.held(inputs.layer) is not None and isinstance(mask, LazyMask) and not mask.is_plain_causal:
            # a layer with a window of its own: its mask is made for the few keys that transformers would have kept
            keys, start = run.every_row(inputs.k.shape[2])
            return mask.over_rows(None, keys, inputs.q.shape[2], start)
        return mask.dense() if isinstance(mask, LazyMask) else mask
    if not isinstance(mask, LazyMask):
        raise UnsupportedCallError("this model makes no attention mask that rows could be taken from.")
    queries = None
    if run.reduction is not None:
        reduction = run.reduction
        queries = run.once(reduction.index, lambda _: reduction.positions(run.tokens.past))
    return mask.over_rows(queries, view.positions, inputs.q.shape[2], view.start or ())


def _sparse(runtime: Runtime, inputs: LayerInputs, mask: Any, kwargs: dict[str, Any], stats: Stats) -> Tensor | None:
    """Block-sparse attention [B, T, H, D], or None to run dense."""
    if kwargs.get("dropout"):
        raise UnsupportedCallError(DROPOUT)
    if (reason := _not_causal(inputs, mask)) is not None:
        if any(inputs.view.evicted):
            raise UnsupportedCallError(f"keys were evicted, and {reason}: this call cannot be served.")
        stats.dense(runtime.config.name, reason)
        return None
    calls = list(inputs.calls())
    choices = [runtime.select(inputs.layer, call) for call in calls]
    for call, choice in zip(calls, choices):
        _count(runtime.config.name, inputs.layer, call, choice, stats)
    if all(isinstance(choice, str) for choice in choices) and not any(inputs.view.evicted):
        return None
    parts = [_attention(call, choice) for call, choice in zip(calls, choices)]
    if len(parts) == 1 and parts[0].shape[:3] == inputs.q.shape[:3]:
        return parts[0].transpose(1, 2).contiguous()
    output = inputs.q.new_zeros(*inputs.q.shape[:3], inputs.v.shape[-1])
    for call, part in zip(calls, parts):
        output[call.samples, :, call.query_rows] = part
    return output.transpose(1, 2).contiguous()


def _attention(call: AttentionCall, choice: BlockMask | TokenSubset | HiddenKeys | str) -> Tensor:
    """[b, H, T, D] of one call."""
    if isinstance(choice, BlockMask):
        return block_sparse_attention(call.q, call.k, call.v, choice, call.scale)
    if isinstance(choice, TokenSubset):
        return subset_attention(call.q, call.k, call.v, choice, call.scale)
    if isinstance(choice, HiddenKeys):
        return hidden_keys_attention(call.q, call.k, call.v, choice, call.scale)
    return dense_attention(call.q, call.k, call.v, call.scale)


def _count(
    name: str, layer: int, call: AttentionCall, choice: BlockMask | TokenSubset | HiddenKeys | str, stats: Stats
) -> None:
    if isinstance(choice, str):
        stats.dense(name, choice)
        return
    batch, kv_heads, keys, _ = call.k.shape
    if isinstance(choice, TokenSubset):
        sizes = BLOCK, BLOCK
        stats.attended(name, layer, sum(choice.counts), batch * keys)
    elif isinstance(choice, HiddenKeys):
        sizes = BLOCK, BLOCK
    else:
        sizes = choice.block_q, choice.block_k
    causal = causal_blocks(call.q.shape[2], keys + call.evicted, *sizes)
    read = choice.blocks_read(batch, kv_heads)
    stats.selected(name, layer, read, causal * batch * kv_heads, decode=call.q.shape[2] == 1)


def _calibrated(runtime: Runtime, inputs: LayerInputs, output: Tensor, mask: Any, stats: Stats) -> Tensor:
    """The output [B, T, H, D] with what one method corrects in it."""
    name, layer = runtime.config.name, inputs.layer
    if runtime.any_mask:
        if inputs.view.start is None and inputs.run.tokens.has_holes:
            raise UnsupportedCallError(
                f"{name}: padding stands between real tokens of this batch; it must be on one side."
            )
    elif (reason := _not_causal(inputs, mask)) is not None:
        stats.left_alone(name, reason)
        return output
    corrected, device = None, output.device.type
    for call in inputs.calls():
        here = index_of(call.samples)
        whole = len(call.samples) == output.shape[0] and call.q.shape[2] == output.shape[1]
        plain = (output if whole else output[here, call.query_rows]).transpose(1, 2)
        casts = torch.is_autocast_enabled(device)  # corrections are worked out in float32
        with torch.autocast(device, enabled=False) if casts else nullcontext():
            part = runtime.calibrate(layer, call, plain)
        if isinstance(part, str):
            stats.left_alone(name, part)
            continue
        stats.calibrated(name, layer, call.counts)
        if whole:
            return part.transpose(1, 2)  # one call holds every sample, without padding
        corrected = output.clone() if corrected is None else corrected
        corrected[here, call.query_rows] = part.transpose(1, 2)
    return output if corrected is None else corrected


def _not_causal(inputs: LayerInputs, mask: Any) -> str | None:
    """Why a query does not simply see the keys of its sample up to its own; None where it does."""
    if isinstance(mask, LazyMask) and not mask.is_plain_causal:
        return "the model's own mask is not plain causal"
    if inputs.view.start is None and inputs.run.tokens.has_holes:
        return "padding stands between real tokens"
    return None
