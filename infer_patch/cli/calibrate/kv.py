"""`infer-patch calibrate kv`: bits for the cache of every layer of one model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from infer_patch.cli.calibrate import calibrations
from infer_patch.cli.calibrate.common import check_out
from infer_patch.cli.common import Device, Dtype, LanguageModel, numbers
from infer_patch.cli.compare import progress_bar, quiet


@calibrations.command("kv")
def kv(
    model: LanguageModel,
    out: Annotated[Path, typer.Option(help="Plan to write (.yaml); the measurements go beside it (.json).")],
    max_drift: Annotated[
        float | None, typer.Option(help="The most mean KL divergence, in nats; the cache is then the smallest. [0.01]")
    ] = None,
    smaller: Annotated[
        float | None, typer.Option(help="Instead: packed tokens so many times smaller; then the least drift.")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the texts.")] = "1000,2000",
    items: Annotated[int, typer.Option(help="Texts of each length.")] = 2,
    answer_tokens: Annotated[int, typer.Option(help="Tokens of the unpatched answer that are compared.")] = 16,
    important: Annotated[float, typer.Option(help="Share of tokens in 4 bits at the width 4/2.")] = 0.4,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Draws the texts.")] = 0,
) -> None:
    """Find how many bits each layer's cache needs: drift per layer and width, and the cheapest policy under a limit."""
    console = Console(stderr=True)
    check_out(out, ".yaml", ".yml")
    sizes = numbers(lengths, "1000,2000")
    with console.status("Loading PyTorch and transformers") as status:
        from infer_patch.calibration.kv import Settings, calibrate
        from infer_patch.evals.loading import load

        limit = 0.01 if max_drift is None and smaller is None else max_drift
        settings = Settings(sizes, items, answer_tokens, limit, smaller, important, seed)
        with quiet():
            loaded, processor = load(model, device, dtype, status.update)
    with progress_bar(console) as on_progress, quiet():
        plan, document = calibrate(loaded, processor, settings, on_progress)
    plan = dataclasses.replace(plan, name=out.stem)
    plan.save(out)
    document = {"calibration": "kv", "schema": 1, "model": model, "settings": dataclasses.asdict(settings), **document}
    out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    show(document, Console())
    typer.echo(f"\nPlan    {out}\nMeasured    {out.with_suffix('.json')}")


def show(document: dict[str, Any], console: Console) -> None:
    """A row per layer: drift at each width, and the width chosen."""
    table = Table("layer", *(f"{width} bits" for width in document["drift"]), "chosen", title="Mean KL, nats")
    for layer, chosen in document["policy"].items():
        values = [f"{row[layer]:.2g}" for row in document["drift"].values()]
        table.add_row(layer, *values, "own" if chosen == "16" else f"{chosen} bits")
    console.print(table)
    console.print(
        f"Packed tokens are {document['times_smaller']:.2f} times smaller. Drift of the whole policy: "
        f"{document['measured_drift']:.2g} nats, {document['expected_drift']:.2g} if layers added up"
        + ("." if document["kept"] else f": MORE than the limit of {document['settings']['max_drift']}."),
        highlight=False,
    )
