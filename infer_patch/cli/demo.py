"""`infer-patch demo`: find a needle in 3,000 tokens with a small language model, unpatched and with three plans."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from infer_patch.cli.compare import command_line, progress_bar, quiet, show

if TYPE_CHECKING:
    from infer_patch.evals.prompts import Prompt
    from infer_patch.plan import Plan

TOKENS = 3000
MAX_NEW_TOKENS = 10  # the prompt ends with the start of the answer, so the number is all that is missing
DEPTHS = (0.1, 0.7)  # beyond the last one, a window could see the needle
ALL = "envelope-all"


def demo(
    out: Annotated[Path, typer.Option(help="Result folder.")] = Path("infer-patch-demo"),
    needles: Annotated[int, typer.Option(help="Prompts, each with its own text, number and depth.", min=1)] = 4,
) -> None:
    """SmolLM2-135M looks for a number in 3,000 tokens of generated text: unpatched against three plans.

    Takes a few minutes on two cores; needs no network beyond the installation.
    """
    console = Console(stderr=True)
    with console.status("Loading PyTorch and transformers") as status:
        from infer_patch.evals.compare import Settings, compare
        from infer_patch.evals.loading import load
        from infer_patch.evals.results import ResultFolder

        ResultFolder(out).check()
        with quiet():
            model, tokenizer = load("demo", "cpu", "float32", status.update)
            prompts = needle_prompts(tokenizer, needles)
            status.update("Warming up")
            model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=2, do_sample=False)
    with progress_bar(console) as on_progress, quiet():
        comparison = compare(
            model,
            tokenizer,
            demo_plans(),
            prompts,
            Settings(MAX_NEW_TOKENS, rounds=1, warm_up=False, drift_prompts=1, may_stay_dense=(ALL,)),
            out=out,
            model_id="SmolLM2-135M-Instruct",
            title=f"{len(prompts)} needles in {TOKENS:,} tokens each",
            command=command_line(),
            kind="demo",
            on_progress=on_progress,
        )
    show(comparison, Console(), with_outputs=False)
    if comparison.failed:
        raise typer.Exit(1)


def demo_plans() -> list[Plan]:
    """A quarter of the tokens chosen by their keys; a quarter of them by their place; and all of them."""
    from infer_patch.patches import Envelope, SinkWindow
    from infer_patch.plan import Plan

    return [
        Plan((Envelope(budget=768),), "envelope-quarter"),
        Plan((SinkWindow(window=704, evict=True),), "window-quarter"),
        Plan((Envelope(budget=4096),), ALL),
    ]


def needle_prompts(tokenizer: Any, count: int) -> list[Prompt]:
    """Needles at depths spread over the text."""
    from infer_patch.evals.haystack import needle_prompt
    from infer_patch.evals.prompts import Prompt

    first, last = DEPTHS
    prompts = []
    for seed in range(count):
        depth = (first + last) / 2 if count == 1 else first + (last - first) * seed / (count - 1)
        needle = needle_prompt(tokenizer, TOKENS, depth, seed=seed, answer_prefix=True)
        name = f"needle {seed + 1}, at {needle.depth:.0%}"
        prompts.append(Prompt(needle.text, name, answer=needle.answer, input_ids=tuple(needle.input_ids)))
    return prompts
