"""`infer-patch calibrate retrieval-heads`: a score for every head of one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from infer_patch.cli.calibrate import calibrations
from infer_patch.cli.calibrate.common import check_out, dumps, work_folder
from infer_patch.cli.common import Device, Dtype, LanguageModel, numbers
from infer_patch.cli.compare import progress_bar, quiet

_SHOWN = 10


@calibrations.command("retrieval-heads")
def retrieval_heads(
    model: LanguageModel,
    out: Annotated[Path, typer.Option(help="Score file to write; RetrievalHeads(scores_file=...) reads it.")],
    work: Annotated[
        Path | None, typer.Option(help="Folder for the tests; the same one again goes on. [OUT without .json]")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts; the paper took 1000 to 50000.")] = (
        "1000,2000,3000,4000,5000"
    ),
    depths: Annotated[int, typer.Option(help="Places of the fact, evenly from the start of the text to its end.")] = 5,
    repeats: Annotated[int, typer.Option(help="Tests per length and depth.")] = 4,
    unique: Annotated[bool, typer.Option("--unique", help="Count each copied token once, as the paper says.")] = False,
    text: Annotated[Path | None, typer.Option(help="Folder of .txt files for the texts; else generated.")] = None,
    answer_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 50,
    picture: Annotated[Path | None, typer.Option(help="Heat map of the scores: a .png, .svg or .pdf file.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Draws texts, keys and numbers.")] = 0,
) -> None:
    """Find the heads that copy: how often each attended most to the very token of the fact that came out.

    Tests are kept one by one, so an interrupted run goes on where it stopped.
    """
    from infer_patch.errors import PatchError
    from infer_patch.report import head_scores_map

    console = Console(stderr=True)
    check_out(out, ".json")
    folder = work_folder(work, out, "the tests")
    if depths < 1:
        raise PatchError(f"--depths must be 1 or more, got {depths}.")
    if picture is not None:
        head_scores_map.check(picture)
    sizes = numbers(lengths, "1000,2000")
    places = tuple(i / (depths - 1) for i in range(depths)) if depths > 1 else (0.5,)
    with console.status("Loading PyTorch and transformers") as status:
        from infer_patch.calibration.retrieval_heads import Settings, calibrate
        from infer_patch.evals.loading import load

        settings = Settings(sizes, places, repeats, unique, answer_tokens, text, seed)
        with quiet():
            loaded, processor = load(model, device, dtype, status.update)
    with progress_bar(console) as on_progress, quiet():
        document = calibrate(loaded, processor, settings, folder, model, on_progress)
    out.write_text(dumps(document, "scores", "mean"), encoding="utf-8")
    if picture is not None:
        head_scores_map.save(document["mean"], picture, "Retrieval heads", "mean share of the fact that was copied")
    _show(document, Console())
    places_of = f"\nScores    {out}\nTests    {folder}" + ("" if picture is None else f"\nPicture    {picture}")
    typer.echo(f"{places_of}\n\nmethods:\n  - {{method: retrieval_heads, scores_file: {out}, top: 10}}")


def _show(document: dict[str, Any], console: Console) -> None:
    from infer_patch.calibration.retrieval_heads import RETRIEVES, retrieval_heads
    from infer_patch.head_scores import HeadScores

    scores = HeadScores.from_dict(document, "the scores")
    table = Table("head", "mean score", title="Heads that copy most (layer-head)", title_justify="left")
    for layer, head in scores.ranked()[:_SHOWN]:
        table.add_row(f"{layer}-{head}", f"{scores.mean((layer, head)):.3f}")
    console.print(table)
    tests, every = document["tests"], scores.layers * scores.heads
    console.print(
        f"{tests['passed']} of {tests['run']} tests passed and counted. {len(retrieval_heads(scores))} of {every} "
        f"heads have a mean of {RETRIEVES} or more, which the paper calls retrieval heads.",
        highlight=False,
    )
