"""`infer-patch calibrate dyvte`: gates that see when the visual tokens of a prompt may leave."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from infer_patch.cli.calibrate import calibrations
from infer_patch.cli.calibrate import visual_options as option
from infer_patch.cli.common import Device, Dtype
from infer_patch.cli.compare import progress_bar, quiet


@calibrations.command("dyvte")
def dyvte(
    model: option.Model,
    out: Annotated[Path, typer.Option(help="Folder to write; the method's `gates` names it.")],
    work: Annotated[
        Path | None, typer.Option(help="Folder for features and labels; the same one again goes on. [OUT.work]")
    ] = None,
    questions: option.QuestionFiles = None,
    images: option.Images = None,
    pictures: Annotated[int, typer.Option(help="Pictures to fit on, about 11.5 questions each.", min=1)] = 40,
    held_out: Annotated[int, typer.Option(help="Other pictures, that gates are judged on.", min=1)] = 12,
    hidden: Annotated[int, typer.Option(help="Width of a gate; the paper's is 2048.")] = 64,
    steps: Annotated[int, typer.Option(help="Steps of fitting a gate.")] = 60,
    batch_size: option.BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: option.Seed = 0,
) -> None:
    """Fit a gate for every layer, on runs whose visual tokens leave there against full runs.

    Features and labels are kept batch by batch, so an interrupted run goes on where it stopped.
    """
    from infer_patch.errors import PatchError

    console = Console(stderr=True)
    if not out.absolute().parent.is_dir() or out.is_file():
        raise PatchError(f"--out must be a folder inside one that exists, got {out}.")
    with console.status("Loading PyTorch and transformers") as status:
        from infer_patch.artifacts import save_artifact
        from infer_patch.calibration.dyvte import GateSettings, calibrate_dyvte
        from infer_patch.calibration.visual_questions import Source
        from infer_patch.evals.loading import load

        source = Source(pictures, held_out, tuple(questions or ()), images, batch_size, seed)
        settings = GateSettings(source=source, hidden=hidden, steps=steps, seed=seed)
        with quiet():
            loaded, processor = load(model, device, dtype, status.update)
    folder = work or out.with_name(f"{out.name}.work")
    with progress_bar(console) as on_progress, quiet():
        tensors, meta = calibrate_dyvte(loaded, processor, settings, folder, model, on_progress)
    save_artifact(out, "dyvte", tensors, meta, loaded)
    _show(meta, Console())
    typer.echo(f"\nGates    {out}\nMeasured    {folder}\n\nmethods:\n  - method: dyvte\n    gates: {out}")


def _show(meta: dict[str, Any], console: Console) -> None:
    table = Table("after layer", "must stay", "right", "may leave", "right", title="Gates", title_justify="left")
    for layer, figures in meta["class_accuracy"].items():
        cells = [figures["held_out"][name] for name in ("stay", "leave")]
        shown = [(str(c["samples"]), "-" if c["right"] is None else f"{c['right']:.1%}") for c in cells]
        table.add_row(layer, *shown[0], *shown[1])
    console.print(table)
    console.print("Questions about held-out pictures: decisions of each gate by itself, by class.", highlight=False)
