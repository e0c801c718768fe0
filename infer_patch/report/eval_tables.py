"""The summary of an evaluation as a table for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from infer_patch.evals.eval_schema import EvalRow, EvalSummary
from infer_patch.evals.schema import Interval
from infer_patch.evals.verdict import megabytes
from infer_patch.report import formats
from infer_patch.report.tables import summary_table

NUMBERS = {"nll": 3, "ppl": 2, "rouge1_f": 2, "kl": 4, "kl_p99": 3, "agreed_tokens": 1, "max_logit_gap": 2}
SHOWN = 3  # metrics beside the headline that fit a terminal


def eval_table(summary: EvalSummary, width: int = 100) -> Table:
    """A row per run: headline, other metrics over all items, flips, cost. Below 110 columns costs are ratios only."""
    narrow = width < 110
    names = shown_metrics(summary, 0 if narrow else SHOWN)
    table = summary_table(f"{summary['title']}, {summary['items']:,} items in {summary['groups']:,} groups")
    difference = "points [95 %]" if summary["unit"] == "share" else "nats [95 %]"
    costs = ("first\ntoken", "per\ntoken", "cache")
    for heading in (*(name.replace("_", "\n") for name in names), difference, "lost /\nwon", *costs):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = summary["rows"]
    for i, row in enumerate(rows):
        cost = row["cost"]
        table.add_row(
            row["name"],
            *(metric(name, of_all(summary, row, name)) for name in names),
            points(row, summary["unit"]),
            flips(row),
            timed(cost["first_token_s"], cost["first_token_ratio"], narrow),
            timed(cost["per_token_s"], cost["per_token_ratio"], narrow),
            megabytes(cost["cache_bytes"]),
            style="dim" if row["role"] == "control" else "",
            end_section=i + 1 == len(rows) or rows[i + 1]["role"] != row["role"],
        )
    return table


def eval_verdicts(summary: EvalSummary) -> RenderableType:
    """The verdict on every plan, and what the control said."""
    lines: list[RenderableType] = []
    for row in summary["rows"][1:]:
        colour = "green" if row["status"] == "ok" else "red"
        if row["role"] == "control":
            lines.append(Text(f"{row['name']}: {row['verdict']}", style="dim"))
            continue
        lines.append(Text.assemble((row["name"], f"bold {colour}"), (f"  {row['what']}", "dim")))
        lines.append(Padding(Text(row["verdict"]), (0, 0, 0, 2)))
    return Group(*lines)


def shown_metrics(summary: EvalSummary, more: int) -> list[str]:
    """The headline and the first metrics that are over all items (those of parts have a / or a space in the name)."""
    names = [name for name in summary["rows"][0]["metrics"] if "/" not in name and " " not in name]
    return [summary["headline"], *[name for name in names if name != summary["headline"]][:more]]


def of_all(summary: EvalSummary, row: EvalRow, name: str) -> float | None:
    """A metric, unless it was taken over fewer items than those beside it."""
    return row["metrics"].get(name) if row["items"] == summary["items"] else None


def metric(name: str, value: float | None) -> str:
    """Shares in per cent, losses in nats and perplexities as they are."""
    return formats.share(value) if value is None or name not in NUMBERS else f"{value:.{NUMBERS[name]}f}"


def points(row: EvalRow, unit: str) -> str:
    """Difference to unpatched with its interval: percentage points, or nats per token."""
    found = row["paired"]
    if found is None:
        return formats.NONE
    if found["low"] == found["high"] == found["difference"] == 0:
        return "0"
    scale, digits = (100, 1) if unit == "share" else (1, 3)
    low, middle, high = (scale * found[key] for key in ("low", "difference", "high"))
    return f"{middle:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def flips(row: EvalRow) -> str:
    found = row["paired"]
    return formats.NONE if found is None or found["p_value"] is None else f"{found['lost']} / {found['won']}"


def timed(value: Interval | None, ratio: Interval | None, short: bool = False) -> str:
    if value is None:
        return formats.NONE
    relative = formats.ratio(ratio and ratio["median"])
    return relative if short and relative else f"{formats.seconds(value['median'])} {relative}".strip()
