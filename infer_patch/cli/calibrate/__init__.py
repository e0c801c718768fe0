"""`infer-patch calibrate`: what a method must learn about one model, measured once and kept. One file per method."""

from __future__ import annotations

import typer

calibrations = typer.Typer(
    help="Measure what a method needs to know about one model; the result goes into a file that plans name.",
    no_args_is_help=True,
)
