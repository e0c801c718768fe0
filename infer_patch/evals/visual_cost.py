"""Work of the decoder as a function of the visual tokens in each layer (the cost model of FastV's paper)."""

from __future__ import annotations

from collections.abc import Sequence


def layer_macs(tokens: float, hidden: int, intermediate: int) -> float:
    """F1: multiply-accumulates of one layer in prefill, 4 n d^2 + 2 n^2 d + 2 n d m (two matrices in the MLP)."""
    return 4 * tokens * hidden**2 + 2 * tokens**2 * hidden + 2 * tokens * hidden * intermediate


def cost_ratio(counts: Sequence[float], text: float, visual: float, hidden: int, intermediate: int) -> float:
    """Work with `counts[l]` visual tokens in layer l, as a share of that with all `visual` tokens in every layer.

    `text` tokens are in every layer. Vision tower and language head are not counted.
    """
    full = layer_macs(text + visual, hidden, intermediate) * len(counts)
    return sum(layer_macs(text + count, hidden, intermediate) for count in counts) / full


def causal_ratio(counts: Sequence[float], text: float, visual: float, hidden: int, intermediate: int) -> float:
    """The same share for a decoder with a gated MLP (three matrices) whose attention skips what lies ahead."""

    def macs(n: float) -> float:
        return 4 * n * hidden**2 + n**2 * hidden + 3 * n * hidden * intermediate

    return sum(macs(text + count) for count in counts) / (macs(text + visual) * len(counts))
