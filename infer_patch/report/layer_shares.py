"""What plans did layer by layer, summed over the batches of an evaluation: strips of bars, and the same as numbers."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from infer_patch.evals.eval_schema import EvalSample

_WORDS = 8  # spans of layers that a description lists; beyond, it gives the range


@dataclass(frozen=True)
class Strip:
    """One share per layer, from 0 to 1; layers that are not in it are not served by the plan."""

    title: str
    shares: dict[int, float]
    drawn: bool = True  # else it stands in the table only


def layer_strips(samples: Sequence[EvalSample], layers: int) -> list[Strip]:
    """Strips of one plan, from the rows that it answered.

    Tokens that enter a layer (prefill, plans that drop visual tokens), tokens of those that take part in attention,
    causal key blocks that attention reads (prefill and decode apart), and tokens that the cache holds at the end.
    """
    effects = [s["effect"] for s in samples if s["effect"] is not None]
    entering = _entering(effects, layers, sum(s["prompt_tokens"] for s in samples))
    return [*entering, *_attending(effects), *_read(effects), *_held(effects)]


def _entering(effects: Sequence[Mapping[str, Any]], layers: int, prompt_tokens: int) -> list[Strip]:
    total, enter = 0, [0] * layers
    for effect in effects:
        methods = [figures for figures in effect["methods"].values() if "visual_tokens" in figures]
        # rows of older versions count visual tokens only where some were dropped
        there = effect.get("visual_tokens") or max((n for m in methods for n in m["visual_tokens"].values()), default=0)
        dropped = [0] * layers
        for figures in methods:
            for layer, n in figures["visual_tokens"].items():
                dropped[int(layer)] = max(dropped[int(layer)], n - figures["visual_tokens_kept"][layer])
        total += there
        for layer in range(layers):
            enter[layer] += there - max(dropped[: layer + 1])
    if not total:
        return []
    visual = {layer: n / total for layer, n in enumerate(enter)}
    prompt = {layer: 1 - (total - n) / prompt_tokens for layer, n in enumerate(enter)}
    return [
        Strip("visual tokens that enter, prefill", visual),
        Strip("prompt tokens that enter, prefill", prompt, drawn=False),
    ]


def _attending(effects: Sequence[Mapping[str, Any]]) -> list[Strip]:
    shares: dict[int, list[float]] = {}
    for effect in effects:
        for figures in effect["methods"].values():
            for layer, share in figures.get("tokens_attending", {}).items():
                shares.setdefault(int(layer), []).append(share)
    means = {layer: sum(values) / len(values) for layer, values in sorted(shares.items())}
    return [Strip("prompt tokens that take part in attention, mean of the batches", means)] if means else []


def _read(effects: Sequence[Mapping[str, Any]]) -> list[Strip]:
    sums: dict[str, dict[int, list[float]]] = {}
    for effect in effects:
        for figures in effect["methods"].values():
            for phase, blocks in _blocks(figures).items():
                for layer, (read, causal) in blocks.items():
                    pair = sums.setdefault(phase, {}).setdefault(int(layer), [0, 0])
                    pair[0], pair[1] = pair[0] + read, pair[1] + causal
    return [
        Strip(f"causal key blocks read, {phase}", {i: read / causal for i, (read, causal) in sorted(pairs.items())})
        for phase, pairs in sums.items()
    ]


def _blocks(figures: Mapping[str, Any]) -> Mapping[str, Mapping[Any, Sequence[float]]]:
    """Key blocks read and causal by phase and layer; rows of older versions have shares, over both phases."""
    if "blocks" in figures or not figures.get("share_read"):
        found: Mapping[str, Any] = figures.get("blocks", {})
        return found
    phases = [phase for phase, calls in figures["sparse_calls"].items() if calls]
    causal = figures["blocks_causal"] / len(figures["share_read"])
    return {" and ".join(phases): {i: (share * causal, causal) for i, share in figures["share_read"].items()}}


def _held(effects: Sequence[Mapping[str, Any]]) -> list[Strip]:
    sums: dict[int, list[int]] = {}
    for effect in effects:
        for figures in effect["methods"].values():
            for layer, rows in figures.get("rows_held", {}).items():
                pair = sums.setdefault(int(layer), [0, 0])
                pair[0], pair[1] = pair[0] + rows, pair[1] + figures["tokens_seen"]
    shares = {layer: rows / seen for layer, (rows, seen) in sorted(sums.items()) if seen}
    return [Strip("tokens that the cache holds at the end", shares)] if shares else []


def in_words(strip: Strip) -> str:
    """100 % in layers 0 to 1, 50 % in layers 2 to 7."""
    spans = []
    places = [
        (f"{100 * share:.0f} %", layer - i, layer) for i, (layer, share) in enumerate(sorted(strip.shares.items()))
    ]
    for (share, _), run in groupby(places, key=lambda place: place[:2]):  # layers that follow each other
        numbers = [layer for _, _, layer in run]
        at = f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {numbers[0]} to {numbers[-1]}"
        spans.append(f"{share} in {at}")
    if len(spans) <= _WORDS:
        return ", ".join(spans)
    low, high = min(strip.shares.values()), max(strip.shares.values())
    return f"between {100 * low:.0f} % and {100 * high:.0f} % in {len(strip.shares)} layers"


def svg(strip: Strip, layers: int, plan: str) -> str:
    """A bar per layer, as inline SVG that takes the colours of the page; empty places are not served."""
    tracks = "".join(f"M{i + 0.08:g} 0h.84v1h-.84z" for i in strip.shares)
    bars = "".join(f"M{i + 0.08:g} 1h.84v{-max(share, 0.02):.3g}h-.84z" for i, share in strip.shares.items())
    label = html.escape(f"{plan}, {strip.title}: {in_words(strip)}")
    return (
        f'<svg class="strip" role="img" aria-label="{label}" viewBox="0 0 {layers} 1" preserveAspectRatio="none">'
        f'<path class="track" d="{tracks}"/><path class="bar" d="{bars}"/></svg>'
    )
