"""Keys and values in 8, 4 or 2 bits, important tokens in more (KIVI, arXiv 2402.02750; ZipCache, arXiv 2405.14256)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from infer_patch.cache import IndexedLayer
from infer_patch.kernels.kv_pack import PLAIN
from infer_patch.kv_policy import Policy, packable_layers, require_bits
from infer_patch.method import Method, Runtime, option, register
from infer_patch.packed_cache import PackedLayer
from infer_patch.packed_pool import ROWS


@register("kv_quant")
@dataclass(frozen=True, kw_only=True)
class KVQuant(Method):
    """The KV cache in few bits: a smaller cache, read in its packed form.

    Prompts are attended to as they are; afterwards their keys and values are quantised in groups of 128 tokens, keys
    with a range for each channel, values with one for each token. The first and the most recent tokens stay in full
    precision. New tokens join them until `window` of them are no longer recent, and are packed together. Nothing is
    quantised twice, and decoding multiplies with the packed numbers: no copy of the cache is dequantised at each step.

    With `important` below 1 the cache is mixed: the tokens that a sample of queries reads most get `bits`, all others
    `other_bits`. Different layers can be kept differently: give a plan several `kv_quant` entries with `layers`.

    Parameters
    ----------
    bits : int
        Bits of important tokens: 8, 4, 2, or 16 for the model's own precision. With `important=1` those are all.
    other_bits : int
        Bits of all other tokens.
    value_bits : int, optional
        The most bits of values: 8, 4 or 2, for packed tokens of any kind. They need fewer than keys. Default: the same.
    important : float
        Share of important tokens, 0 to 1.
    full_layers : int
        The first layers keep everything in full precision.
    sinks, recent : int
        Tokens at the start and at the end that stay in full precision.
    window : int
        Tokens that are packed together in decoding, a multiple of 16. With a multiple of `group`, what is in the packed
        cache does not depend on how a text was cut into calls.
    group : int
        Most tokens that share the range of a channel, a multiple of 16. Fewer are more exact and take more memory.
    per_head : bool
        Each key head chooses its own important tokens.
    recent_probes, random_probes : int
        Queries that judge importance: the newest of a call and others drawn from it.
    seed : int
        Of that draw.

    References
    ----------
    Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv 2402.02750.
    He et al., "ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification",
    arXiv 2405.14256.
    """

    bits: int = option(4, "bits of important tokens (16: full precision)")
    other_bits: int = option(2, "bits of other tokens, where important < 1")
    value_bits: int | None = option(None, "most bits of values (default: as keys)")
    important: float = option(1.0, "share of tokens that are important")
    full_layers: int = option(0, "first layers that stay in full precision")
    sinks: int = option(4, "first tokens that stay in full precision")
    recent: int = option(64, "newest tokens that stay in full precision")
    window: int = option(128, "tokens that are packed together in decoding")
    group: int = option(128, "most tokens that share parameters")
    per_head: bool = option(False, "important tokens for each key head instead of each layer")
    recent_probes: int = option(64, "newest queries that judge importance")
    random_probes: int = option(64, "other queries that judge importance")
    seed: int = option(0, "of the draw of those")

    ports = ("store",)
    paper = "arXiv 2402.02750, 2405.14256"
    summary = "KV cache in 8, 4 or 2 bits, important tokens in more, read in packed form"

    def validate(self) -> None:
        require_bits(self, self.bits, self.other_bits, self.value_bits, mixed=self.important != 1)
        self.require(0 <= self.important <= 1, f"important must be a share from 0 to 1, got {self.important}")
        for name in ("full_layers", "sinks", "recent", "recent_probes", "random_probes"):
            self.require(getattr(self, name) >= 0, f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("window", "group"):
            given = getattr(self, name)
            self.require(given >= ROWS and given % ROWS == 0, f"{name} must be a multiple of {ROWS}, got {given}")
        self.require(self.recent_probes + self.random_probes >= 1, "at least one probe is needed, got none")

    def policy(self, layer: int) -> Policy:
        """What this layer keeps in how many bits."""
        if layer < self.full_layers:
            return Policy(bits=PLAIN)
        return Policy(
            bits=self.bits,
            other_bits=self.other_bits,
            important=self.important,
            sinks=self.sinks,
            recent=self.recent,
            window=self.window,
            group=self.group,
            per_head=self.per_head,
            recent_probes=self.recent_probes,
            random_probes=self.random_probes,
            seed=self.seed,
            value_bits=self.value_bits,
        )

    def keeps_packed(self) -> bool:
        return self.policy(self.full_layers).packs

    def applicable_layers(self, parts: Any) -> tuple[int, ...]:
        return packable_layers(self.name, parts, self.policy(self.full_layers))

    def runtime(self, parts: Any, layers: tuple[int, ...]) -> Runtime:
        return _KVQuant(self, parts, layers)


class _KVQuant(Runtime):
    config: KVQuant

    def cache_layer(self, layer: int) -> IndexedLayer:
        policy = self.config.policy(layer)
        return PackedLayer(policy) if policy.packs else IndexedLayer()
