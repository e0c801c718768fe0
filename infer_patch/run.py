"""The state of one forward call, and what a method sees of one layer's attention."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from infer_patch.attention import LazyMask
from infer_patch.cache import IndexedLayer, KeyView
from infer_patch.errors import UnsupportedCallError
from infer_patch.row_edits import RowEdit
from infer_patch.tokens import Reduction, Tokens


@dataclass
class AttentionCall:
    """One layer's attention for samples that are padded alike, without their padding.

    q [b, H, T, D], k and v [b, H_kv, S, D]; the last T keys belong to the queries, and a query sees the keys up to
    its own. `samples` are their rows in the batch. `state` is kept with the keys: it is empty whenever keys were
    reordered, dropped or are new; `notes` last as long as the cache, for all its samples; `memory` is a dict for each
    sample, which follows it through beams (`IndexedLayer.memory_of`). `positions` [b, S] are logical indices. What a
    method adds to `counts` is summed up for the report. `ordered` is False where the model's own mask is more than
    causal: some tokens look forward, say. `lse` [b, H, T] is the log-sum-exp of the rows, where the model's own
    attention told it (asked for with `reads_lse`). `edits` are what methods before did to the probabilities; a method
    appends its own for those after it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    samples: list[int]
    tokens: Tokens
    positions: Tensor
    evicted: int = 0
    state: dict[Any, Any] = field(default_factory=dict)
    notes: dict[Any, Any] = field(default_factory=dict)
    memory: list[dict[Any, Any]] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    query_rows: slice = field(default_factory=lambda: slice(None))
    ordered: bool = True
    lse: Tensor | None = None
    edits: list[RowEdit] = field(default_factory=list)

    @property
    def past(self) -> int:
        """Keys before the first query."""
        return self.k.shape[2] - self.q.shape[2]


@dataclass
class Run:
    """One forward call of the text model.

    `keep_outputs`: may earlier hidden states still be read by someone (recorded, or needed for gradients)? `mask` is
    set when an outer model made the mask. `full` and `layer_input` hold hidden states while a layer works on its rows.
    """

    tokens: Tokens
    cache: Cache | None
    keep_outputs: bool
    reduction: Reduction | None = None
    mask: LazyMask | None = None
    full: Tensor | None = None
    layer_input: Tensor | None = None

    def held(self, layer: int) -> IndexedLayer | None:
        """Our cache layer of this number, if there is one."""
        if self.cache is None or layer >= len(self.cache.layers):
            return None
        held = self.cache.layers[layer]
        return held if isinstance(held, IndexedLayer) else None

    def key_view(self, layer: int, rows: int) -> KeyView:
        """Which tokens the key rows of a layer are."""
        held = self.held(layer)
        if held is not None:
            return held.view
        if self.reduction is None:
            return self._newest(rows)
        return KeyView(rows, self.reduction.start, self.reduction.positions(self.tokens.past))

    def every_row(self, rows: int) -> tuple[Tensor, tuple[int, ...]]:
        """Logical indices [B, rows] of key rows none of which was dropped, and the padding before each sample."""
        key = ("every row", rows)
        if key not in self.tokens.shared:
            numbers = torch.arange(rows, device=self.tokens.device).expand(self.tokens.batch, -1)
            padding = tuple(first for first, _ in self.tokens.bounds or [(0, rows)] * self.tokens.batch)
            self.tokens.shared[key] = numbers, padding
        return self.tokens.shared[key]

    def _newest(self, rows: int) -> KeyView:
        """The view of a layer of transformers' own: with a window, it has let go of its oldest rows."""
        tokens = self.tokens
        gone = tokens.past + tokens.length - rows
        if gone <= 0:
            return KeyView(rows)
        bounds = tokens.bounds or [(0, 0)] * tokens.batch
        newest = torch.arange(gone, gone + rows, device=tokens.device).expand(tokens.batch, -1)
        return KeyView(rows, tuple(min(max(first - gone, 0), rows) for first, _ in bounds), newest)

    def once(self, value: Tensor, make: Any) -> Tensor:
        """make(value), computed once per reduction: layers share masks, positions and rotary tables."""
        key = (id(value), id(self.reduction))
        if key not in self.tokens.shared:
            self.tokens.shared[key] = make(value), value, self.reduction
        return self.tokens.shared[key][0]


@dataclass
class LayerInputs:
    """Queries, keys and values of one layer as the model hands them to attention, padding and all."""

    run: Run
    layer: int
    view: KeyView
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    ordered: bool = True
    lse: Tensor | None = None
    edits: dict[tuple[int, ...], list[RowEdit]] = field(default_factory=dict)  # by the samples of a call

    def calls(self) -> Iterator[AttentionCall]:
        """Samples that are padded alike, with their padding cut off."""
        batch, n = self.q.shape[0], self.k.shape[2]
        offset = n - self.q.shape[2]
        if self.view.start is not None:
            spans = [(start, n) for start in self.view.start]
        else:
            spans = self.run.tokens.bounds or [(0, n)] * batch
        groups: dict[tuple[int, int, int], list[int]] = {}
        for sample, (span, gone) in enumerate(zip(spans, self.view.evicted or (0,) * batch)):
            groups.setdefault((*span, gone), []).append(sample)
        held = self.run.held(self.layer)
        for (start, stop, gone), samples in groups.items():
            rows = slice(max(start - offset, 0), stop - offset)
            if rows.start >= rows.stop:
                continue  # nothing but padding
            here = index_of(samples)
            q, k, v, lse = self.q, self.k, self.v, self.lse
            if len(samples) < batch or stop - start < n:
                q, k, v = q[here, :, rows], k[here, :, start:stop], v[here, :, start:stop]
                lse = None if lse is None else lse[here, :, rows]
            yield AttentionCall(
                q=q,
                k=k,
                v=v,
                scale=self.scale,
                samples=samples,
                tokens=self.run.tokens,
                positions=self._positions(samples, start, stop),
                evicted=gone,
                state={} if held is None else held.state.setdefault((start, *samples), {}),
                notes={} if held is None else held.notes,
                memory=[{} if held is None else held.memory_of(sample) for sample in samples],
                query_rows=rows,
                ordered=self.ordered,
                lse=lse,
                edits=self.edits.setdefault(tuple(samples), []),
            )

    def _positions(self, samples: list[int], start: int, stop: int) -> Tensor:
        if self.view.positions is not None:
            return self.view.positions[index_of(samples), start:stop]
        shared, device, rows = self.run.tokens.shared, self.k.device, self.k.shape[2]
        key = ("positions", rows, start, stop, device, *samples)
        if key not in shared:
            shared[key] = self.run.every_row(rows)[0][index_of(samples), start:stop].to(device)
        return shared[key]


def index_of(samples: list[int]) -> Any:
    """A slice (no copy) where the samples stand side by side."""
    first, last = samples[0], samples[-1]
    return slice(first, last + 1) if last - first + 1 == len(samples) else samples


class ThreadState(threading.local):
    """Run state of the current thread; copies and pickles of a patched model start without any."""

    def __init__(self) -> None:
        self.open: list[nn.Module] = []
        self.inputs: dict[str, Any] = {}
        self.run: Run | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ThreadState, ()


def padding_mask(mask: Any, total: int, device: torch.device) -> Tensor | None:
    """The 2-D padding mask as bool [B, total], or None when nothing is padded."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    if mask.shape[1] != total:
        raise UnsupportedCallError(
            f"the attention mask covers {mask.shape[1]} tokens, cache and new tokens are {total}; "
            "pass one entry for each."
        )
    mask = mask.to(device=device, dtype=torch.bool)
    return None if bool(mask.all()) else mask
