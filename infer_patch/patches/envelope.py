"""Top-k key blocks by their envelope: an upper bound on every score in the block (Quest family, arXiv 2406.10774)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from infer_patch.kernels.block_mask import BlockMask
from infer_patch.kernels.envelope import block_envelope, select_blocks
from infer_patch.method import Method, Runtime, option, register
from infer_patch.selection import plain_attention_layers

BLOCK = 64
SCORE_BLOCKS = (1, 4, 8, 16, 32, 64)


@register("envelope")
@dataclass(frozen=True, kw_only=True)
class Envelope(Method):
    """Each block of queries reads the key blocks that are likely to hold its highest scores.

    The element-wise minimum and maximum of a few keys bound every score a query can have with them. A block of 64
    queries ranks key blocks of 64 by the softmax of (a tightened form of) this bound: the largest that any of its
    sampled rows, in any query head of the key head, gives a part of the block. It reads the best ones, the first tokens
    and a recent window. Prefill and decode; the cache keeps everything.

    Parameters
    ----------
    budget : int
        Tokens each query block reads, sinks and window included (a multiple of 64).
    sinks, window : int
        Tokens at the start and at the end that are always read; they reach out to blocks of 64. A query's own block
        is read in any case, so the default window leaves the rest of the budget to the ranking.
    score_block, decode_score_block : int
        Keys under one envelope in prefill and in decode: 1 (every key scored itself), 4, 8, 16, 32 or 64. Smaller finds
        better, larger scores faster.
    refresh : int
        In decode, choose anew every that many tokens; between, new tokens are read and the chosen blocks stay.
    slack : float
        Share of the envelope's half-width that counts: 1 is the upper bound (an isolated peak always outranks blocks
        without one), 0 the block's centre. Rotary embedding makes the bound loose; see the measurements in the docs.
    stride : int
        In prefill every stride-th query of a block is scored, its last one always.
    dense_below : int
        Up to this many keys, layers run dense (exact, and faster there).
    max_share : float
        Prefill runs dense when more than this share of the causal key blocks would be read: sparse cannot win there.

    References
    ----------
    The bound: Tang et al., "Quest", arXiv 2406.10774 (decode only, per head). Blockwise prefill, the softmax over all
    blocks and per-group lists are this project's.
    """

    budget: int = option(1024, "tokens each query block reads, sinks and window included")
    sinks: int = option(4, "first tokens always read, rounded up to 64")
    window: int = option(1, "recent tokens always read; the block of the query is read in any case")
    score_block: int = option(1, "keys under one envelope in prefill: 1 (exact), 4, 8, 16, 32 or 64")
    decode_score_block: int = option(1, "the same in decode")
    refresh: int = option(1, "in decode, choose anew every so many tokens")
    slack: float = option(0.1, "share of the envelope's half-width that counts: 1 is the upper bound")
    stride: int = option(4, "in prefill, score every stride-th query")
    dense_below: int = option(2048, "run dense up to this many keys")
    max_share: float = option(1.0, "run prefill dense above this share of causal key blocks")

    ports = ("select",)
    paper = "arXiv 2406.10774"
    summary = "top-k key blocks by min/max bounds on their scores"

    def validate(self) -> None:
        always = -(-self.sinks // BLOCK) + -(-(self.window - 1) // BLOCK) + 1
        self.require(self.sinks >= 0, f"sinks must be 0 or more tokens, got {self.sinks}")
        self.require(self.window >= 1, f"window must be 1 or more tokens, got {self.window}")
        self.require(
            self.budget % BLOCK == 0 and self.budget >= always * BLOCK,
            f"budget must be a multiple of {BLOCK} that holds sinks and window ({always * BLOCK} tokens), "
            f"got {self.budget}",
        )
        for name in ("score_block", "decode_score_block"):
            keys = getattr(self, name)
            self.require(keys in SCORE_BLOCKS, f"{name} must be one of {', '.join(map(str, SCORE_BLOCKS))}, got {keys}")
        self.require(0 <= self.slack <= 1, f"slack must be between 0 and 1, got {self.slack}")
        self.require(1 <= self.stride <= BLOCK, f"stride must be 1 to {BLOCK}, got {self.stride}")
        self.require(1 <= self.refresh <= BLOCK, f"refresh must be 1 to {BLOCK} tokens, got {self.refresh}")
        self.require(self.dense_below >= 0, f"dense_below must be 0 or more tokens, got {self.dense_below}")
        self.require(0 < self.max_share <= 1, f"max_share must be above 0 and at most 1, got {self.max_share}")

    def applicable_layers(self, parts: Any) -> tuple[int, ...]:
        return plain_attention_layers(self.name, parts)

    def runtime(self, parts: Any, layers: tuple[int, ...]) -> Runtime:
        return _Envelope(self, parts, layers)


class _Envelope(Runtime):
    config: Envelope

    def select(self, layer: int, call: Any) -> BlockMask | str:
        config, keys, queries = self.config, call.k.shape[2], call.q.shape[2]
        if keys <= config.budget:
            return "the budget covers every key"
        if keys <= config.dense_below:
            return f"at most {config.dense_below} keys"
        if queries > BLOCK and kept_share(config.budget, queries, keys) > config.max_share:
            return f"more than {config.max_share:.0%} of the key blocks would be read"
        return self._decode(call) if queries == 1 else self._choose(call, config.score_block)

    def _decode(self, call: Any) -> BlockMask:
        """The blocks chosen at most `refresh` tokens ago and, if a new one has begun since, the query's own."""
        keys = call.k.shape[2]
        idx, count, chosen_at = call.state.get("chosen", (None, None, 0))
        if idx is None or not 0 < keys - chosen_at < self.config.refresh:
            mask = self._choose(call, self.config.decode_score_block)
            call.state["chosen"] = mask.idx, mask.count, keys
            return mask
        own = (keys - 1) // BLOCK
        if own > (chosen_at - 1) // BLOCK:
            # the budget is less than all keys, so every list is full and its end is its last entry
            idx, count = torch.cat([idx, torch.full_like(idx[..., :1], own)], -1), count + 1
        return BlockMask(idx, count, BLOCK, BLOCK)

    def _choose(self, call: Any, score_block: int) -> BlockMask:
        config = self.config
        return select_blocks(
            call.q,
            call.k,
            self._envelope(call, score_block),
            budget=config.budget,
            sinks=config.sinks,
            window=config.window,
            block=BLOCK,
            score_block=score_block,
            slack=config.slack,
            stride=config.stride,
            scale=call.scale,
        )

    def _envelope(self, call: Any, size: int) -> Any:
        """Envelopes of all key blocks; only blocks that changed since the last call are computed anew."""
        keys = call.k.shape[2]
        if size == 1:
            return block_envelope(call.k, size)
        envelope, covered = call.state.get(size, (None, 0))
        if covered < keys:
            whole = covered // size  # blocks that were full then and cannot change
            newer: Any = block_envelope(call.k[:, :, whole * size :], size)
            old = envelope or newer
            envelope = tuple(torch.cat([a[:, :, :whole], b], 2) for a, b in zip(old, newer))
        call.state[size] = envelope, keys
        return envelope


def kept_share(budget: int, queries: int, keys: int) -> float:
    """Share of the causal key blocks that a fixed budget reads, over the query blocks of a call."""
    first, last = (keys - queries) // BLOCK, -(-keys // BLOCK)
    return sum(min(i + 1, budget // BLOCK) for i in range(first, last)) / sum(range(first + 1, last + 1))
