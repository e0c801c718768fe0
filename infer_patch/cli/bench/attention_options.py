"""Options that `bench prefill` and `bench decode` share."""

from __future__ import annotations

from typing import Annotated

import typer

Plans = Annotated[
    list[str] | None,
    typer.Option("--plan", help="A preset or a .yaml file; again for more. Without: every preset that only selects."),
]
Lengths = Annotated[str, typer.Option(help="Numbers of tokens.")]
Heads = Annotated[int, typer.Option(help="Query heads.")]
KvHeads = Annotated[int, typer.Option(help="Key heads.")]
HeadDim = Annotated[int, typer.Option(help="Size of a head.")]
Batch = Annotated[int, typer.Option(help="Samples, equally long.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: float32 on CPU, bfloat16 on a GPU.")]
Rounds = Annotated[int, typer.Option(help="Timed rounds per length, after one that warms up.")]
Budget = Annotated[int | None, typer.Option(help="Tokens each plan reads per query block, instead of its own.")]
Keep = Annotated[float | None, typer.Option(help="Instead: share of the causal key blocks each plan reads.")]
Force = Annotated[bool, typer.Option("--force", help="Run sparse even where a plan would run dense.")]
Layers = Annotated[int, typer.Option(help="Decoder layers of the model that plans are told of.")]
Layer = Annotated[int | None, typer.Option(help="The layer to play (default: a middle one that the plan acts on).")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; one is steadier on a busy machine.")]
Clock = Annotated[str, typer.Option(help="wall, or cpu: this process's own time, for a busy machine (one thread).")]
Seed = Annotated[int, typer.Option(help="Of the random tensors.")]
Json = Annotated[str | None, typer.Option("--json", help="File for the result; - for stdout.")]
