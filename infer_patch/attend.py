"""Attention of a layer in which methods take part: observe, select, run sparse or dense, calibrate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from infer_patch.attention import LazyMask, Port
from infer_patch.errors import UnsupportedCallError
from infer_patch.kernels.block_mask import BlockMask, causal_blocks
from infer_patch.kernels.block_sparse_attention import block_sparse_attention
from infer_patch.kernels.dense_attention import dense_attention
from infer_patch.method import Runtime
from infer_patch.run import AttentionCall, LayerInputs
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
    if held is not None and held.attends:
        if kwargs.get("dropout"):
            raise UnsupportedCallError(DROPOUT)
        output = held.attention(inputs, mask)
        if held.counted is not None and layer in engine.stores:
            name = engine.stores[layer].config.name
            engine.stats.selected(name, layer, *held.counted, decode=q.shape[2] == 1)
    elif layer in engine.selectors:
        output = _sparse(engine.selectors[layer], inputs, mask, kwargs, engine.stats)
    if output is None:
        output, weights = port.dense(module, q, k, v, _dense_mask(inputs, mask), **kwargs)
    for runtime in engine.calibrators.get(layer, ()):
        output = _calibrated(runtime, inputs, output, engine.stats)
    return output, weights


def _dense_mask(inputs: LayerInputs, mask: Any) -> Any:
    """What the model's own attention gets as its mask: over the rows that are here."""
    run, view = inputs.run, inputs.view
    if view.positions is None or (run.held(inputs.layer) is None and run.reduction is None):
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
    reason = None
    if isinstance(mask, LazyMask) and not mask.is_plain_causal:
        reason = "the model's own mask is not plain causal"
    elif inputs.view.start is None and inputs.run.tokens.has_holes:
        reason = "padding stands between real tokens"
    if reason is not None:
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
    parts = [
        block_sparse_attention(call.q, call.k, call.v, choice, inputs.scale)
        if isinstance(choice, BlockMask)
        else dense_attention(call.q, call.k, call.v, inputs.scale)
        for call, choice in zip(calls, choices)
    ]
    if len(parts) == 1 and parts[0].shape[:3] == inputs.q.shape[:3]:
        return parts[0].transpose(1, 2).contiguous()
    output = inputs.q.new_zeros(*inputs.q.shape[:3], inputs.v.shape[-1])
    for call, part in zip(calls, parts):
        output[call.samples, :, call.query_rows] = part
    return output.transpose(1, 2).contiguous()


def _count(name: str, layer: int, call: AttentionCall, choice: BlockMask | str, stats: Stats) -> None:
    if isinstance(choice, str):
        stats.dense(name, choice)
        return
    batch, kv_heads, keys, _ = call.k.shape
    causal = causal_blocks(call.q.shape[2], keys + call.evicted, choice.block_q, choice.block_k)
    read = choice.blocks_read(batch, kv_heads)
    stats.selected(name, layer, read, causal * batch * kv_heads, decode=call.q.shape[2] == 1)


def _calibrated(runtime: Runtime, inputs: LayerInputs, output: Tensor, stats: Stats) -> Tensor:
    if inputs.view.start is None and inputs.run.tokens.has_holes:
        raise UnsupportedCallError(
            f"{runtime.config.name}: padding stands between real tokens of this batch; it must be on one side."
        )
    corrected = output.transpose(1, 2).clone()
    for call in inputs.calls():
        part = corrected[call.samples, :, call.query_rows]
        corrected[call.samples, :, call.query_rows] = runtime.calibrate(inputs.layer, call, part)
    counts = stats.methods[runtime.config.name].calibrated
    counts[inputs.layer] = counts.get(inputs.layer, 0) + 1
    return corrected.transpose(1, 2).contiguous()
