"""`infer-patch calibrate g-search` and `p-sigmoid`: how many visual tokens each layer of one model gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from infer_patch.cli.calibrate import calibrations
from infer_patch.cli.compare import progress_bar, quiet

if TYPE_CHECKING:
    from infer_patch.calibration.visual_questions import Source

Model = Annotated[str, typer.Argument(help="A hub id, a folder, or `demo-vlm` for the demo vision-language model.")]
Out = Annotated[Path, typer.Option(help="Schedule file to write, .json; the method's schedule_file reads it.")]
TraceFile = Annotated[
    Path | None, typer.Option(help="File for what is measured; the same one again goes on. [OUT.trace.jsonl]")
]
Metric = Annotated[
    str, typer.Option(help="agreement with the unpatched model's answers, or accuracy of yes/no answers.")
]
QuestionFiles = Annotated[
    list[Path] | None, typer.Option("--questions", help="A POPE file; again for each split. Else drawn scenes.")
]
Images = Annotated[Path | None, typer.Option(help="Folder of the pictures that the files name.")]
Pictures = Annotated[int, typer.Option(help="Pictures to measure on, about 11.5 questions each.", min=1)]
HeldOut = Annotated[int, typer.Option(help="Other pictures, for a check of the result; 0 for none.", min=0)]
First = Annotated[int, typer.Option(help="First layer that may hold less than everything.", min=1)]
Query = Annotated[str, typer.Option(help="Whose attention ranks tokens: instruction or last.")]
BatchSize = Annotated[int, typer.Option(help="Questions answered at once.", min=1)]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: float32 on CPU.")]
Seed = Annotated[int, typer.Option(help="Draws the pictures.", min=0)]


@calibrations.command("g-search")
def g_search(
    model: Model,
    out: Out,
    trace: TraceFile = None,
    metric: Metric = "agreement",
    eps: Annotated[float, typer.Option(help="Quality that may be lost, as a difference of shares.")] = 0.01,
    questions: QuestionFiles = None,
    images: Images = None,
    pictures: Pictures = 12,
    held_out: HeldOut = 12,
    grid: Annotated[int | None, typer.Option(help="Numbers tried are multiples of this. [visual tokens / 36]")] = None,
    group: Annotated[int, typer.Option(help="So many layers in a row share a number.")] = 1,
    least: Annotated[int, typer.Option(help="The least number of tokens in a layer.")] = 0,
    confirm: Annotated[int, typer.Option(help="Smaller numbers tried where one is rejected.")] = 1,
    first: First = 2,
    query: Query = "instruction",
    batch_size: BatchSize = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Find the fewest visual tokens in each layer that keep the quality, from the first layers to the last.

    Every measurement is kept, so an interrupted run goes on where it stopped.
    """

    def run(source: Source, *given: Any) -> dict[str, Any]:
        from infer_patch.calibration.keep_schedules import calibrate_g_search
        from infer_patch.calibration.schedule_settings import SearchSettings

        settings = SearchSettings(
            source=source,
            metric=metric,
            query=query,
            first=first,
            eps=eps,
            grid=grid,
            group=group,
            least=least,
            confirm=confirm,
        )
        return calibrate_g_search(given[0], given[1], settings, *given[2:])

    _calibrate(run, model, out, trace, questions, images, pictures, held_out, batch_size, device, dtype, seed)


@calibrations.command("p-sigmoid")
def p_sigmoid(
    model: Model,
    out: Out,
    budget: Annotated[float, typer.Option(help="Mean share of visual tokens over all layers.")],
    trace: TraceFile = None,
    metric: Metric = "agreement",
    starts: Annotated[int, typer.Option(help="Curves tried before the optimisation chooses.")] = 10,
    iterations: Annotated[int, typer.Option(help="Curves that it chooses.")] = 30,
    near: Annotated[Path | None, typer.Option(help="A g_search schedule file; the nearest curve is tried too.")] = None,
    questions: QuestionFiles = None,
    images: Images = None,
    pictures: Pictures = 12,
    held_out: HeldOut = 12,
    first: First = 2,
    query: Query = "instruction",
    batch_size: BatchSize = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Find the curve that keeps most of the quality with a given number of visual tokens over all layers.

    Needs scikit-learn. Every measurement is kept, so an interrupted run goes on where it stopped.
    """

    def run(source: Source, *given: Any) -> dict[str, Any]:
        from infer_patch.calibration.keep_schedules import calibrate_p_sigmoid
        from infer_patch.calibration.schedule_settings import SigmoidSettings

        settings = SigmoidSettings(
            source=source,
            metric=metric,
            query=query,
            first=first,
            budget=budget,
            starts=starts,
            iterations=iterations,
            near=near,
            seed=seed,
        )
        return calibrate_p_sigmoid(given[0], given[1], settings, *given[2:])

    _calibrate(run, model, out, trace, questions, images, pictures, held_out, batch_size, device, dtype, seed)


def _calibrate(
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
    from infer_patch.errors import PatchError

    console = Console(stderr=True)
    if out.suffix != ".json" or not out.absolute().parent.is_dir():
        raise PatchError(f"--out must be a .json file in a folder that exists, got {out}.")
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
