"""What a patched call does with the cache it is given: refuse it, or put the layers into it that methods need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from transformers import Cache
from transformers.cache_utils import DynamicLayer

from infer_patch.cache import IndexedLayer
from infer_patch.errors import UnsupportedCallError
from infer_patch.tokens import Tokens

if TYPE_CHECKING:
    from infer_patch.engine import Engine


def check_cache(cache: Any) -> None:
    """Raise `UnsupportedCallError` for a cache whose layers cannot be taken over."""
    if cache is None:
        return
    if not isinstance(cache, Cache) or getattr(cache, "offloading", False):
        what = "an offloaded cache" if isinstance(cache, Cache) else type(cache).__name__
    else:
        strange = [x for x in cache.layers if not (isinstance(x, IndexedLayer) or IndexedLayer.can_adopt(x))]
        if not strange:
            return
        what = f"{type(cache).__name__} with layers of type {type(strange[0]).__name__}"
    raise UnsupportedCallError(
        f"{what} cannot be patched; expected a DynamicCache. Leave `past_key_values` and `cache_implementation` at "
        "their defaults, or unpatch the model."
    )


def swap_layers(engine: Engine, cache: Cache, tokens: Tokens) -> None:
    """Replace the cache layers that methods need, in place; all or none."""
    while len(cache.layers) < engine.parts.num_layers:
        cache.layers.append(DynamicLayer())
    swaps = []
    for i, held in enumerate(cache.layers):
        store = engine.stores.get(i)
        made_by = None if store is None else store.key
        shortened = tokens.image is not None and i >= engine.first_reduced
        # layers with a window of their own let go of old rows, and their masks count on that
        corrected = i in engine.calibrators and engine.parts.windows[i] is None
        wanted = i in engine.selectors or corrected or shortened
        if isinstance(held, IndexedLayer):
            if held.made_by == made_by:
                continue
            if held.rows and (held.made_by is not None or held.start is not None):
                raise UnsupportedCallError("this cache was filled under another plan; start again from the prompt.")
        elif store is None and not wanted:
            continue
        swaps.append((i, store.cache_layer(i) if store is not None else IndexedLayer()))
    for i, fresh in swaps:
        store = engine.stores.get(i)
        fresh.made_by = None if store is None else store.key
        fresh.adopt(cache.layers[i], tokens)
    for i, fresh in swaps:
        cache.layers[i] = fresh
    for i in engine.stores:
        cast(IndexedLayer, cache.layers[i]).expect(tokens, None)
