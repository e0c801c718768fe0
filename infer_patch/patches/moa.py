"""MoA: a span of its own for every head, growing with the length of the text (arXiv 2406.14909)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infer_patch.cache import IndexedLayer
from infer_patch.errors import PlanError
from infer_patch.files import read_json
from infer_patch.kernels.block_mask import BlockMask, sink_window_blocks
from infer_patch.method import Method, Runtime, option, register
from infer_patch.ring_cache import RingLayer
from infer_patch.selection import plain_attention_layers
from infer_patch.spans import Horizon, window_blocks

VERSION = 1
_REMEMBERED = 1024  # lengths whose windows are not worked out again, in each layer
_REMEDY = "Make one with `infer-patch calibrate moa`, or take a published plan of this layout."


@register("moa")
@dataclass(frozen=True, kw_only=True)
class MoA(Method):
    """Every head reads the first tokens and its own span of recent ones; spans grow with the text, head by head.

    Some heads look at their neighbourhood only, some at everything, and which is which can be measured. A plan holds
    two numbers for each head: its span is alpha + beta N tokens in a text of N. `infer-patch calibrate moa` finds them
    for one model and one density: the share of all keys that a head holds on average. At equal memory this keeps far
    more than one window for all (`sink_window`).

    Reads in blocks of 64 tokens, counted from each sample's first real token; the first block is always read. N is
    the prompt plus `new_tokens`, set when the prompt enters the cache. When a text outgrows it, N is set again.

    Parameters
    ----------
    plan_file : str
        JSON file with `alphas` and `betas`, a list of numbers for every layer: one per query head (the layout of the
        published plans; a key head then takes the longest span of its query heads) or one per key head. A bare name
        that is no file here is looked for among the plans that ship with the package.
    new_tokens : int
        Tokens that N counts beyond the prompt.
    length : int, optional
        A fixed N instead of prompt plus `new_tokens`: memory and spans then never change, and a prompt in chunks, a
        second turn and a run without cache read the same. Texts longer than that keep the spans of this length.
    evict : bool
        Keep only the spans in the cache, in rings: constant memory, less for every head by what it does not read.
        What is gone cannot come back in a later turn. Without it the cache keeps everything.
    dense_below : int
        Up to this many keys, layers run dense (exact, and faster there). Not used with `evict`.

    References
    ----------
    Fu et al., "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression", arXiv 2406.14909.
    """

    plan_file: str = option("", "JSON file with the spans, made by `infer-patch calibrate moa`")
    new_tokens: int = option(1024, "tokens that N counts beyond the prompt")
    length: int | None = option(None, "a fixed N instead of prompt plus new tokens")
    evict: bool = option(False, "keep only the spans in the cache, in rings")
    dense_below: int = option(2048, "run dense up to this many keys (without evict)")

    ports = ("select",)
    paper = "arXiv 2406.14909"
    summary = "a span per head that grows with the text, from a calibrated plan; optionally ring caches"
    artifact = "a plan file (infer-patch calibrate moa)"

    def validate(self) -> None:
        named = isinstance(self.plan_file, str) and bool(self.plan_file)
        self.require(named, f"plan_file must name a JSON file, got {self.plan_file!r}. {_REMEDY}")
        self.require(self.new_tokens >= 0, f"new_tokens must be 0 or more, got {self.new_tokens}")
        self.require(self.length is None or self.length >= 1, f"length must be 1 or more tokens, got {self.length}")
        self.require(self.dense_below >= 0, f"dense_below must be 0 or more tokens, got {self.dense_below}")

    def active_ports(self) -> tuple[str, ...]:
        return ("select", "store") if self.evict else ("select",)

    def applicable_layers(self, parts: Any) -> tuple[int, ...]:
        return plain_attention_layers(self.name, parts)

    def runtime(self, parts: Any, layers: tuple[int, ...]) -> Runtime:
        return _MoA(self, parts, layers)


@dataclass(frozen=True)
class SpanPlan:
    """Elastic spans: alphas[layer][head] + betas[layer][head] * N tokens, sinks included.

    `sink` and `block` are tokens; `per` says whether heads are those of queries ("query") or of keys ("kv"). Without
    it, as in published plans, their number tells.
    """

    alphas: tuple[tuple[float, ...], ...]
    betas: tuple[tuple[float, ...], ...]
    sink: int = 64
    block: int = 64
    per: str | None = None

    @property
    def heads(self) -> int:
        return len(self.alphas[0])

    def windows(self, layer: int, length: int, kv_heads: int) -> tuple[int, ...]:
        """Blocks in the window of each key head at N = length: the most that one of its query heads has.

        Query head h reads key head h // G, as in transformers.
        """
        spans = [
            window_blocks(alpha, beta, length, self.sink, self.block)
            for alpha, beta in zip(self.alphas[layer], self.betas[layer])
        ]
        group = len(spans) // kv_heads
        return tuple(max(spans[h * group : (h + 1) * group]) for h in range(kv_heads))

    def density(self, length: int, kv_heads: int | None = None, layers: Sequence[int] | None = None) -> float:
        """Mean share of the key blocks that one row reads at most, at N = length; over key heads, or the plan's own."""
        blocks = -(-length // self.block)
        shares = [
            min((self.sink // self.block + window) / blocks, 1.0)
            for layer in (range(len(self.alphas)) if layers is None else layers)
            for window in self.windows(layer, length, kv_heads or self.heads)
        ]
        return sum(shares) / len(shares)

    def to_dict(self) -> dict[str, Any]:
        """The published layout and our fields beside it."""
        return {
            "version": VERSION,
            "block": self.block,
            "sink": self.sink,
            **({} if self.per is None else {"per": self.per}),
            "alphas": [list(row) for row in self.alphas],
            "betas": [list(row) for row in self.betas],
        }

    @classmethod
    def from_dict(cls, values: Any, source: str = "the plan") -> SpanPlan:
        """Read the layout of `to_dict`; of the published fields `alphas` and `betas`, the others have defaults.

        Raises
        ------
        PlanError
            Naming the field, what it holds and what was expected.
        """

        def wrong(problem: str) -> PlanError:
            return PlanError(f"moa: {source}: {problem}. {_REMEDY}")

        if not isinstance(values, dict) or not {"alphas", "betas"} <= set(values):
            raise wrong(f"expected an object with `alphas` and `betas`, got {_short(values)}")
        version, block, sink = values.get("version", VERSION), values.get("block", 64), values.get("sink", 64)
        per = values.get("per")
        if version != VERSION:
            raise wrong(f"it has version {version!r}, this release reads version {VERSION}")
        if not _is_int(block) or block < 16 or block % 16:
            raise wrong(f"block must be a multiple of 16 tokens, got {block!r}")
        if not _is_int(sink) or sink < 0 or sink % block:
            raise wrong(f"sink must be a multiple of the block, {block} tokens, got {sink!r}")
        if per not in (None, "query", "kv"):
            raise wrong(f"per must be 'query' or 'kv', got {per!r}")
        tables = []
        for name in ("alphas", "betas"):
            rows = values[name]
            if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
                raise wrong(f"{name} must be a list of numbers for each layer, got {_short(rows)}")
            odd = [x for row in rows for x in row if not _is_number(x) or (name == "betas" and not 0 <= x <= 1)]
            if odd:
                expected = "tokens, as finite numbers" if name == "alphas" else "shares of the length, from 0 to 1"
                raise wrong(f"{name} are {expected}, got {odd[0]!r}")
            tables.append(tuple(tuple(float(x) for x in row) for row in rows))
        shapes = [[len(row) for row in table] for table in tables]
        if shapes[0] != shapes[1] or len(set(shapes[0])) != 1:
            raise wrong(
                f"alphas and betas must have one number for each of equally many heads in every layer; alphas have "
                f"{_short(shapes[0])} heads, betas {_short(shapes[1])}"
            )
        return cls(tables[0], tables[1], sink=sink, block=block, per=per)

    def check(self, layers: int, heads: int, kv_heads: int, source: str = "the plan") -> None:
        """Raise `PlanError` unless the plan is for a model of this shape."""
        expected = {"query": (heads,), "kv": (kv_heads,), None: (heads, kv_heads)}[self.per]
        if len(self.alphas) != layers or self.heads not in expected:
            kind = {"query": " query", "kv": " key", None: ""}[self.per]
            raise PlanError(
                f"moa: {source} holds {len(self.alphas)} layers of {self.heads}{kind} heads; this model has {layers} "
                f"layers of {heads} query and {kv_heads} key heads. {_REMEDY}"
            )


def read_plan(path: str | Path) -> SpanPlan:
    """Read a plan file; a bare name that is no file here is looked for in `infer_patch/configs`."""
    return SpanPlan.from_dict(read_json(path, "plan file", PlanError, _REMEDY, "moa"), f"the plan file {path}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class _MoA(Runtime):
    config: MoA

    def __init__(self, config: MoA, parts: Any, layers: tuple[int, ...]):
        super().__init__(config, parts, layers)
        self.plan = read_plan(config.plan_file)
        self.plan.check(parts.num_layers, parts.num_heads, parts.num_kv_heads, f"the plan file {config.plan_file}")
        self.horizon = Horizon(config.new_tokens, config.length)
        self.windows = {layer: _Windows(self.plan, layer) for layer in layers}
        before, after = (self.plan.density(8192, heads, layers) for heads in (None, parts.num_kv_heads))
        if round(before, 2) != round(after, 2):
            warnings.warn(
                f"moa: {config.plan_file} gives spans per query head; key heads take the longest of their group, which "
                f"raises the mean density at 8,192 tokens from {before:.2f} to {after:.2f}.",
                stacklevel=2,
            )

    def select(self, layer: int, call: Any) -> BlockMask | str:
        config, plan, keys, queries = self.config, self.plan, call.k.shape[2], call.q.shape[2]
        length = self.horizon.of(call.notes, call.tokens.past + call.tokens.length, keys)
        if not config.evict and keys <= config.dense_below:
            return f"at most {config.dense_below} keys"
        windows = self.windows[layer](length, call.k.shape[1])
        if -(-keys // plan.block) <= plan.sink // plan.block + min(windows):
            return "the spans cover every key"
        shared, key = call.tokens.shared, (self, queries, keys, windows)
        if key not in shared:
            shared[key] = sink_window_blocks(queries, keys, plan.sink, windows, plan.block, call.q.device)
        return shared[key]

    def cache_layer(self, layer: int) -> IndexedLayer:
        return RingLayer(self.windows[layer], self.horizon, self.plan.sink, self.plan.block)


@dataclass(frozen=True)
class _Windows:
    """Blocks in the window of each key head of one layer, as a function of N and the number of key heads."""

    plan: SpanPlan
    layer: int
    known: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)

    def __call__(self, length: int, kv_heads: int) -> tuple[int, ...]:
        key = length, kv_heads
        if key not in self.known:
            if len(self.known) >= _REMEMBERED:
                self.known.clear()
            self.known[key] = self.plan.windows(self.layer, *key)
        return self.known[key]
