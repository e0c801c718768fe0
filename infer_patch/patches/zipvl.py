"""ZipVL: a score per layer says which tokens attend in prefill, and in how many bits they are kept (2410.08584)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infer_patch.cache import IndexedLayer
from infer_patch.kernels.probe_scores import probe_scores, probes_that_see
from infer_patch.kernels.subset_attention import TokenSubset
from infer_patch.kv_policy import Policy, packable_layers, probe_rows, require_bits
from infer_patch.method import Method, Runtime, option, register
from infer_patch.packed_cache import PackedLayer
from infer_patch.packed_pool import ROWS


@register("zipvl")
@dataclass(frozen=True, kw_only=True)
class ZipVL(Method):
    """In each layer, attention in prefill runs among the tokens that carry a share `tau` of the attention mass.

    A few probe queries tell how much each token is read. The smallest number of tokens that hold `tau` of that mass is
    the layer's budget; those with the highest mass per probe that sees them are its important tokens. Only they attend,
    and only to each other; the others get nothing from this layer's attention and go on by the residual stream. In the
    cache, important tokens take `bits` and the others `other_bits`, or are forgotten. In decoding, tokens that are no
    longer recent are judged and packed `window` at a time.

    Parameters
    ----------
    tau : float
        Share of the attention mass that sets the budget, above 0; 1 keeps everything.
    bits, other_bits : int
        Bits of important tokens and of others: 8, 4, 2, or 16 for the model's own precision.
    unimportant : str
        "quantise" (version 1 of the paper) keeps the other tokens in `other_bits`; "evict" (version 2) forgets them.
    skipped_rows : str
        What rows of the other tokens get in prefill: "zero", or "attend": they read the important tokens before them.
    sinks, recent : int
        Tokens at the start and at the end that are always important, and stay in full precision in the cache.
    window : int
        Tokens that are judged and packed together in decoding; the paper takes 100.
    group : int
        Most tokens that share the range of a channel, a multiple of 16.
    recent_probes, random_probes : int
        Queries that judge: the newest of a prompt and others drawn from it.
    seed : int
        Of that draw.
    normaliser : str
        What a token's mass is divided by: "probes", the probes that see it; "released", as in ZipCache's code, the
        tokens from it on.
    dense_below : int
        Prompts of fewer tokens attend densely.
    dense_above : float
        Where at least this share of tokens is important, the layer attends densely.

    References
    ----------
    He et al., "ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification", arXiv 2410.08584.
    """

    tau: float = option(0.975, "share of the attention mass that sets a layer's budget")
    bits: int = option(4, "bits of important tokens (16: full precision)")
    other_bits: int = option(2, "bits of other tokens")
    unimportant: str = option("quantise", "what the cache does with other tokens: quantise, evict")
    skipped_rows: str = option("zero", "what rows of other tokens get in prefill: zero, attend")
    sinks: int = option(4, "first tokens, always important and in full precision")
    recent: int = option(64, "newest tokens, always important and in full precision")
    window: int = option(128, "tokens judged and packed together in decoding")
    group: int = option(128, "most tokens that share parameters")
    recent_probes: int = option(64, "newest queries that judge importance")
    random_probes: int = option(64, "other queries that judge importance")
    seed: int = option(0, "of the draw of those")
    normaliser: str = option("probes", "what mass is divided by: probes, released")
    dense_below: int = option(1024, "prompts of fewer tokens attend densely")
    dense_above: float = option(0.9, "share of important tokens from which a layer attends densely")

    ports = ("select", "store")
    paper = "arXiv 2410.08584"
    summary = "prefill attention among the tokens that hold most of its mass; the others in fewer bits or evicted"

    def validate(self) -> None:
        self.require(self.tau > 0, f"tau must be above 0, got {self.tau}")
        require_bits(self, self.bits, self.other_bits, mixed=self.unimportant != "evict")
        for name, choices in (
            ("unimportant", ("quantise", "evict")),
            ("skipped_rows", ("zero", "attend")),
            ("normaliser", ("probes", "released")),
        ):
            given = getattr(self, name)
            self.require(given in choices, f"{name} must be one of {', '.join(choices)}, got {given!r}")
        for name in ("recent", "recent_probes", "random_probes", "dense_below"):
            self.require(getattr(self, name) >= 0, f"{name} must be 0 or more, got {getattr(self, name)}")
        self.require(self.sinks >= 1, f"sinks must be 1 or more (every row must see a token), got {self.sinks}")
        self.require(self.recent >= 1, f"recent must be 1 or more (the last token answers), got {self.recent}")
        self.require(self.recent_probes >= 1, f"recent_probes must be 1 or more, got {self.recent_probes}")
        self.require(self.window >= ROWS, f"window must be {ROWS} or more, got {self.window}")
        self.require(
            self.group >= ROWS and self.group % ROWS == 0, f"group must be a multiple of {ROWS}, got {self.group}"
        )
        self.require(0 < self.dense_above <= 1, f"dense_above must be a share above 0, got {self.dense_above}")

    def active_ports(self) -> tuple[str, ...]:
        return self.ports if self.policy().packs else ("select",)

    def keeps_packed(self) -> bool:
        return self.policy().packs

    def policy(self) -> MassPolicy:
        """How the cache layers keep tokens."""
        return MassPolicy(
            bits=self.bits,
            other_bits=self.other_bits,
            important=0.5 if self.tau < 1 else 1.0,  # some, but how many is found out
            sinks=self.sinks,
            recent=self.recent,
            window=self.window,
            group=self.group,
            recent_probes=self.recent_probes,
            random_probes=self.random_probes,
            seed=self.seed,
            evicts=self.unimportant == "evict" and self.tau < 1,
            tau=self.tau,
        )

    def applicable_layers(self, parts: Any) -> tuple[int, ...]:
        return packable_layers(self.name, parts, self.policy())

    def runtime(self, parts: Any, layers: tuple[int, ...]) -> Runtime:
        return _ZipVL(self, parts, layers)


def budget(mass: Tensor, tau: float) -> Tensor:
    """p, the fewest tokens that hold a share tau of the mass: [..., n] -> int64 [...], at least 1; n from tau = 1 on.

    Equation 6: p = min { p : a_(1) + ... + a_(p) >= tau (a_1 + ... + a_n) } with a_(1) >= a_(2) >= ...
    """
    n = mass.shape[-1]
    if tau >= 1:
        return torch.full(mass.shape[:-1], n, dtype=torch.long, device=mass.device)
    held = mass.double().sort(-1, descending=True).values.cumsum(-1)
    return ((held < tau * held[..., -1:]).sum(-1) + 1).clamp(max=n)


def normalised_score(mass: Tensor, seen: Tensor, normaliser: str = "probes") -> Tensor:
    """a_j / c_j of mass [..., n], equation 7: c_j = `seen`, the probes that see token j; "released": n - j."""
    if normaliser == "released":
        return mass / torch.arange(mass.shape[-1], 0, -1, device=mass.device)
    return mass / seen.clamp(min=1)


def important_tokens(mass: Tensor, score: Tensor, tau: float, forced: Tensor | None = None) -> Tensor:
    """The budget's number of tokens with the highest score, the forced ones first: bool [..., n].

    The budget comes from the mass, the membership from the normalised score (equations 6 and 8): all [..., n]. Ties go
    to the earlier token. Where more tokens are forced than the budget holds, those are all.
    """
    count = budget(mass, tau)
    if forced is not None:
        score = score.masked_fill(forced, float("inf"))
        count = torch.maximum(count, forced.sum(-1))
    order = score.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(score.shape[-1], device=score.device).expand_as(order)
    )
    return rank < count[..., None]


@dataclass(frozen=True)
class MassPolicy(Policy):
    """Of the tokens that are packed together, as many are important as hold a share `tau` of their mass."""

    tau: float = 0.975

    def choose(self, mass: Tensor, seen: Tensor) -> Tensor:
        """mass [H_kv, m] and seen [m] -> bool [1, m]."""
        total = mass.sum(0)
        return important_tokens(total, normalised_score(total, seen), self.tau)[None]


class _ZipVL(Runtime):
    config: ZipVL

    def cache_layer(self, layer: int) -> IndexedLayer:
        return PackedLayer(self.config.policy())

    def select(self, layer: int, call: Any) -> TokenSubset | str:
        config, n = self.config, call.k.shape[2]
        if call.past:
            return "tokens came before this call"
        if config.tau >= 1:
            return "every token is important at tau = 1"
        packs = config.keeps_packed() and n >= config.sinks + config.recent + config.window
        if n < config.dense_below and not packs:
            return f"fewer than {config.dense_below} tokens"
        keep = self._important(call)
        if packs:
            call.tokens.shared.setdefault(("important", layer), {}).update(zip(call.samples, keep))
        if n < config.dense_below:
            return f"fewer than {config.dense_below} tokens"
        counts = tuple(keep.sum(1).tolist())
        if min(counts) >= config.dense_above * n:
            return f"at least {config.dense_above:.0%} of the tokens are important"
        return TokenSubset(keep, config.skipped_rows == "attend", counts)

    @torch.no_grad()
    def _important(self, call: Any) -> Tensor:
        """bool [b, n] of a call without tokens before it."""
        config, device, (samples, _, n, _) = self.config, call.q.device, call.k.shape
        rows = probe_rows(n, config.recent_probes, config.random_probes, config.seed).to(device)
        probes = rows.expand(samples, -1)
        mass = probe_scores(call.q.index_select(2, rows), call.k, call.scale, probes).sum(1) / call.q.shape[1]
        place = torch.arange(n, device=device)
        seen = probes_that_see(probes, place.expand(samples, -1))
        forced = ((place < config.sinks) | (place >= n - config.recent)).expand(samples, -1)
        return important_tokens(mass, normalised_score(mass, seen, config.normaliser), config.tau, forced)
