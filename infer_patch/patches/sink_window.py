"""Attention sinks plus a recent window (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from infer_patch.cache import IndexedLayer
from infer_patch.kernels.block_mask import BlockMask, blocks_of_window, sink_window_blocks
from infer_patch.method import Method, Runtime, option, register
from infer_patch.selection import plain_attention_layers
from infer_patch.windowed_cache import WindowedLayer

BLOCK = 64


@register("sink_window")
@dataclass(frozen=True, kw_only=True)
class SinkWindow(Method):
    """Every token reads the first tokens of the prompt and a recent window, nothing between.

    Language models rest much of their attention on the first tokens ("sinks"); with those kept, a window gives fluent
    text at constant cost. What stands between sinks and window is not read at all, so facts there are lost: use this
    for streaming and as a baseline, not for retrieval. Positions are the true ones (no re-indexing), so the context
    limit of the model still holds.

    Reads in blocks of 64 tokens, counted from each sample's first real token: sinks round up to whole blocks, and a
    block is read when any of its keys lies in the window of any query of the block.

    Parameters
    ----------
    sinks : int
        Tokens at the start that stay visible (rounded up to 64).
    window : int
        Recent tokens each token sees at least, itself included.
    evict : bool
        Drop keys and values outside the window from the cache: constant memory. They cannot come back in a later turn.
        Without it the cache keeps everything, and only reading is saved.
    dense_below : int
        Up to this many keys, layers run dense (exact, and faster there). Not used with `evict`.

    References
    ----------
    Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453.
    """

    sinks: int = option(4, "first tokens that stay visible, rounded up to 64")
    window: int = option(1024, "recent tokens each token sees")
    evict: bool = option(False, "drop keys outside the window from the cache")
    dense_below: int = option(2048, "run dense up to this many keys (without evict)")

    ports = ("select",)
    paper = "arXiv 2309.17453"
    summary = "attention sinks + recent window, optionally with eviction"

    def validate(self) -> None:
        self.require(self.sinks >= 0, f"sinks must be 0 or more tokens, got {self.sinks}")
        self.require(self.window >= BLOCK, f"window must be at least {BLOCK} tokens, got {self.window}")
        self.require(self.dense_below >= 0, f"dense_below must be 0 or more tokens, got {self.dense_below}")

    def active_ports(self) -> tuple[str, ...]:
        return ("select", "store") if self.evict else ("select",)

    def applicable_layers(self, parts: Any) -> tuple[int, ...]:
        return plain_attention_layers(self.name, parts)

    def runtime(self, parts: Any, layers: tuple[int, ...]) -> Runtime:
        return _SinkWindow(self, parts, layers)


class _SinkWindow(Runtime):
    config: SinkWindow

    def select(self, layer: int, call: Any) -> BlockMask | str:
        config, keys, queries = self.config, call.k.shape[2], call.q.shape[2]
        if not config.evict and keys <= config.dense_below:
            return f"at most {config.dense_below} keys"
        if keys + call.evicted <= config.window:
            return "the window covers every key"
        shared = call.tokens.shared  # lists are the same in every layer
        key = (self, queries, keys)
        if key not in shared:
            window = blocks_of_window(config.window, BLOCK)
            shared[key] = sink_window_blocks(queries, keys, config.sinks, [window], BLOCK, call.q.device)
        return shared[key]

    def cache_layer(self, layer: int) -> IndexedLayer:
        return WindowedLayer(self.config.sinks, self.config.window, BLOCK)
