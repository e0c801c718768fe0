"""`infer-patch calibrate var`: sink dimensions of one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from infer_patch.cli.calibrate import calibrations
from infer_patch.cli.calibrate.common import check_out
from infer_patch.cli.common import Device, Dtype, LanguageModel
from infer_patch.cli.compare import progress_bar, quiet


@calibrations.command("var")
def var(
    model: LanguageModel,
    out: Annotated[Path, typer.Option(help="File to write; VAR(dims_file=...) reads it.")],
    tau: Annotated[float, typer.Option(help="|x_d| / rms(x) above which a dimension counts.")] = 20.0,
    text: Annotated[Path | None, typer.Option(help="A file with one text a line; else six short ones.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Find the hidden dimensions in which the first token is huge: those of visual sinks, too. Takes seconds."""
    console = Console(stderr=True)
    check_out(out, ".json")
    texts = _lines(text) if text is not None else None
    with console.status("Loading PyTorch and transformers") as status:
        from infer_patch.calibration.var import TEXTS, calibrate
        from infer_patch.evals.loading import load

        with quiet():
            loaded, processor = load(model, device, dtype, status.update)
    with progress_bar(console) as on_progress, quiet():
        document = calibrate(loaded, processor, tau, texts or TEXTS, model, on_progress)
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    table = Table("dimension", "median", "largest", "layers above tau", title="First token", title_justify="left")
    for row in document["largest"]:
        table.add_row(str(row["dim"]), f"{row['median']:.1f}", f"{row['max']:.1f}", f"{row['share_above']:.0%}")
    Console().print(table)
    typer.echo(f"\nDimensions    {document['dims']}\nWritten    {out}")


def _lines(path: Path) -> list[str]:
    from infer_patch.errors import PatchError

    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise PatchError(f"cannot read {path}: {error}") from error
    if not lines:
        raise PatchError(f"{path} holds no text.")
    return lines
