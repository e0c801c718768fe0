"""The run behind every `infer-patch eval` command: load, evaluate, show."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from infer_patch.cli.compare import command_line, progress_bar, quiet, show_places

if TYPE_CHECKING:
    from infer_patch.evals.evaluate import Evaluation
    from infer_patch.evals.task import Task


def run(
    model: str,
    plan: list[str],
    make: Callable[[], Task],
    batch_size: int,
    control_batches: int,
    device: str,
    dtype: str,
    out: Path | None,
    overwrite: bool,
    seed: int,
    random_baseline: bool = False,
    question_last: bool | None = None,
) -> None:
    """Load, evaluate, show. Exit code 1 when a method of a plan never took effect, 2 when the run could not be made."""
    from infer_patch.evals.shards import Shard

    console = Console(stderr=True, quiet=not Shard.from_environment().first)
    with console.status("Loading PyTorch and transformers") as status:
        from infer_patch.evals.evaluate import evaluate
        from infer_patch.evals.loading import load
        from infer_patch.plan import Plan

        task, plans = make(), [Plan.of(p) for p in plan]
        name = Path(model).name or "model"
        out = out or Path(f"infer-patch-{task.name}-{name}-{time.strftime('%Y%m%d-%H%M%S')}")
        with quiet():
            loaded, processor = load(model, device, dtype, status.update)
    try:
        with progress_bar(console) as on_progress, quiet():
            found = evaluate(
                loaded,
                processor,
                task,
                plans,
                batch_size=batch_size,
                control_batches=control_batches,
                random_baseline=random_baseline,
                question_last=question_last,
                seed=seed,
                out=out,
                overwrite=overwrite,
                model_id=model,
                command=command_line(),
                on_progress=on_progress,
            )
    except KeyboardInterrupt:
        console.print(f"Stopped. The same command with --out {out} goes on from here.", highlight=False, markup=False)
        raise typer.Exit(130) from None
    if found.summary is None:  # another process shows the result
        return
    show(found, Console())
    if found.failed:
        raise typer.Exit(1)


def show(found: Evaluation, console: Console) -> None:
    """Print table, verdicts, and where the page is."""
    from infer_patch.report import eval_tables

    if found.summary is None:
        return
    console.print(eval_tables.eval_table(found.summary, console.width))
    console.print(eval_tables.eval_verdicts(found.summary))
    show_places(found.page, found.folder, console)
