"""`infer-patch bench recall`: how much of the dense attention falls into the blocks that plans read."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from infer_patch.cli.common import Device, Dtype, check_writable, repeat_command, save
from infer_patch.cli.compare import progress_bar, quiet


def recall(
    model: Annotated[str, typer.Option(help="demo, a hub id or a folder.")] = "demo",
    plan: Annotated[
        list[str] | None,
        typer.Option(help="A preset or a .yaml file; again for more. Without: every preset that only selects."),
    ] = None,
    budget: Annotated[
        list[int] | None, typer.Option(help="Tokens read per query block; again for more. Without: 256, 512, 1024.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 4096,
    text: Annotated[
        Path | None, typer.Option(help="A text file or a folder of .txt files instead of generated prose.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of generated prose.")] = 1,
    query_blocks: Annotated[int, typer.Option(help="Query blocks of 64 looked at, in the second half.")] = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    seed: Annotated[int, typer.Option(help="Of generated prose and of the random lists.")] = 0,
    out: Annotated[str | None, typer.Option("--json", help="File for the result; - for stdout.")] = None,
    plot: Annotated[str | None, typer.Option(help="File for a plot by layer: .png, .svg or .pdf.")] = None,
) -> None:
    """Share of the dense attention mass that lies in the key blocks each plan reads, on a real model and text.

    All plans read the same number of tokens per query block. The oracle reads the blocks with most mass, one list per
    key head; random reads any.
    """
    options = {k: v for k, v in locals().items() if k not in ("out", "plot")}
    check_writable(out, plot)
    console = Console(stderr=True)
    with console.status("Loading PyTorch and transformers") as status:
        import torch

        from infer_patch.evals.budgets import default_plans
        from infer_patch.evals.compare import model_facts
        from infer_patch.evals.loading import load
        from infer_patch.evals.recall import Settings, measure
        from infer_patch.machine import machine
        from infer_patch.plan import Plan
        from infer_patch.report import recall_plot

        if plot is not None:
            recall_plot.check(plot)
        settings = Settings(budgets=tuple(budget or (256, 512, 1024)), query_blocks=query_blocks, seed=seed)
        plans = [Plan.of(name) for name in plan or default_plans()]
        if threads is not None:
            torch.set_num_threads(threads)
        with quiet():
            loaded, processor = load(model, device, dtype, status.update)
            ids = _prompts(getattr(processor, "tokenizer", processor), length, text, prompts, seed)
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with progress_bar(console) as on_layer, quiet():
        results = measure(loaded, plans, ids, settings, on_layer)
    document: dict[str, Any] = {
        "benchmark": "recall",
        "schema": 1,
        "started": started,
        "command": repeat_command("recall", **{k: str(v) if k == "text" and v else v for k, v in options.items()}),
        "model": model_facts(loaded, model),
        "text": "generated prose" if text is None else text.name,
        "tokens": [len(x) for x in ids],
        "plans": [p.to_dict() for p in plans],
        "settings": dataclasses.asdict(settings),
        "results": results,
        "machine": machine(),
    }
    show(document, Console())
    save(document, out)
    if plot is not None:
        recall_plot.save(results, plot, f"{document['model']['id']}, {document['text']}, {length:,} tokens")


def show(document: dict[str, Any], console: Console) -> None:
    facts, results = document["model"], document["results"]
    tokens = ", ".join(f"{n:,}" for n in dict.fromkeys(document["tokens"]))
    title = f"Attention mass in the blocks read: {facts['id']} ({facts['dtype']}), {document['text']}, {tokens} tokens"
    table = Table("budget", "plan", "tokens read", "recall", "p10", "worst layer", title=title, title_justify="left")
    before = None
    for result in results:
        if before not in (None, result["budget"]):
            table.add_section()
        table.add_row("" if before == result["budget"] else f"{result['budget']:,}", *_row(result))
        before = result["budget"]
    console.print(table)
    console.print(
        "recall: mean over layers, query heads and queries; p10: their 10th percentile. Layers that a plan leaves "
        "dense do not count.",
        highlight=False,
    )
    for name in dict.fromkeys(r["plan"] for r in results if r["dense_layers"]):
        dense = next(r["dense_layers"] for r in results if r["plan"] == name and r["dense_layers"])
        for reason in dict.fromkeys(dense.values()):
            layers = ", ".join(str(i) for i, why in dense.items() if why == reason)
            console.print(f"{name} is dense in layers {layers}: {reason}.", highlight=False)


def _row(result: dict[str, Any]) -> list[str]:
    if result["recall"] is None:
        return [result["plan"], "", "ran dense", "", ""]
    worst = min(result["by_layer"].items(), key=lambda item: item[1]["recall"])
    return [
        result["plan"],
        f"{result['tokens_read']:,.0f}",
        f"{result['recall']:.3f}",
        f"{result['p10']:.3f}",
        f"{worst[1]['recall']:.3f} (layer {worst[0]})",
    ]


def _prompts(tokenizer: Any, length: int, text: Path | None, count: int, seed: int) -> list[list[int]]:
    """Token ids of each prompt."""
    from infer_patch.errors import PatchError
    from infer_patch.evals.haystack import build_haystack

    if text is None:
        texts = [build_haystack(tokenizer, length, seed + i) for i in range(count)]
    else:
        files = sorted(text.glob("*.txt")) if text.is_dir() else [text]
        if not files:
            raise PatchError(f"no .txt file in {text}")
        try:
            texts = [file.read_text(encoding="utf-8") for file in files]
        except (OSError, UnicodeDecodeError) as error:
            raise PatchError(f"cannot read the text: {error}") from error
    ids = [tokenizer(t)["input_ids"][:length] for t in texts]
    if text is not None and (short := [f.name for f, x in zip(files, ids) if len(x) < length]):
        raise PatchError(
            f"shorter than {length} tokens: {', '.join(short)}. Leave them out, or give a shorter --length."
        )
    return ids
