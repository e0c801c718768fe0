"""The numbers of a summary as tables for the terminal, at most 100 columns wide."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from infer_patch.evals.schema import Cost, Interval, Row, Sample, Summary
from infer_patch.evals.verdict import megabytes
from infer_patch.report import formats

_CUT = 400  # characters of an output
_STYLES = {"failed": "red", "dense": "cyan", "ok": "green", "reference": "dim"}


def summary_table(title: str) -> Table:
    """An empty table with a column for the names of the runs."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )
    table.add_column("", overflow="fold")
    return table


def comparison_table(summary: Summary, width: int = 100) -> Table:
    """Unpatched, plans and controls: quality, drift and cost, a row each.

    Below 96 columns two columns are left to the page: same top-1, and keys read.
    """
    narrow = width < 96
    rows = summary["rows"]
    searched = rows[0]["found"] is not None
    lengths = [cost["prompt_tokens"] for cost in rows[0]["cost"]]
    table = summary_table(summary["title"])
    for heading in (["found"] if searched else []) + ["same\noutput", "KL per\ntoken", "same\ntop-1"][
        : 2 if narrow else 3
    ]:
        table.add_column(heading, justify="right", no_wrap=True)
    at = f"first token\nat {lengths[0]:,}" if lengths else "first token"
    for heading in (at, "per token\nafter it", "cache", "keys\nread")[: 3 if narrow else 4]:
        table.add_column(heading, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        last_of_role = i + 1 == len(rows) or rows[i + 1]["role"] != row["role"]
        table.add_row(
            *_cells(row, searched, narrow), style="dim" if row["role"] == "control" else "", end_section=last_of_role
        )
    return table


def verdicts(summary: Summary) -> RenderableType:
    """The verdict on every plan, and what the controls said."""
    lines: list[RenderableType] = []
    for row in summary["rows"]:
        if row["role"] == "plan":
            lines.append(Text.assemble((row["name"], f"bold {_STYLES[row['status']]}"), (f"  {row['what']}", "dim")))
            lines.append(Padding(Text(row["verdict"]), (0, 0, 0, 2)))
        elif row["note"]:
            lines.append(Text(f"{row['name']}: {row['note']}", style="dim"))
    return Group(*lines)


def outputs(samples: Sequence[Sample]) -> Table:
    """The outputs of one prompt, one under the other, cut; the text from the first differing token on stands out."""
    table = Table(show_header=False, pad_edge=False, box=SIMPLE_HEAD, title_justify="left", title=samples[0]["prompt"])
    table.add_column(style="bold", no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for sample in samples:
        same, other = sample["output"][: sample["same_text"]], sample["output"][sample["same_text"] :]
        text = Text.assemble(same, other if sample["flags"]["identical"] else (other, "yellow"))
        if len(text) > _CUT:
            text = text[:_CUT].append(" ...", "dim")
        table.add_row(sample["plan"], text)
    return table


def _cells(row: Row, searched: bool, narrow: bool) -> list[str]:
    drift, cost = row["drift"], row["cost"][0] if row["cost"] else None
    cells = [row["name"]]
    if searched:
        cells.append(formats.count(row["found"]))
    cells += [
        formats.count(row["identical"]),
        formats.distance(drift and drift["kl_mean"]),
    ]
    if narrow:
        return cells + _cost_cells(cost)
    return [*cells, formats.share(drift and drift["top1"]), *_cost_cells(cost), _keys_read(row)]


def _cost_cells(cost: Cost | None) -> list[str]:
    if cost is None:
        return [formats.NONE] * 3
    return [
        _timed(cost["first_token_s"], cost["first_token_ratio"]),
        _timed(cost["per_token_s"], cost["per_token_ratio"]),
        megabytes(cost["cache_bytes"]),
    ]


def _timed(value: Interval | None, ratio: float | None) -> str:
    if value is None:
        return formats.NONE
    return f"{formats.seconds(value['median'])} {formats.ratio(ratio)}".strip()


def _keys_read(row: Row) -> str:
    shares = [formats.tokens_read(effect["figures"]) for effect in row["effect"]]
    return ", ".join(s for s in shares if s != formats.NONE) or formats.NONE
