"""`infer-patch bench`: time, and the attention that is kept, measured. Never a test; results live in `benchmarks/`."""

from __future__ import annotations

import typer

from infer_patch.cli.bench.decode import decode
from infer_patch.cli.bench.overhead import overhead
from infer_patch.cli.bench.prefill import prefill
from infer_patch.cli.bench.recall import recall

bench = typer.Typer(
    help="Measure time, and the attention that sparse methods keep, on this machine.", no_args_is_help=True
)
bench.command("prefill")(prefill)
bench.command("decode")(decode)
bench.command("recall")(recall)
bench.command("overhead")(overhead)
