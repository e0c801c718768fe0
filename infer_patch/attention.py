"""The one attention function and the one mask function registered with transformers, both named "infer_patch".

Attention modules look both up through their configuration. A patched model carries its own copy of that configuration
with our name in it, and each patched attention module carries a `Port`. The port passes calls on to the
implementation the model was loaded with (SDPA, flash-attn, eager, ...) wherever no method takes part, with the very
mask that implementation builds, so that such layers change no bit.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from infer_patch.errors import UnsupportedModelError
from infer_patch.tokens import INVALID

if TYPE_CHECKING:
    from infer_patch.engine import Engine

NAME = "infer_patch"
DenseAttention = Callable[..., "tuple[Tensor, Tensor | None]"]
PORT = "_infer_patch"  # attribute of a patched attention module


class ImplementationName(str):
    """Our name in a configuration, remembering the implementation it stands in front of."""

    base: str
    lazy: bool  # put masks off? Not for the identity plan: nobody would ask for anything but the mask itself

    def __new__(cls, base: str, lazy: bool) -> ImplementationName:
        name = super().__new__(cls, NAME)
        name.base, name.lazy = base, lazy
        return name

    def __reduce__(self) -> tuple[Any, ...]:
        return ImplementationName, (self.base, self.lazy)


class LazyMask:
    """Stands for the mask a model asked for, until somebody needs it written out.

    Dense layers get exactly what their own implementation builds (`dense`), once per forward call. Methods read the
    2-D padding mask and logical indices instead, and no T x T mask exists. Reduced layers get a mask over the rows
    they hold (`over_rows`).
    """

    def __init__(self, builder: Callable[..., Any], arguments: dict[str, Any]):
        self._builder = builder
        self._arguments = arguments
        self._built: dict[Any, Any] = {}

    @property
    def is_plain_causal(self) -> bool:
        """Whether a token sees all real tokens before it: no window, no two-way image block, no packed sequences."""
        return self._arguments.get("mask_function", causal_mask_function) is causal_mask_function

    @property
    def is_ordered(self) -> bool:
        """Whether it is causal, within a window or not, and nothing was added to that (image blocks, packing)."""
        return bool(self._arguments.get("allow_is_causal_skip", True))

    def dense(self) -> Any:
        """The mask as the model's own implementation builds it (None where that skips it)."""
        if "dense" not in self._built:
            self._built["dense"] = self._builder(**self._arguments)
        return self._built["dense"]

    def over_rows(self, queries: Tensor | None, keys: Tensor, rows: int, start: tuple[int, ...]) -> Any:
        """The mask of `rows` query rows over key rows given by their logical indices.

        queries [B, m] and keys [B, n] are logical indices (queries None: the newest m tokens); `start` counts the
        filler rows of each sample.
        """
        key = (rows, keys.shape[1], start, None if self.is_plain_causal else (id(queries), id(keys)))
        if key not in self._built:
            self._built[key] = self._build_over_rows(queries, keys, rows, start), (queries, keys)
        return self._built[key][0]

    def _build_over_rows(self, queries: Tensor | None, keys: Tensor, rows: int, start: tuple[int, ...]) -> Any:
        n = keys.shape[1]
        filled = None
        if any(start):
            filled = torch.arange(n, device=keys.device) >= torch.tensor(start, device=keys.device)[:, None]
        arguments = dict(self._arguments, kv_length=n, kv_offset=0, attention_mask=filled)
        if "cache_position" in arguments:  # transformers 5.2
            arguments["cache_position"] = torch.arange(n - rows, n, device=keys.device)
        else:
            arguments.update(q_length=rows, q_offset=n - rows)
        if not self.is_plain_causal:
            original, offset = self._arguments["mask_function"], n - rows
            key_positions = keys.masked_fill(keys == INVALID, 0)  # fillers are hidden by `filled`
            query_positions = (
                key_positions[:, offset:] if queries is None else queries.masked_fill(queries == INVALID, 0)
            )

            def on_positions(b: Any, h: Any, q: Any, k: Any) -> Any:
                return original(b, h, query_positions[b, q - offset], key_positions[b, k])

            arguments.update(mask_function=on_positions, allow_is_causal_skip=False, use_vmap=True)
        return self._builder(**arguments)


class Port:
    """What a patched attention module carries: its layer's number, its own attention function, and the engine."""

    def __init__(self, engine: Engine, layer: int, dense: DenseAttention, active: bool):
        self.engine = engine
        self.layer = layer
        self.dense = dense
        self.active = active  # does any method need to see this layer's attention?


def base_attention(module: nn.Module, implementation: str) -> DenseAttention:
    """The attention function a module would call without us.

    Raises
    ------
    UnsupportedModelError
        When the model runs eager attention and its modelling file has no such function.
    """
    if implementation in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[implementation]
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} runs {implementation!r} attention, which was not found in transformers. "
            'Load the model with attn_implementation="sdpa".'
        )
    return function


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """query [B, H, T, D], key and value [B, H_kv, S, D] after rotary embedding and cache -> ([B, T, H, D], weights)."""
    port: Port = getattr(module, PORT)
    if port.active:
        return port.engine.attend(port, module, query, key, value, attention_mask, kwargs)
    mask = attention_mask.dense() if isinstance(attention_mask, LazyMask) else attention_mask
    return port.dense(module, query, key, value, mask, **kwargs)


class _Forwards(threading.local):
    """The engines whose models this thread is in the forward of."""

    def __init__(self) -> None:
        self.open: set[int] = set()


forwards = _Forwards()


def mask_forward(*, config: Any, **kwargs: Any) -> Any:
    """The mask request of a patched model: put off (`LazyMask`) within a forward that methods take part in."""
    name = config._attn_implementation
    mask = LazyMask(ALL_MASK_ATTENTION_FUNCTIONS.get(name.base, sdpa_mask), dict(kwargs, config=config))
    return mask if name.lazy and forwards.open else mask.dense()


ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask_forward)
