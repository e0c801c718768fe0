"""`infer-patch bench overhead`: what plans cost in time against the unpatched model."""

from __future__ import annotations

import dataclasses
import time
from itertools import groupby
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from infer_patch.cli.common import Device, Dtype, check_writable, numbers, repeat_command, save
from infer_patch.cli.compare import progress_bar, quiet
from infer_patch.errors import PatchError


def overhead(
    model: Annotated[str, typer.Option(help="demo, tiny (random weights), a hub id or a folder.")] = "demo",
    plan: Annotated[list[str] | None, typer.Option(help="A preset or a .yaml file; again for more.")] = None,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "512,2048",
    prose: Annotated[
        bool, typer.Option("--prose", help="Read generated prose, not random tokens: for plans that look at content.")
    ] = False,
    new_tokens: Annotated[int, typer.Option(help="Decode steps after each prompt.")] = 16,
    rounds: Annotated[
        int, typer.Option(help="Rounds per length; with one plan, multiples of 6 balance the order.")
    ] = 12,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; one is steadier on a busy machine.")] = None,
    clock: Annotated[str, typer.Option(help="wall, or cpu: this process's own time, for a busy machine.")] = "wall",
    out: Annotated[str | None, typer.Option("--json", help="File for the result; - for stdout.")] = None,
) -> None:
    """What plans cost in time against the unpatched model, with unpatched against itself as the control.

    The goal for the identity plan (the engine in place, no method) is at most 2 %, in prefill and in decode.
    """
    sizes = numbers(lengths, "512,2048")
    check_writable(out)
    if prose and model == "tiny":
        raise PatchError("the tiny model has no tokenizer and cannot read prose; take another --model.")
    console = Console(stderr=True)
    with console.status("Loading PyTorch and transformers") as status:
        import torch

        from infer_patch.evals.compare import model_facts
        from infer_patch.evals.haystack import build_haystack
        from infer_patch.evals.loading import load
        from infer_patch.evals.overhead import GOAL, Settings, measure, tiny_model
        from infer_patch.machine import machine
        from infer_patch.plan import Plan

        settings = Settings(lengths=sizes, new_tokens=new_tokens, rounds=rounds, clock=clock)
        chosen = [Plan.of(name) for name in plan or ["identity"]]
        if threads is not None:
            torch.set_num_threads(threads)
        with quiet():
            loaded, tokens = tiny_model(), None
            if model != "tiny":
                loaded, tokenizer = load(model, device, dtype, status.update)
                if prose:  # a little more than is read
                    text = build_haystack(tokenizer, max(sizes) + new_tokens + 200)
                    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with progress_bar(console) as on_progress, quiet():
        what = f"{', '.join(one.name for one in chosen)} on {model}"
        results = measure(loaded, chosen, settings, lambda done, total: on_progress(done, total, what), tokens)
    document = {
        "benchmark": "overhead",
        "schema": 2,
        "started": started,
        "command": repeat_command(
            "overhead",
            model=model,
            plan=plan or ["identity"],
            lengths=lengths,
            prose=prose,
            new_tokens=new_tokens,
            rounds=rounds,
            clock=clock,
            device=device,
            dtype=dtype,
            threads=threads,
        ),
        "model": model_facts(loaded, model),
        "plans": [one.to_dict() for one in chosen],
        "settings": {**dataclasses.asdict(settings), "prose": prose},
        "goal": None if any(one.methods for one in chosen) else f"at most {GOAL:.0%}",
        "results": results,
        "machine": machine(),
    }
    _print(document, Console())
    save(document, out)


def _print(document: dict[str, Any], console: Console) -> None:
    facts, rounds = document["model"], document["settings"]["rounds"]
    title = f"{facts['id']} ({facts['dtype']}, {facts['device']}), {rounds} {'round' if rounds == 1 else 'rounds'}"
    table = Table("tokens", "phase", "run", "ms", "p20", "median", "p80", "verdict", title=title, title_justify="left")
    for (length, phase), found in groupby(document["results"], key=lambda result: (result["length"], result["phase"])):
        plans = list(found)
        table.add_row(str(length), phase, "unpatched", _milliseconds(plans[0], "unpatched"))
        table.add_row("", "", "control", *_cells(plans[0], "control"))
        for result in plans:
            verdict = result["verdict"].split(":")[0]
            table.add_row("", "", result["plan"], *_cells(result, "patched"), verdict, end_section=result is plans[-1])
    console.print(table)
    console.print(
        "control: unpatched once more. ms: median. Percentages: time against unpatched, side by side.",
        highlight=False,
    )
    if document["goal"]:
        console.print(f"Goal of the identity plan: {document['goal']} more time.", highlight=False)
    for result in document["results"]:
        if ":" in result["verdict"]:
            place = f"{result['length']} tokens, {result['phase']}, {result['plan']}"
            console.print(f"{place}: {result['verdict']}.", highlight=False)
        if result["never_fired"] and result["phase"] == "prefill":
            console.print(
                f"[red]At {result['length']} tokens {', '.join(result['never_fired'])} of {result['plan']} never took "
                "effect.[/]"
            )


def _cells(result: dict[str, Any], side: str) -> list[str]:
    ratio = result["ratio"][side]
    return [_milliseconds(result, side), *(f"{ratio[key] - 1:+.1%}" for key in ("p20", "median", "p80"))]


def _milliseconds(result: dict[str, Any], side: str) -> str:
    return f"{result['milliseconds'][side]['median']:.1f}"
