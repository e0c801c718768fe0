"""The memory of a cache: how many bytes it is, and buffers that grow."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache

GRANULE = 64  # buffers grow in multiples of one attention block, so that blocks can be read as a view


def cache_bytes(cache: Cache | None) -> int:
    """Bytes of all keys and values a cache holds, whatever its layers are."""
    total = 0
    for layer in getattr(cache, "layers", ()):
        if hasattr(layer, "nbytes"):  # our own know what else they hold
            total += layer.nbytes()
        else:
            total += tensor_bytes((getattr(layer, "keys", None), getattr(layer, "values", None)))
    return total


def tensor_bytes(value: Any) -> int:
    """Bytes of every tensor in nested containers, and of everything else that counts its own (`nbytes`)."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return int(getattr(value, "nbytes", 0))
    return sum(map(tensor_bytes, value))


def grown(held: Tensor, rows: int) -> Tensor:
    """A zeroed buffer with room to grow that starts with `held` (zeroed: blocks may be read past the last row)."""
    capacity = -(-(rows + max(rows // 4, 4 * GRANULE)) // GRANULE) * GRANULE
    buffer = held.new_zeros(held.shape[0], held.shape[1], capacity, held.shape[3])
    buffer[:, :, : held.shape[2]] = held
    return buffer
