"""The command `infer-patch`: one file per command. What is heavy is imported inside the commands, so help is quick."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from infer_patch.cli.bench import bench
from infer_patch.cli.calibrate import act as _act  # noqa: F401  (each adds its command to `calibrate`)
from infer_patch.cli.calibrate import calibrations
from infer_patch.cli.calibrate import dyvte as _dyvte  # noqa: F401
from infer_patch.cli.calibrate import g_search as _g_search  # noqa: F401
from infer_patch.cli.calibrate import kv as _kv  # noqa: F401
from infer_patch.cli.calibrate import moa as _moa  # noqa: F401
from infer_patch.cli.calibrate import p_sigmoid as _p_sigmoid  # noqa: F401
from infer_patch.cli.calibrate import retrieval_heads as _retrieval_heads  # noqa: F401
from infer_patch.cli.calibrate import var as _var  # noqa: F401
from infer_patch.cli.chat import chat
from infer_patch.cli.compare import compare
from infer_patch.cli.demo import demo
from infer_patch.cli.doctor import doctor
from infer_patch.cli.eval import evaluations
from infer_patch.cli.list import show
from infer_patch.cli.report import reports
from infer_patch.errors import MissingDependencyError, PatchError


class _Commands(TyperGroup):
    """Says what a user can put right in one line; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (PatchError, MissingDependencyError) as error:
            message = " ".join(str(error).split())
            Console(stderr=True).print(Text(f"error: {message}", style="red"), soft_wrap=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            words = "Stopped."
            if ctx.invoked_subcommand == "calibrate":
                words += " What was measured so far is kept where the command has a work folder; run it again to go on."
            Console(stderr=True).print(words, highlight=False)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    help="Training-free inference patches for Hugging Face models: one line on, one line off.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


def _version(asked: bool) -> None:
    if asked:
        from infer_patch import __version__

        typer.echo(f"infer-patch {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command("demo")(demo)
app.command("compare")(compare)
app.command("chat")(chat)
app.command("list")(show)
app.command("doctor")(doctor)
app.add_typer(evaluations, name="eval")
app.add_typer(bench, name="bench")
app.add_typer(calibrations, name="calibrate")
app.add_typer(reports, name="report")


def main() -> None:
    """Entry point of `infer-patch` and `python -m infer_patch`."""
    app(prog_name="infer-patch")
