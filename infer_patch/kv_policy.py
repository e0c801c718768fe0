"""Which tokens of a cache are worth how many bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from infer_patch.errors import UnsupportedModelError
from infer_patch.families import ModelParts
from infer_patch.kernels.kv_pack import BITS, PLAIN
from infer_patch.kernels.probe_scores import probe_scores, probes_that_see
from infer_patch.method import Method
from infer_patch.packed_pool import ROWS
from infer_patch.packed_tail import NewTokens
from infer_patch.selection import plain_attention_layers

WIDTHS = (*BITS, PLAIN)


@dataclass(frozen=True)
class Policy:
    """How the tokens of one layer are kept.

    Parameters
    ----------
    bits, other_bits : int
        Bits of important tokens, and of all others: 8, 4, 2, or 16 for the model's own precision.
    important : float
        Share of important tokens; 1 makes all of them so, and no scores are needed.
    sinks, recent : int
        Tokens at the start and at the end that stay in full precision.
    window : int
        Tokens that are packed together once they are no longer recent.
    group : int
        Most tokens that share parameters.
    per_head : bool
        Each key head has important tokens of its own; otherwise they are the same for all heads.
    recent_probes, random_probes : int
        Queries whose attention tells what is important: the newest of a call, and others drawn from it.
    seed : int
        Of that draw.
    evicts : bool
        Tokens that are not important are forgotten instead of kept in `other_bits`.
    value_bits : int, optional
        The most bits of values in packed tokens; keys keep the bits above. None: the same for both.
    """

    bits: int = 4
    other_bits: int = 4
    important: float = 1.0
    sinks: int = 4
    recent: int = 64
    window: int = 128
    group: int = 128
    per_head: bool = False
    recent_probes: int = 64
    random_probes: int = 64
    seed: int = 0
    evicts: bool = False
    value_bits: int | None = None

    @property
    def mixed(self) -> bool:
        """Whether tokens are treated differently, so that scores are needed."""
        return (self.evicts or self.bits != self.other_bits) and 0 < self.important < 1

    @property
    def widths(self) -> tuple[int, ...]:
        """The bits in use, important tokens first."""
        if self.mixed and not self.evicts:
            return self.bits, self.other_bits
        return (self.other_bits if self.important == 0 else self.bits,)

    @property
    def packs(self) -> bool:
        """Whether keys and values are kept in pools at all."""
        return self.evicts or any(bits != PLAIN for bits in self.widths)

    def choose(self, mass: Tensor, seen: Tensor) -> Tensor:
        """The important tokens among those about to be packed, of one sample.

        Parameters
        ----------
        mass : Tensor [H_kv, m]
            Attention that each of the m tokens gets from the probes, summed over them and over query heads.
        seen : int64 Tensor [m]
            Probes that see the token.

        Returns
        -------
        bool Tensor [H_kv or 1, m], as many True in each row
        """
        if not self.per_head:
            mass = mass.sum(0, keepdim=True)
        normalised = mass / seen.clamp(min=1)
        best = normalised.topk(self.count(mass.shape[1]), dim=-1).indices
        return torch.zeros_like(normalised, dtype=torch.bool).scatter_(-1, best, True)

    def count(self, tokens: int) -> int:
        """Important tokens among so many: the share, to the nearest 16, or to the nearest group in a long prompt."""
        grain = self.group if tokens >= 8 * self.group else ROWS
        return max(0, min(round(self.important * tokens / grain) * grain, tokens))


def require_bits(method: Method, bits: int, other_bits: int, value_bits: int | None = None, mixed: bool = True) -> None:
    """Options that give a `Policy` its bits; raise `PlanError` for others. `mixed`: are tokens kept in both?"""
    for name, given in (("bits", bits), ("other_bits", other_bits)):
        method.require(given in WIDTHS, f"{name} must be one of {sorted(WIDTHS)}, got {given}")
    method.require(
        value_bits is None or value_bits in BITS,
        f"value_bits must be one of {sorted(BITS)}, or None for those of keys, got {value_bits}",
    )
    method.require(
        bits >= other_bits or not mixed,
        f"important tokens need at least the bits of others, got bits={bits}, other_bits={other_bits}",
    )


def packable_layers(method: str, parts: ModelParts, policy: Policy) -> tuple[int, ...]:
    """Layers whose keys and values a policy can keep: those of plain attention; raise `UnsupportedModelError` if none.

    Heads must fill whole bytes in the fewest bits that the policy uses.
    """
    layers = plain_attention_layers(method, parts)
    planes = 8 // min(8, policy.value_bits or 8, *policy.widths)
    if parts.head_dim % planes:
        raise UnsupportedModelError(
            f"{method}: {parts.model_type} has heads of {parts.head_dim} numbers, which do not fill whole bytes "
            f"of {planes} numbers each. Use more bits."
        )
    return layers


@dataclass(frozen=True)
class Probes:
    """Query rows of a call that tell what is important: rows and positions, int64 [B, m]; -1 for "no probe"."""

    rows: Tensor
    positions: Tensor


def probe_rows(count: int, recent: int, random: int, seed: int) -> Tensor:
    """The newest `recent` of `count` rows and `random` of the others, without replacement: int64 [m], ascending."""
    older = max(count - recent, 0)
    drawn = torch.randperm(older, generator=torch.Generator().manual_seed(seed))[:random].sort().values
    return torch.cat([drawn, torch.arange(older, count)])


def draw_probes(new: NewTokens, positions: Tensor, recent: int, random: int, seed: int) -> Probes:
    """The newest `recent` tokens of each sample's call and `random` older ones of it, without replacement.

    Every sample draws for itself, from the same seed: a batch draws what its samples draw alone. `positions` int64
    [B, T] are those of the query rows.
    """
    width = max(min(recent + random, max(new.counts)), 1)
    rows = torch.full((len(new.counts), width), -1)
    for sample, count in enumerate(new.counts):
        chosen = probe_rows(count, recent, random, seed)
        if new.real is not None:
            chosen = new.real[sample].nonzero()[:, 0].cpu()[chosen]
        rows[sample, : len(chosen)] = chosen
    rows = rows.to(positions.device)
    return Probes(rows, positions.gather(1, rows.clamp(min=0)).masked_fill(rows < 0, -1))


def attention_mass(q: Tensor, k: Tensor, scale: float, probes: Probes, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(mass [B, H_kv, n], seen [B, n]) of keys k at `positions` [B, n]: see `Policy.choose`. q [B, H, T, D]."""
    rows = probes.rows.clamp(min=0)[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    mass = probe_scores(q.gather(2, rows), k, scale, probes.positions, positions)
    return mass, probes_that_see(probes.positions, positions)
