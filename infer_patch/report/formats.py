"""Numbers as both the terminal and the page show them."""

from __future__ import annotations

from infer_patch.evals.schema import Cost, Count, Interval
from infer_patch.evals.verdict import megabytes

NONE = "–"  # noqa: RUF001


def count(value: Count | None) -> str:
    return NONE if value is None else f"{value['count']} of {value['of']}"


def distance(value: float | None) -> str:
    """KL and logit gaps: three figures, and a bare 0 for exactly nothing."""
    return NONE if value is None else "0" if value == 0 else f"{value:.2g}" if value < 0.001 else f"{value:.3g}"


def share(value: float | None) -> str:
    return NONE if value is None else f"{value:.0%}" if value in (0, 1) else f"{value:.1%}"


def seconds(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms" if value >= 0.1 else f"{value * 1000:.1f} ms"


def spread(value: Interval | None) -> str:
    """The span from p20 to p80, in the unit of the median beside it."""
    if value is None or value["n"] < 2:
        return ""
    unit = seconds(value["median"]).split()[1]
    low, high = (x if unit == "s" else x * 1000 for x in (value["p20"], value["p80"]))
    digits = 2 if unit == "s" else 0 if high >= 100 else 1
    return f"{low:.{digits}f} to {high:.{digits}f}"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def peak(cost: Cost) -> str:
    return NONE if cost["peak_bytes"] is None else megabytes(cost["peak_bytes"]["median"])


def tokens_read(figures: dict[str, float]) -> str:
    """Share of the causal key blocks that were read, where the method reads blocks."""
    if not figures.get("blocks_causal"):
        return NONE
    return f"{figures['blocks_read'] / figures['blocks_causal']:.0%}"
