"""`infer-patch report`: finished evaluations joined into one page; and pages about one prompt, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from infer_patch.cli.compare import show_places
from infer_patch.cli.sinks import sinks


class _Reports(TyperGroup):
    """Takes anything but the name of a report for folders to join: `infer-patch report RUN...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["runs", *args]
        return super().parse_args(ctx, args)


reports = typer.Typer(
    cls=_Reports,
    help="Join finished evaluations into one page (`infer-patch report RUN...`), or look into one prompt.",
    no_args_is_help=True,
)
reports.command("sinks")(sinks)


@reports.command("runs")
def runs(
    folders: Annotated[list[Path], typer.Argument(help="Result folders of `infer-patch eval`.", metavar="RUN...")],
    out: Annotated[Path, typer.Option(help="The page; a file that is there is replaced.")] = Path("report.html"),
) -> None:
    """Join finished evaluations into one self-contained HTML page: tables, heat maps, quality against time."""
    from infer_patch.errors import PatchError
    from infer_patch.evals.results import write_text
    from infer_patch.report.eval_page import read_eval, render_runs

    if out.is_dir():
        raise PatchError(f"{out} is a folder; give the name of a page, such as {out / 'report.html'}.")
    page = render_runs([read_eval(run) for run in folders])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    show_places(out, None, Console())
