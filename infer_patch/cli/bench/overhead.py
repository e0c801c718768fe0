"""`infer-patch bench overhead`: what a plan costs in time against the unpatched model."""

from __future__ import annotations

import dataclasses
import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from infer_patch.cli.common import check_writable, numbers, repeat_command, save
from infer_patch.cli.compare import progress_bar, quiet


def overhead(
    model: Annotated[str, typer.Option(help="demo, tiny (random weights), a hub id or a folder.")] = "demo",
    plan: Annotated[str, typer.Option(help="A preset or a .yaml file.")] = "identity",
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "512,2048",
    new_tokens: Annotated[int, typer.Option(help="Decode steps after each prompt.")] = 16,
    rounds: Annotated[int, typer.Option(help="Rounds per length; multiples of 6 balance the order.")] = 12,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: float32 on CPU.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; one is steadier on a busy machine.")] = None,
    clock: Annotated[str, typer.Option(help="wall, or cpu: this process's own time, for a busy machine.")] = "wall",
    out: Annotated[str | None, typer.Option("--json", help="File for the result; - for stdout.")] = None,
) -> None:
    """What a plan costs in time against the unpatched model, with unpatched against itself as the control.

    The goal for the identity plan (the engine in place, no method) is at most 2 %, in prefill and in decode.
    """
    sizes = numbers(lengths, "512,2048")
    check_writable(out)
    console = Console(stderr=True)
    with console.status("Loading PyTorch and transformers") as status:
        import torch

        from infer_patch.evals.compare import model_facts
        from infer_patch.evals.loading import load
        from infer_patch.evals.overhead import GOAL, Settings, measure, tiny_model
        from infer_patch.machine import machine
        from infer_patch.plan import Plan

        settings = Settings(lengths=sizes, new_tokens=new_tokens, rounds=rounds, clock=clock)
        chosen = Plan.of(plan)
        if threads is not None:
            torch.set_num_threads(threads)
        with quiet():
            loaded = tiny_model() if model == "tiny" else load(model, device, dtype, status.update)[0]
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with progress_bar(console) as on_progress, quiet():
        what = f"{chosen.name} on {model}"
        results = measure(loaded, chosen, settings, lambda done, total: on_progress(done, total, what))
    document = {
        "benchmark": "overhead",
        "schema": 1,
        "started": started,
        "command": repeat_command(
            "overhead",
            model=model,
            plan=plan,
            lengths=lengths,
            new_tokens=new_tokens,
            rounds=rounds,
            clock=clock,
            device=device,
            dtype=dtype,
            threads=threads,
        ),
        "model": model_facts(loaded, model),
        "plan": chosen.to_dict(),
        "settings": dataclasses.asdict(settings),
        "goal": None if chosen.methods else f"at most {GOAL:.0%}",
        "results": results,
        "machine": machine(),
    }
    _print(document, Console())
    save(document, out)


def _print(document: dict[str, Any], console: Console) -> None:
    facts, rounds = document["model"], document["settings"]["rounds"]
    title = f"{document['plan']['name']} on {facts['id']} ({facts['dtype']}, {facts['device']}), {rounds} rounds"
    table = Table("tokens", "phase", "run", "ms", "p20", "median", "p80", "verdict", title=title, title_justify="left")
    for result in document["results"]:
        control, patched = (_cells(result, side) for side in ("control", "patched"))
        table.add_row(str(result["length"]), result["phase"], "unpatched", _milliseconds(result, "unpatched"))
        table.add_row("", "", "control", *control)
        table.add_row("", "", "patched", *patched, result["verdict"].split(":")[0], end_section=True)
    console.print(table)
    console.print(
        "control: unpatched once more. ms: median. Percentages: time against unpatched, side by side.",
        highlight=False,
    )
    if document["goal"]:
        console.print(f"Goal of the identity plan: {document['goal']} more time.", highlight=False)
    for result in document["results"]:
        if ":" in result["verdict"]:
            console.print(f"{result['length']} tokens, {result['phase']}: {result['verdict']}.", highlight=False)
    for length in sorted({r["length"] for r in document["results"] if r["never_fired"]}):
        console.print(f"[red]At {length} tokens a method never took effect; see never_fired in the JSON.[/]")


def _cells(result: dict[str, Any], side: str) -> list[str]:
    ratio = result["ratio"][side]
    return [_milliseconds(result, side), *(f"{ratio[key] - 1:+.1%}" for key in ("p20", "median", "p80"))]


def _milliseconds(result: dict[str, Any], side: str) -> str:
    return f"{result['milliseconds'][side]['median']:.1f}"
