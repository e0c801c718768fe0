"""Options that `calibrate g-search`, `p-sigmoid` and `dyvte` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
Seed = Annotated[int, typer.Option(help="Draws the pictures.", min=0)]
