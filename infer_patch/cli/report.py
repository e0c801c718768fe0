"""`infer-patch report`: finished evaluations joined into one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from infer_patch.cli.compare import show_places


def report(
    runs: Annotated[list[Path], typer.Argument(help="Result folders of `infer-patch eval`.", metavar="RUN...")],
    out: Annotated[Path, typer.Option(help="The page; a file that is there is replaced.")] = Path("report.html"),
) -> None:
    """Join finished evaluations into one self-contained HTML page: tables, heat maps, quality against time."""
    from infer_patch.errors import PatchError
    from infer_patch.evals.results import write_text
    from infer_patch.report.eval_page import read_eval, render_runs

    if out.is_dir():
        raise PatchError(f"{out} is a folder; give the name of a page, such as {out / 'report.html'}.")
    page = render_runs([read_eval(run) for run in runs])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    show_places(out, None, Console())
