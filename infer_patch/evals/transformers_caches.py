"""transformers' own cache layers as sides of `bench decode --with-cache`: the growing one and the quantised ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, HQQQuantizedLayer, QuantoQuantizedLayer

from infer_patch.evals.attention_sides import Side, sdpa

RESIDUAL, GROUP = 128, 64  # tokens kept as they are, elements that share parameters
BACKENDS = {"quanto": "optimum.quanto", "hqq": "hqq"}  # and the packages they need
AXES = {"quanto": 0, "hqq": 1}  # what transformers' documentation advises
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
        axes = {"axis_key": AXES[backend], "axis_value": AXES[backend]}
        for bits in (4, 2):
            name = f"{backend}, {bits} bits"
            if installed(package):
                settings = {"nbits": bits, "q_group_size": GROUP, "residual_length": RESIDUAL, **axes}
                sides.append(CacheSide(name, partial(_LAYERS[backend], **settings), "transformers"))
            else:
                skipped[name] = f"the package {package} is not installed"
    return sides, skipped


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
    return sum(x.numel() * x.element_size() for x in _tensors(vars(layer), set()))


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor, also those inside tensor subclasses; each once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _tensors(getattr(value, name), seen)
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part, seen)
