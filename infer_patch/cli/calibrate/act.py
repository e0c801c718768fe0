"""`infer-patch calibrate act`: heads of one model that answer better under ACT."""

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


@calibrations.command("act")
def act(
    model: LanguageModel,
    out: Annotated[Path, typer.Option(help="Head list to write; ACT(heads_file=...) reads it.")],
    work: WorkFolder = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder of .jsonl files, a dataset each; or hub data sets as NAME:SPLIT, NAME:CONFIGURATION:SPLIT, "
            "with commas between. Else generated."
        ),
    ] = None,
    test: Annotated[str | None, typer.Option(help="The same, held out: patched against unpatched at the end.")] = None,
    questions: Annotated[int, typer.Option(help="Questions generated or drawn from the hub, of each dataset.")] = 100,
    test_questions: Annotated[int, typer.Option(help="The same, held out.")] = 100,
    layers: Annotated[str, typer.Option(help="Layers whose heads are tried, as 2,3,4. [2 to L - 2]")] = "",
    beta: Annotated[float, typer.Option(help="Share of its attention that a sink keeps.")] = 0.4,
    threshold: Annotated[float, typer.Option(help="Mean received attention of a sink.")] = 0.1,
    min_gain: Annotated[float, typer.Option(help="Heads are kept above this mean gain in accuracy.")] = 0.0,
    max_heads: Annotated[int | None, typer.Option(help="Keep the best ones only.")] = None,
    batch: Annotated[int, typer.Option(help="Questions answered together.")] = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Draws the generated questions.")] = 0,
) -> None:
    """Try ACT on one head after the other, keep those that answer better, and judge them on held-out questions.

    Batches are kept, so an interrupted run goes on where it stopped.
    """
    console = Console(stderr=True)
    check_out(out, ".json")
    folder = work_folder(work, out)
    with console.status("Loading PyTorch and transformers") as status:
        from infer_patch.calibration.act import calibrate
        from infer_patch.calibration.act_settings import Settings
        from infer_patch.calibration.choices import generated, read_questions
        from infer_patch.calibration.hub_questions import hub_questions
        from infer_patch.evals.loading import load

        def read(where: str, count: int) -> Any:
            return read_questions(Path(where)) if Path(where).is_dir() else hub_questions(where, count, seed)

        asked = generated(False, questions, seed) if data is None else read(data, questions)
        held_out = read(test, test_questions) if test is not None else {}
        if data is None and test is None:
            held_out = generated(True, test_questions, seed)
        settings = Settings(
            beta=beta,
            threshold=threshold,
            layers=numbers(layers, "2,3,4") if layers else None,
            min_gain=min_gain,
            max_heads=max_heads,
            batch=batch,
            seed=seed,
        )
        with quiet():
            loaded, processor = load(model, device, dtype, status.update)
    with progress_bar(console) as on_progress, quiet():
        document = calibrate(loaded, processor, asked, settings, folder, held_out, model, on_progress)
    document["seed"] = seed
    out.write_text(dumps(document, "delta"), encoding="utf-8")
    picture = _picture(document, folder)
    _show(document, Console())
    typer.echo(f"\nHeads    {out}\nMeasured    {folder}")
    if picture is not None:
        typer.echo(f"Gain of each head    {picture}")
    if document["heads"]:
        typer.echo(f"\nmethods:\n  - method: act\n    heads_file: {out}")


def _picture(document: dict[str, Any], folder: Path) -> Path | None:
    from infer_patch.availability import installed_version

    if installed_version("matplotlib") is None:
        return None
    from infer_patch.report.head_map import head_map

    return head_map(document["delta"], document["heads"], folder / "gain.png", "gain in accuracy")


def _show(document: dict[str, Any], console: Console) -> None:
    count = sum(map(len, document["heads"].values()))
    if not count:
        console.print(
            "No head answers better alone: the list is empty and of no use to a plan, and nothing is compared on "
            "held-out questions. Try more --questions, or other --layers.",
            highlight=False,
        )
    else:
        console.print(f"{count} {'head answers' if count == 1 else 'heads answer'} better alone.", highlight=False)
    found = document["held_out"]
    if not found:
        return
    table = Table("held out", "questions", "unpatched", "patched", title_justify="left")
    for name, row in found["datasets"].items():
        table.add_row(name, str(row["questions"]), f"{row['unpatched']:.3f}", f"{row['patched']:.3f}")
    console.print(table)
    console.print(
        f"Difference {found['difference']:+.3f}, 95 % interval {found['low']:+.3f} to {found['high']:+.3f}; "
        f"{found['won']} won, {found['lost']} lost, p = {found['p_value']:.3f} (McNemar).",
        highlight=False,
    )
