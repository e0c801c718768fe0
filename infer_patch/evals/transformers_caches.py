"""transformers' own cache layers as sides of `bench decode --with-cache`: the growing one and the quantised ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, HQQQuantizedLayer, QuantoQuantizedLayer

from infer_patch.evals.attention_sides import Side, sdpa

RESIDUAL, GROUP = 128, 64  # tokens kept as they are, elements that share parameters
BACKENDS = {"quanto": "optimum.quanto", "hqq": "hqq"}  # and the packages they need
_LAYERS: dict[str, Any] = {"quanto": QuantoQuantizedLayer, "hqq": HQQQuantizedLayer}


class CacheSide(Side):
    """SDPA over what a cache layer of transformers hands out; `extend` is its update."""

    def __init__(self, name: str, make: Callable[[], Any] = DynamicLayer, kind: str = "dense"):
        super().__init__(name)
        self.kind = kind
        self._make = make

    def start(self) -> None:
        super().start()
        self._layer, self._held = self._make(), 0

    def extend(self, k: Tensor, v: Tensor, keys: int) -> None:
        self.k, self.v = self._layer.update(k[:, :, self._held : keys], v[:, :, self._held : keys])
        self._held = keys

    def attend(self, q: Tensor) -> Tensor:
        return sdpa(q, self.k, self.v)

    def cache_bytes(self) -> int:
        return held_bytes(self._layer)


def quantised_sides() -> tuple[list[Side], dict[str, str]]:
    """transformers' quantised layers at 4 and 2 bits; and those that cannot run here, with the reason."""
    sides: list[Side] = []
    skipped = {}
    for backend, package in BACKENDS.items():
        for bits in (4, 2):
            name = f"{backend}, {bits} bits"
            if installed(package):
                make = partial(_LAYERS[backend], **layer_settings(bits))
                sides.append(CacheSide(name, make, "transformers"))
            else:
                skipped[name] = f"the package {package} is not installed"
    return sides, skipped


def layer_settings(bits: int) -> dict[str, int]:
    """Arguments of a quantised layer: groups of 64 numbers, the newest 128 tokens as they are, and transformers'
    default axis (with axis 1, hqq refuses 2 bits at most lengths)."""
    return {"nbits": bits, "q_group_size": GROUP, "residual_length": RESIDUAL}


def installed(package: str) -> bool:
    """Whether a package, or one inside a namespace package, can be found; nothing is imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package it is in
        return False


def held_bytes(layer: Any) -> int:
    """Bytes of the keys and values of a cache layer, with the parameters they need."""
    if hasattr(layer, "nbytes"):
        return int(layer.nbytes())
    return sum(x.numel() * x.element_size() for x in tensors_in(vars(layer)))


def tensors_in(value: Any, modules: tuple[str, ...] = (), seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor in nested containers, also those inside tensor subclasses; each once.

    With `modules`, objects of classes whose module begins with one of them are looked into, too.
    """
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    inner: Iterable[Any] = ()
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        inner = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, (list, tuple)):
        inner = value
    elif modules and type(value).__module__.startswith(modules):
        inner = vars(value).values()
    for part in inner:
        yield from tensors_in(part, modules, seen)
