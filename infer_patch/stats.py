"""Proof of effect: what each method did, counted without copying anything to the host until a report is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from infer_patch.tokens import Tokens

_PHASES = ("prefill", "decode")


@dataclass
class MethodStats:
    """Counters of one method; tensors are sums kept on the device."""

    # phase -> layer -> key blocks read, summed over heads and query blocks; and those a dense pass would have read
    read: dict[str, dict[int, Any]] = field(default_factory=lambda: {phase: {} for phase in _PHASES})
    causal: dict[str, dict[int, int]] = field(default_factory=lambda: {phase: {} for phase in _PHASES})
    sparse_calls: dict[str, int] = field(default_factory=lambda: {"prefill": 0, "decode": 0})
    dense_calls: dict[str, int] = field(default_factory=dict)  # reason -> attention calls that ran dense
    kept: dict[int, Any] = field(default_factory=dict)  # layer -> visual tokens that went on
    total: dict[int, Any] = field(default_factory=dict)  # layer -> visual tokens there were
    emptied: dict[int, Any] = field(default_factory=dict)  # layer -> samples that lost their last visual token there
    last: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # layer -> (keep, image) of the last call
    stored: dict[int, tuple[int, int]] = field(default_factory=dict)  # layer -> rows held, tokens seen (last call)
    # layer -> bytes held by precision, and what the same tokens take unquantised (last call; packed caches only)
    stored_bytes: dict[int, tuple[dict[str, int], int]] = field(default_factory=dict)
    # layer -> prompt tokens that took part in attention, and prompt tokens there were
    attending: dict[int, tuple[int, int]] = field(default_factory=dict)
    corrected: dict[int, dict[str, Any]] = field(default_factory=dict)  # layer -> attention rows changed, and more
    left_alone: dict[str, int] = field(default_factory=dict)  # reason -> attention calls not corrected


@dataclass
class VisualTokens:
    """Where the visual tokens of one forward call left.

    Parameters
    ----------
    image : int64 Tensor [B, T]
        Number of the picture within its sample, -1 for text and padding.
    keeps : list of (int, bool Tensor [B, T])
        Layers that dropped something, first to last, and what went on from there.
    """

    image: Tensor
    keeps: list[tuple[int, Tensor]] = field(default_factory=list)

    def left_at(self, sample: int) -> list[list[int | None]]:
        """For each picture of a sample, and each of its tokens in order: the layer that was the first to run without
        it, None for a token that stayed to the end. Copies to the host."""
        image = self.image[sample].cpu()
        left = torch.full_like(image, -1)
        for layer, keep in self.keeps:
            left[(left < 0) & ~keep[sample].cpu()] = layer
        pictures = range(int(image.max()) + 1)
        return [[None if x < 0 else x for x in left[image == number].tolist()] for number in pictures]


class Stats:
    """Everything one engine counts. With `record`, calls that bring visual tokens leave their masks in `recorded`."""

    def __init__(self, methods: list[str]):
        self.names = methods
        self.record = False
        self.reset()

    def reset(self) -> None:
        self.calls = 0
        self.tokens = {phase: 0 for phase in _PHASES}
        self.visual_tokens: Any = 0
        self.cache_bytes = 0
        self.recorded: list[VisualTokens] = []
        self.methods = {name: MethodStats() for name in self.names}

    def call(self, tokens: Tokens) -> None:
        self.calls += 1
        self.tokens["decode" if tokens.length == 1 else "prefill"] += tokens.batch * tokens.length
        if tokens.image is not None:
            self.visual_tokens = self.visual_tokens + (tokens.image >= 0).sum()
            if self.record:
                self.recorded.append(VisualTokens(tokens.image))

    def selected(self, name: str, layer: int, read: Tensor | int, causal: int, decode: bool) -> None:
        stats, phase = self.methods[name], "decode" if decode else "prefill"
        stats.read[phase][layer] = stats.read[phase].get(layer, 0) + read
        stats.causal[phase][layer] = stats.causal[phase].get(layer, 0) + causal
        stats.sparse_calls[phase] += 1

    def attended(self, name: str, layer: int, kept: int, tokens: int) -> None:
        """Of so many prompt tokens, so many took part in a layer's attention."""
        counts = self.methods[name].attending
        before = counts.get(layer, (0, 0))
        counts[layer] = before[0] + kept, before[1] + tokens

    def dense(self, name: str, reason: str) -> None:
        calls = self.methods[name].dense_calls
        calls[reason] = calls.get(reason, 0) + 1

    def calibrated(self, name: str, layer: int, counts: dict[str, Any]) -> None:
        sums = self.methods[name].corrected.setdefault(layer, {})
        for what, number in counts.items():
            sums[what] = sums.get(what, 0) + number

    def left_alone(self, name: str, reason: str) -> None:
        calls = self.methods[name].left_alone
        calls[reason] = calls.get(reason, 0) + 1

    def reduced(self, name: str, layer: int, keep: Tensor, image: Tensor, before: Tensor | None = None) -> None:
        stats, visual = self.methods[name], image >= 0
        had = visual if before is None else visual & before
        stats.emptied[layer] = stats.emptied.get(layer, 0) + (had.any(1) & ~(keep & visual).any(1)).sum()
        stats.kept[layer] = stats.kept.get(layer, 0) + (keep & visual).sum()
        stats.total[layer] = stats.total.get(layer, 0) + visual.sum()
        stats.last[layer] = (keep, image)
        for call in self.recorded:
            if call.image is image:
                call.keeps.append((layer, keep))


@dataclass(frozen=True)
class Report:
    """What a patch did since it was put on (or since the last `reset`).

    `methods` maps each method's name to its figures; `silent` names the methods that never took effect although the
    model ran. `tokens` counts padding too; `visual_tokens` counts, for plans that drop some, those that came in.
    """

    plan: str
    model: str
    calls: int
    tokens: dict[str, int]
    cache_bytes: int
    methods: dict[str, dict[str, Any]]
    visual_tokens: int = 0

    @property
    def silent(self) -> list[str]:
        return [name for name, figures in self.methods.items() if self.calls and not figures["fired"]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "plan": self.plan,
            "model": self.model,
            "forward_calls": self.calls,
            "tokens": self.tokens,
            "visual_tokens": self.visual_tokens,
            "cache_bytes": self.cache_bytes,
            "methods": self.methods,
            "silent": self.silent,
        }

    def __str__(self) -> str:
        tokens = f"{self.tokens['prefill']} prefill and {self.tokens['decode']} decode tokens"
        lines = [f"plan {self.plan} on {self.model}: {self.calls} forward calls, {tokens}"]
        for name, figures in self.methods.items():
            lines.append(f"  {name}: {describe(figures)}")
        return "\n".join(lines)


def make_report(stats: Stats, plan: str, model: str) -> Report:
    """Read the counters (the only place that waits for the device)."""
    figures = {name: _figures(s) for name, s in stats.methods.items()}
    return Report(
        plan, model, stats.calls, dict(stats.tokens), stats.cache_bytes, figures, visual_tokens=int(stats.visual_tokens)
    )


def _figures(stats: MethodStats) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    if any(stats.causal.values()) or stats.dense_calls:
        blocks = {
            phase: {layer: [int(stats.read[phase][layer]), causal] for layer, causal in sorted(counts.items())}
            for phase, counts in stats.causal.items()
        }
        layers = sorted({layer for counts in blocks.values() for layer in counts})
        sums = {i: [sum(c[i][k] for c in blocks.values() if i in c) for k in (0, 1)] for i in layers}
        figures["blocks_read"], figures["blocks_causal"] = (sum(pair[k] for pair in sums.values()) for k in (0, 1))
        figures["share_read"] = {i: round(read / causal, 4) for i, (read, causal) in sums.items()}
        figures["blocks"] = {phase: counts for phase, counts in blocks.items() if counts}
        figures["sparse_calls"], figures["dense_calls"] = dict(stats.sparse_calls), dict(stats.dense_calls)
    if stats.attending:
        figures["tokens_attending"] = {i: round(k / n, 4) for i, (k, n) in sorted(stats.attending.items())}
    if stats.total:
        figures["visual_tokens_kept"] = {i: int(stats.kept[i]) for i in sorted(stats.kept)}
        figures["visual_tokens"] = {i: int(stats.total[i]) for i in sorted(stats.total)}
        emptied = {i: int(stats.emptied[i]) for i in sorted(stats.emptied)}
        if any(emptied.values()):
            figures["samples_emptied"] = emptied
        figures["kept_per_image"] = {i: _per_image(*stats.last[i]) for i in sorted(stats.last)}
    if stats.stored:
        figures["rows_held"] = {i: rows for i, (rows, _) in sorted(stats.stored.items())}
        figures["tokens_seen"] = max(seen for _, seen in stats.stored.values())
    if any(name.endswith(" bits") for held, _ in stats.stored_bytes.values() for name in held):
        figures["bytes_by_precision"] = _summed([held for held, _ in stats.stored_bytes.values()])
        figures["bytes_unquantised"] = sum(whole for _, whole in stats.stored_bytes.values())
    if stats.corrected or stats.left_alone:
        corrected = {i: {k: int(n) for k, n in counts.items()} for i, counts in sorted(stats.corrected.items())}
        figures["corrected"], figures["left_alone"] = corrected, dict(stats.left_alone)
    figures["fired"] = bool(
        sum(stats.sparse_calls.values())
        or any(figures.get("visual_tokens_kept", {}).get(i) != n for i, n in figures.get("visual_tokens", {}).items())
        or any(rows < seen for rows, seen in stats.stored.values())
        or "bytes_by_precision" in figures
        or any(counts.get("rows") for counts in figures.get("corrected", {}).values())
    )
    return figures


def _summed(counts: list[dict[str, int]]) -> dict[str, int]:
    """Dictionaries of counts added up, largest first."""
    total: dict[str, int] = {}
    for count in counts:
        for name, n in count.items():
            total[name] = total.get(name, 0) + n
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _per_image(keep: Tensor, image: Tensor) -> list[list[list[int]]]:
    """For each sample and each of its pictures: [tokens kept, tokens there were], in the last call."""
    rows = []
    for kept, numbers in zip(keep.cpu(), image.cpu()):
        pictures = range(int(numbers.max()) + 1)
        rows.append([[int((kept & (numbers == p)).sum()), int((numbers == p).sum())] for p in pictures])
    return rows


def describe(figures: dict[str, Any]) -> str:
    """One method's figures as a short sentence."""
    words = []
    if figures.get("blocks_causal"):
        share = figures["blocks_read"] / figures["blocks_causal"]
        words.append(f"read {share:.0%} of the causal key blocks in {len(figures['share_read'])} layers")
    for reason, calls in figures.get("dense_calls", {}).items():
        words.append(f"{calls} attention calls ran dense ({reason})")
    if "tokens_attending" in figures:
        shares = figures["tokens_attending"].values()
        words.append(f"{min(shares):.0%} to {max(shares):.0%} of the prompt took part in attention, layer by layer")
    if "visual_tokens" in figures:
        first = min(figures["visual_tokens"], key=int)  # texts, where a report comes from a file
        kept = figures["visual_tokens_kept"][first]
        words.append(f"kept {kept} of {figures['visual_tokens'][first]} visual tokens from layer {first} on")
    if "samples_emptied" in figures:
        counts = {layer: n for layer, n in figures["samples_emptied"].items() if n}
        words.append(
            "no visual tokens left " + ", ".join(f"from layer {i} on in {n} samples" for i, n in counts.items())
        )
    if "bytes_by_precision" in figures:
        held, whole = figures["bytes_by_precision"], figures["bytes_unquantised"]
        parts = ", ".join(f"{_size(n)} in {name}" for name, n in held.items())
        words.append(f"cache of {parts}: {whole / sum(held.values()):.2f} x smaller than unquantised")
    if "rows_held" in figures and ("bytes_by_precision" not in figures or _evicted(figures)):
        words.append(f"held at most {max(figures['rows_held'].values())} of {figures['tokens_seen']} cached tokens")
    if "corrected" in figures:
        touched = [counts["rows"] for counts in figures["corrected"].values() if counts.get("rows")]
        if touched:
            words.append(f"corrected {sum(touched):,} attention rows in {len(touched)} layers")
        for reason, calls in figures["left_alone"].items():
            words.append(f"{calls} attention calls were left as they are ({reason})")
    return "; ".join(words) if figures["fired"] else "; ".join(["NEVER FIRED", *words])


def _evicted(figures: dict[str, Any]) -> bool:
    return any(rows < figures["tokens_seen"] for rows in figures["rows_held"].values())


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
