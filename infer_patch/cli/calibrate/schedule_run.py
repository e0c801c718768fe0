"""What `calibrate g-search` and `p-sigmoid` share: the run, the schedule file, what is shown of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from infer_patch.cli.calibrate.common import check_out
from infer_patch.cli.compare import progress_bar, quiet


def calibrate(
    run: Callable[..., dict[str, Any]],
    model: str,
    out: Path,
    trace: Path | None,
    files: list[Path] | None,
    images: Path | None,
    pictures: int,
    held_out: int,
    batch_size: int,
    device: str,
    dtype: str,
    seed: int,
) -> None:
    """Load the model, measure, write the file, show it."""
    console = Console(stderr=True)
    check_out(out, ".json")
    with console.status("Loading PyTorch and transformers") as status:
        from infer_patch.calibration.visual_questions import Source
        from infer_patch.evals.loading import load

        source = Source(pictures, held_out, tuple(files or ()), images, batch_size, seed)
        with quiet():
            loaded, processor = load(model, device, dtype, status.update)
    with progress_bar(console) as on_progress, quiet():
        file = trace or out.with_suffix(".trace.jsonl")
        document = run(source, loaded, processor, file, model, on_progress)
    out.write_text(dumps(document), encoding="utf-8")
    _show(document, Console())
    typer.echo(f"\nSchedule    {out}\nMeasured    {file}\n")
    typer.echo(f"methods:\n  - method: {document['method']}\n    schedule_file: {out}")


def dumps(document: dict[str, Any]) -> str:
    """JSON with a line for each entry."""
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in document.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _show(document: dict[str, Any], console: Console) -> None:
    table = Table("layers", "visual tokens", "share", title="Schedule", title_justify="left")
    counts = document["counts"]
    starts = [i for i in range(len(counts)) if i == 0 or counts[i] != counts[i - 1]]
    for start, stop in zip(starts, [*starts[1:], len(counts)]):
        layers = f"{start}" if stop == start + 1 else f"{start}-{stop - 1}"
        table.add_row(layers, str(counts[start]), f"{counts[start] / document['n_visual_ref']:.1%}")
    console.print(table)
    other = document["held_out"]
    checked = f"; on {other['questions']} others {other['q']:.3f}, unpatched {other['q_full']:.3f}" if other else ""
    console.print(
        f"{document['metric']} {document['q']:.3f}, unpatched {document['q_full']:.3f}{checked}. Mean over the layers "
        f"{document['mean_rate']:.1%} of the visual tokens, {document['cost']:.1%} of the decoder's work (F1). "
        f"{document['evaluations']} schedules compared.",
        highlight=False,
    )
