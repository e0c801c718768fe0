"""Hierarchically pruned attention: HiP (arXiv 2406.09827) and the stages of InfiniteHiP (arXiv 2502.08910)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from infer_patch.errors import UnsupportedModelError
from infer_patch.kernels.block_mask import BlockMask, causal_blocks
from infer_patch.kernels.hip import Spans, Stage, block_lists, hip_stages, hip_tree
from infer_patch.method import Method, Runtime, option, register
from infer_patch.selection import plain_attention_layers

BLOCK = 64


@register("hip")
@dataclass(frozen=True, kw_only=True)
class HiP(Method):
    """Each block of queries searches the prompt from coarse to fine for the keys it scores highest.

    Neighbouring keys score alike, so one key can stand for many. `tree` cuts the keys between sinks and window into
    budget / tree_block slots, halves every slot, scores one representative of each half and keeps the better half of
    them, until a slot is one tree block. `stages` cuts them into chunks, finds a representative of each by bisection,
    keeps the best chunks, and goes on within these with smaller chunks. What is found is rounded out to blocks of 64
    keys, which are read whole: several times the budget (the report says how much). Prefill and decode; the cache keeps
    everything. Below about 16,000 tokens the search costs as much as it saves.

    Parameters
    ----------
    variant : {"tree", "stages"}
        The search of HiP, or that of InfiniteHiP (without its change of positions and its offloading).
    budget : int
        tree: keys found for each query block, besides sinks and window; a multiple of `tree_block`.
    tree_block : int
        tree: keys in the smallest piece, 1, 2, 4, ... 64. A small one finds better and is rounded out further.
    representative : {"center", "first"}
        tree: the piece of a branch that is scored for it. "first" needs half the scores.
    stride : int
        tree: in prefill every stride-th query of a block is scored, its last one always.
    key_stride : int
        tree: every key_stride-th key of a tree block is scored.
    refresh : int
        tree: in decode the search is repeated every so many tokens; at most `window` - 64.
    chunks, keep, stage_strides, stage_refresh : tuple of int
        stages: for each stage the chunk size, the keys kept, and as `stride` and `refresh` above. Each chunk size is a
        multiple of the next, the last divides 64. A stage that is due runs again together with those behind it.
    sinks, window : int
        First and recent tokens that are always read; they reach out to blocks of 64.
    per : {"kv", "query"}
        One list for all query heads of a key head, or, as published, one for each query head.
    dense_layers : int, optional
        First layers that stay dense. Default 3, and 4 in models of more than 32 layers. Not together with `layers`.
    dense_below : int
        Up to this many keys, layers run dense (exact, and faster there).
    max_share : float
        Prefill runs dense when more than about this share of the causal key blocks would be read. The estimate lies
        half-way, on a logarithmic scale, between found keys that stand side by side and found keys that stand apart.

    References
    ----------
    Lee et al., "A Training-free Sub-quadratic Cost Transformer Model Serving Framework with Hierarchically Pruned
    Attention", arXiv 2406.09827, ICLR 2025. Lee et al., "InfiniteHiP", arXiv 2502.08910. Lists shared by the query
    heads of a key head and attention blocks of 64 are this project's.
    """

    variant: str = option("tree", 'the search: "tree" (HiP) or "stages" (InfiniteHiP)')
    budget: int = option(512, "tree: keys found for each query block, besides sinks and window")
    tree_block: int = option(2, "tree: keys in the smallest piece, a power of two up to 64")
    representative: str = option("center", 'tree: which piece stands for a branch, "center" or "first"')
    stride: int = option(2, "tree: in prefill, score every stride-th query")
    key_stride: int = option(1, "tree: score every key_stride-th key of a piece")
    refresh: int = option(8, "tree: in decode, search again every so many tokens")
    chunks: tuple[int, ...] = option((256, 32, 8), "stages: chunk size of each stage")
    keep: tuple[int, ...] = option((32768, 8192, 2048), "stages: keys each stage keeps")
    stage_strides: tuple[int, ...] = option((4, 4, 1), "stages: in prefill, score every n-th query")
    stage_refresh: tuple[int, ...] = option((16, 8, 4), "stages: in decode, run a stage again every so many tokens")
    sinks: int = option(16, "first tokens always read, rounded up to 64")
    window: int = option(256, "recent tokens always read")
    per: str = option("kv", 'one list for each key head, "kv", or for each query head, "query"')
    dense_layers: int | None = option(None, "first layers that stay dense (default 3; 4 above 32 layers)")
    dense_below: int = option(2048, "run dense up to this many keys")
    max_share: float = option(0.45, "run prefill dense above this estimated share of causal key blocks")

    ports = ("select",)
    paper = "arXiv 2406.09827"
    summary = "top-k keys by hierarchical search, rounded out to blocks"

    def validate(self) -> None:
        for name, values in (
            ("variant", ("tree", "stages")),
            ("representative", ("center", "first")),
            ("per", ("kv", "query")),
        ):
            self.require(
                getattr(self, name) in values, f"{name} must be {' or '.join(values)}, got {getattr(self, name)!r}"
            )
        self.require(
            1 <= self.tree_block <= BLOCK and BLOCK % self.tree_block == 0,
            f"tree_block must be a power of two from 1 to {BLOCK}, got {self.tree_block}",
        )
        self.require(
            self.budget >= self.tree_block and self.budget % self.tree_block == 0,
            f"budget must be a multiple of tree_block ({self.tree_block} tokens), got {self.budget}",
        )
        self.require(1 <= self.stride <= BLOCK, f"stride must be 1 to {BLOCK}, got {self.stride}")
        self.require(
            1 <= self.key_stride <= self.tree_block,
            f"key_stride must be 1 to tree_block ({self.tree_block}), got {self.key_stride}",
        )
        self.require(self.sinks >= 0, f"sinks must be 0 or more tokens, got {self.sinks}")
        self._validate_stages()
        for refresh in self.intervals:
            self.require(
                1 <= refresh <= self.window - BLOCK,
                f"a search repeated every {refresh} tokens needs refresh >= 1 and a window of at least "
                f"{refresh + BLOCK} tokens, so that newer tokens stay in sight; got window={self.window}",
            )
        self.require(
            self.dense_layers is None or self.dense_layers >= 0,
            f"dense_layers must be 0 or more layers, got {self.dense_layers}",
        )
        self.require(
            self.dense_layers is None or self.layers is None,
            "give either `layers` (act on exactly these) or `dense_layers` (act on all but the first), not both",
        )
        self.require(self.dense_below >= 0, f"dense_below must be 0 or more tokens, got {self.dense_below}")
        self.require(0 < self.max_share <= 1, f"max_share must be above 0 and at most 1, got {self.max_share}")

    def _validate_stages(self) -> None:
        for name in ("chunks", "keep", "stage_strides", "stage_refresh"):
            values = getattr(self, name)
            numbers = isinstance(values, tuple) and all(type(n) is int and n >= 1 for n in values)
            self.require(numbers and len(values) >= 1, f"{name} must be a list of numbers from 1 up, got {values!r}")
            self.require(
                len(values) == len(self.chunks),
                f"chunks, keep, stage_strides and stage_refresh need one number for each stage; chunks has "
                f"{len(self.chunks)}, {name} has {len(values)}",
            )
        sizes = (*self.chunks, 1)
        self.require(
            all(a > b and a % b == 0 for a, b in pairwise(sizes)) and BLOCK % self.chunks[-1] == 0,
            f"chunks must shrink, each a multiple of the next, the last one of 2, 4, ... {BLOCK}, got {self.chunks}",
        )
        self.require(
            all(keep % chunk == 0 for keep, chunk in zip(self.keep, self.chunks))
            and list(self.keep) == sorted(self.keep, reverse=True),
            f"keep must not grow from stage to stage, each a multiple of its chunk {self.chunks}, got {self.keep}",
        )
        self.require(max(self.stage_strides) <= BLOCK, f"stage_strides must be 1 to {BLOCK}, got {self.stage_strides}")

    @property
    def intervals(self) -> tuple[int, ...]:
        """Tokens after which each step of the search is due again."""
        return (self.refresh,) if self.variant == "tree" else self.stage_refresh

    @property
    def found(self) -> tuple[int, int]:
        """(keys found for a query block, keys in the smallest piece)."""
        return (self.budget, self.tree_block) if self.variant == "tree" else (self.keep[-1], self.chunks[-1])

    def applicable_layers(self, parts: Any) -> tuple[int, ...]:
        possible = plain_attention_layers(self.name, parts)
        if self.layers is not None:
            return possible
        dense = self.dense_layers if self.dense_layers is not None else 3 if parts.num_layers <= 32 else 4
        left = tuple(layer for layer in possible if layer >= dense)
        if not left:
            raise UnsupportedModelError(
                f"{self.name}: the first {dense} layers stay dense, and {parts.model_type} has no other layer that it "
                f"could act on ({parts.num_layers} in all). Set `dense_layers` lower, or name the `layers`."
            )
        return left

    def runtime(self, parts: Any, layers: tuple[int, ...]) -> Runtime:
        return _HiP(self, parts, layers)


class _HiP(Runtime):
    config: HiP

    def select(self, layer: int, call: Any) -> BlockMask | str:
        config, keys, queries = self.config, call.k.shape[2], call.q.shape[2]
        spans = Spans.of(queries, keys, config.sinks, config.window, BLOCK)
        if spans.end(spans.count - 1) - spans.start <= config.found[0]:
            return "sinks, window and budget cover every key"
        if keys <= config.dense_below:
            return f"at most {config.dense_below} keys"
        if queries > BLOCK and estimated_share(spans, queries, keys, *config.found) > config.max_share:
            return f"more than about {config.max_share:.0%} of the key blocks would be read"
        if queries > 1:
            kept = self._search(call, spans, [])
        else:
            spans, kept = self._remembered(call, spans)
        return block_lists(kept[-1], spans, queries, keys)

    def _search(self, call: Any, spans: Spans, reuse: list[Tensor]) -> list[Tensor]:
        """What each step of the search keeps; the first steps are taken from `reuse`."""
        config, lists = self.config, call.k.shape[1] if self.config.per == "kv" else call.q.shape[1]
        if config.variant == "stages":
            stages = [Stage(*numbers) for numbers in zip(config.chunks, config.keep, config.stage_strides)]
            return hip_stages(call.q, call.k, spans, stages, lists=lists, reuse=reuse)
        kept = hip_tree(
            call.q,
            call.k,
            spans,
            budget=config.budget,
            tree_block=config.tree_block,
            representative=config.representative,
            stride=config.stride,
            key_stride=config.key_stride,
            lists=lists,
        )
        return [kept]

    def _remembered(self, call: Any, spans: Spans) -> tuple[Spans, list[Tensor]]:
        """The search of an earlier token as long as it is fresh, and the span it searched; what is due runs again.

        Everything behind that span is read, so no key goes unseen that has left the window since.
        """
        keys, intervals = call.k.shape[2], self.config.intervals
        searched, since, kept = call.state.get(self.config, (spans, (), []))
        fresh = 0
        while fresh < len(since) and 0 <= keys - since[fresh] < intervals[fresh]:
            fresh += 1
        if fresh == 0:
            searched = spans
        if fresh < len(intervals):
            kept = self._search(call, searched, kept[:fresh])
            call.state[self.config] = searched, (*since[:fresh], *(keys,) * (len(intervals) - fresh)), kept
        return searched, kept


def estimated_share(spans: Spans, queries: int, keys: int, found: int, piece: int) -> float:
    """Share of the causal key blocks that will be read, over the query blocks of a call.

    Keys found in pieces touch between found / 64 and found / piece blocks; the geometric mean of both fits searches
    on real keys within a third.
    """
    read = 0.0
    for i in range(spans.count):
        between = (spans.end(i) - spans.start) // BLOCK
        visible = min(spans.first + i + 1, -(-keys // BLOCK))
        touched = math.sqrt(min(between, found / BLOCK) * min(between, found / piece))
        read += visible - between + min(between, touched)
    return read / causal_blocks(queries, keys, BLOCK, BLOCK)
