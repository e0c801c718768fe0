"""The run behind `bench prefill` and `bench decode`: measure, print, save."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from infer_patch.cli.common import check_writable, numbers, repeat_command, save
from infer_patch.cli.compare import progress_bar, quiet


def run(phase: str, given: dict[str, Any]) -> None:
    """`given`: the command's options by the names of its parameters."""
    given = dict(given)
    out, lengths = given.pop("out"), numbers(given["lengths"], "2048,8192,32768")
    check_writable(out)
    console = Console(stderr=True)
    with console.status("Loading PyTorch and transformers"):
        import torch

        from infer_patch.evals.attention_bench import Settings, measure
        from infer_patch.evals.budgets import default_plans
        from infer_patch.evals.loading import device_and_dtype
        from infer_patch.machine import machine
        from infer_patch.plan import Plan

        device, dtype = device_and_dtype(given["device"], given["dtype"])
        plans = [Plan.of(name) for name in given["plan"] or default_plans()]
        fields = {f.name for f in dataclasses.fields(Settings)} - {"phase", "lengths"}
        settings = Settings(phase, lengths, **{name: given[name] for name in fields & set(given)})
        if given["threads"] is not None:
            torch.set_num_threads(given["threads"])
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with progress_bar(console) as on_round, quiet():
        found = measure(plans, settings, device, dtype, on_round)
    document = {
        "benchmark": phase,
        "schema": 1,
        "started": started,
        "command": repeat_command(phase, **given),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "settings": dataclasses.asdict(settings),
        **found,
        "machine": machine(),
    }
    show(document, Console())
    save(document, out)


def show(document: dict[str, Any], console: Console) -> None:
    """A table per length; in words where sparse loses, where it starts to win, and what could not run."""
    from infer_patch.evals.attention_bench import CONTROL, NEVER, smaller_caches, warnings_of

    settings, results, decode = document["settings"], document["results"], document["benchmark"] == "decode"
    what = "attention and cache" if settings["with_cache"] else "attention alone"
    console.print(
        f"{document['benchmark']}, {what}: {settings['heads']} heads, {settings['kv_heads']} key heads, "
        f"D {settings['head_dim']}, batch {settings['batch']}, {document['dtype']} on {document['device']}, "
        f"{settings['rounds']} rounds",
        highlight=False,
    )
    for length in settings["lengths"]:
        console.print(_table(length, [r for r in results if r["length"] == length], decode))
    step = " of a step (first: of the one before them)" if decode else ""
    memory = "" if decode else " MiB: peak extra memory of one call (rough on a CPU)."
    console.print(
        f"ms: median{step}; choice, attend: its parts for choosing blocks and for attention. kept: share of the causal "
        "key blocks. ratio: time / dense time of the same round. effic.: efficiency, kept / ratio."
        f"{memory} {CONTROL}: the noise floor. *: ran dense.",
        highlight=False,
    )
    for result in results:
        if result["ran_dense"]:
            console.print(f"{result['side']} ran dense at {result['length']:,} tokens: {result['ran_dense']}.")
        elif result["kind"] == "plan" and result["verdict"].startswith("undecided"):
            console.print(f"{result['side']} at {result['length']:,} tokens: {result['verdict']}.", highlight=False)
    for line in smaller_caches(results):
        console.print(line, highlight=False)
    for line in warnings_of(results):
        console.print(f"[yellow]Warning:[/] {line}.", highlight=False)
    for plan, start in document["starts_to_win"].items():
        place = NEVER if start is None else f"from {start:,} tokens on"
        console.print(f"{plan} is faster than dense: {place}.", highlight=False)
    for side, reason in {s["side"]: s["reason"] for s in document["skipped"]}.items():
        console.print(f"Not timed: {side} ({reason}).", highlight=False)


def _table(length: int, results: list[dict[str, Any]], decode: bool) -> Table:
    """Narrow enough for 80 columns."""
    title = f"{length:,} tokens"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("side", no_wrap=True)
    first = ["first"] if decode else []
    for name in ("ms", *first, "choice", "attend", "kept", "ratio", "p20-p80", "effic."):
        table.add_column(name, justify="right", no_wrap=True)
    if not decode:
        table.add_column("MiB", justify="right")
    for result in results:
        table.add_row(*_row(result, decode))
    return table


def _row(result: dict[str, Any], decode: bool) -> list[str]:
    ratio, kept, peak = result["ratio"], result["kept_share"], result["peak_extra_bytes"]
    sparse = result["ran_dense"] is None
    cells = [
        result["side"] if sparse else f"{result['side']} *",
        _number(result["milliseconds"]["median"]),
        *([_number(result["first_step_ms"])] if decode else []),
        _number(result["selection_ms"] if sparse else None),
        _number(result["attention_ms"] if sparse else None),
        "" if kept is None else f"{kept:.1%}" if kept < 1 else "all",
        _ratio(ratio["median"], 3),
        f"{_ratio(ratio['p20'], 2)}-{_ratio(ratio['p80'], 2)}",
        "" if result["efficiency"] is None else f"{result['efficiency']:.2f}",
    ]
    return cells if decode else [*cells, "" if peak is None else f"{peak / 2**20:.0f}"]


def _number(milliseconds: float | None) -> str:
    if milliseconds is None:
        return ""
    return f"{milliseconds:.3f}" if milliseconds < 10 else f"{milliseconds:,.{1 if milliseconds < 100 else 0}f}"


def _ratio(value: float, digits: int) -> str:
    """So many digits behind the point, fewer before large numbers."""
    return f"{value:.{digits if value < 10 else 1}f}"
