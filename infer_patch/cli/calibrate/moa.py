"""`infer-patch calibrate moa`: spans for every head of one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from infer_patch.cli.calibrate import calibrations
from infer_patch.cli.calibrate.common import WorkFolder, check_out, dumps, work_folder
from infer_patch.cli.common import Device, Dtype, LanguageModel, numbers
from infer_patch.cli.compare import progress_bar, quiet


@calibrations.command("moa")
def moa(
    model: LanguageModel,
    out: Annotated[Path, typer.Option(help="Plan file to write; MoA(plan_file=...) reads it.")],
    work: WorkFolder = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the profiled prompts; the paper took 2048,4096,8192.")] = (
        "512,1024,2048"
    ),
    items: Annotated[int, typer.Option(help="Prompts of each length; the paper took 50.")] = 6,
    density: Annotated[float, typer.Option(help="Share of all keys that heads may hold on average.")] = 0.5,
    text: Annotated[Path | None, typer.Option(help="Folder of .txt files for the prompts; else generated.")] = None,
    answer_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 32,
    max_rules: Annotated[int, typer.Option(help="Distinct rules in a layer: 1, 2, or 0 for any number.")] = 2,
    reduce: Annotated[str, typer.Option(help="Influence of query heads that share a key head: sum or max.")] = "sum",
    intervals: Annotated[int, typer.Option(help="Steps of the trade between lengths.")] = 4,
    validation_length: Annotated[
        int | None, typer.Option(help="Tokens where plans are compared. [1.5 x the longest]")
    ] = None,
    validation_items: Annotated[int, typer.Option(help="Prompts there.")] = 4,
    validation_plans: Annotated[int, typer.Option(help="Plans compared at most.")] = 6,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Draws the prompts.")] = 0,
) -> None:
    """Find how far each head must look: a plan of elastic spans at a density, measured on the model's own answers.

    Prompts are profiled one by one and kept, so an interrupted run goes on where it stopped.
    """
    console = Console(stderr=True)
    check_out(out, ".json")
    folder = work_folder(work, out)
    sizes = numbers(lengths, "512,1024")
    with console.status("Loading PyTorch and transformers") as status:
        from infer_patch.calibration.moa import calibrate
        from infer_patch.calibration.moa_settings import Settings
        from infer_patch.evals.loading import load

        settings = Settings(
            lengths=sizes,
            items=items,
            answer_tokens=answer_tokens,
            density=density,
            max_rules=max_rules or None,
            reduce=reduce,  # type: ignore[arg-type]
            intervals=intervals,
            validation_length=validation_length,
            validation_items=validation_items,
            validation_plans=validation_plans,
            text_folder=text,
            seed=seed,
        )
        with quiet():
            loaded, processor = load(model, device, dtype, status.update)
    with progress_bar(console) as on_progress, quiet():
        document = calibrate(loaded, processor, settings, folder, model, on_progress)
    out.write_text(dumps(document, "alphas", "betas"), encoding="utf-8")
    _show(document, Console())
    typer.echo(f"\nPlan    {out}\nMeasured    {folder}\n\nmethods:\n  - method: moa\n    plan_file: {out}")


def _show(document: dict[str, Any], console: Console) -> None:
    validation = document["validation"]
    table = Table("at", "density", "expected loss", title="Plan", title_justify="left")
    for length, density in document["densities"].items():
        loss = document["expected_loss"].get(length)
        table.add_row(f"{int(length):,}", f"{density:.3f}", "" if loss is None else f"{loss:.4g}")
    console.print(table)
    console.print(
        f"Loss of the answers at {validation['length']:,} tokens, not profiled: {validation['loss']:.4f}; unpatched "
        f"{validation['unpatched']:.4f}; one window for all heads, of the same density, "
        f"{validation['one_window_for_all']:.4f}. Best of {len(validation['plans_compared'])} plans compared, of "
        f"{validation['plans_found']} found.",
        highlight=False,
    )
