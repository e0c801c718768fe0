"""`infer-patch compare`: unpatched against plans on any model, in one process."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from infer_patch.cli.common import Device, Dtype, LanguageModel

if TYPE_CHECKING:
    from infer_patch.evals.compare import Comparison
    from infer_patch.evals.prompts import Prompt

DEFAULT_TOKENS = 3000  # of the prompt that is generated when none is given


def compare(
    model: LanguageModel,
    plan: Annotated[list[str], typer.Option(help="A preset or a .yaml file; give it again for more plans.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given again.")] = None,
    prompt_file: Annotated[list[Path] | None, typer.Option(help="A text file with one prompt; again for more.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture before each prompt; again for more.")] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="Apply the chat template (if any).")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Greedy tokens per prompt.")] = 32,
    rounds: Annotated[int, typer.Option(help="Timed rounds, after one that warms up.")] = 3,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[Path | None, typer.Option(help="Result folder; if not given, infer-patch-MODEL-TIME.")] = None,
    seed: Annotated[int, typer.Option(help="Of torch and of a generated prompt.")] = 0,
    attention: Annotated[
        str | None, typer.Option(help="LAYER:HEAD, like 12:3: draw its attention before and after each plan.")
    ] = None,
) -> None:
    """Run a model unpatched and with each plan on the same prompts: outputs, drift, cost, proof of effect, verdict.

    Without a prompt, one of about 3,000 tokens with a fact hidden in it is generated. Exit code 1 when a method of a
    plan never took effect, 2 when the run could not be made.
    """
    console = Console(stderr=True)
    with console.status("Loading PyTorch and transformers") as status:
        from infer_patch.evals.compare import Settings
        from infer_patch.evals.compare import compare as run
        from infer_patch.evals.loading import load, open_images
        from infer_patch.evals.results import ResultFolder
        from infer_patch.plan import Plan

        plans = [Plan.of(p) for p in plan]
        images = open_images(image or [])
        texts = [*(prompt or []), *map(read_prompt, prompt_file or [])]
        chosen = None if attention is None else parse_head(attention)
        settings = Settings(max_new_tokens=max_new_tokens, rounds=rounds, seed=seed, attention=chosen)
        out = out or default_folder(model)
        ResultFolder(out).check()
        with quiet():
            loaded, processor = load(model, device, dtype, status.update)
            prompts = _prompts(texts, images, processor, loaded, chat, max_new_tokens, seed)
    with progress_bar(console) as on_progress, quiet():
        comparison = run(
            loaded,
            processor,
            plans,
            prompts,
            settings,
            chat=chat,
            out=out,
            model_id=model,
            command=command_line(),
            on_progress=on_progress,
        )
    show(comparison, Console())
    if comparison.failed:
        raise typer.Exit(1)


def parse_head(text: str) -> tuple[int, int]:
    """("12:3") -> (12, 3)."""
    layer, colon, head = text.partition(":")
    if not (colon and layer.isdecimal() and head.isdecimal()):
        raise typer.BadParameter(f"--attention takes LAYER:HEAD, like 12:3; got {text!r}")
    return int(layer), int(head)


def show(comparison: Comparison, console: Console, with_outputs: bool = True) -> None:
    """Print outputs, table, verdicts, and where the page is."""
    from infer_patch.report import tables

    names = list(dict.fromkeys(sample["prompt"] for sample in comparison.samples))
    for name in names[:3] if with_outputs else ():
        console.print(tables.outputs([s for s in comparison.samples if s["prompt"] == name]))
    console.print(tables.comparison_table(comparison.summary, console.width))
    console.print(tables.verdicts(comparison.summary))
    show_places(comparison.page, comparison.folder, console)


def show_places(page: Path | None, folder: Path | None, console: Console) -> None:
    """Where the page and its folder are, in lines that can be copied whole."""
    places = {"Page": None if page is None else page.resolve().as_uri(), "Folder": folder}
    console.print()
    for name, place in places.items():
        if place is not None:
            console.print(f"{name:<8}{place}", soft_wrap=True, highlight=False, markup=False)


@contextmanager
def progress_bar(console: Console) -> Iterator[Any]:
    """A progress bar with an estimate, as the callback that `compare` takes; plain lines where no terminal is."""
    if not console.is_terminal:
        yield lambda done, total, what: console.print(f"{done} of {total} runs done; next: {what}", highlight=False)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=None)

        def on_progress(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, description=what)

        yield on_progress


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and notices of transformers, which would break up ours; errors still show."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def command_line() -> str:
    """The command as it was given, without the folder of the program."""
    return shlex.join(["infer-patch", *sys.argv[1:]])


def default_folder(model: str) -> Path:
    name = Path(model).name or "model"
    return Path(f"infer-patch-{name}-{time.strftime('%Y%m%d-%H%M%S')}")


def _prompts(
    texts: list[str], images: tuple[Any, ...], processor: Any, model: Any, chat: bool | None, room: int, seed: int
) -> list[Prompt]:
    """The prompts that were given, or one that is made up."""
    from infer_patch.evals.haystack import needle_prompt
    from infer_patch.evals.prompts import Prompt

    if images and not texts:
        texts = ["Describe the image." if len(images) == 1 else "Describe the images."]
    if texts:
        return [Prompt(text, images=images) for text in texts]
    tokenizer = getattr(processor, "tokenizer", processor)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or DEFAULT_TOKENS
    with_template = bool(getattr(tokenizer, "chat_template", None)) and chat is not False
    needle = needle_prompt(
        tokenizer, min(DEFAULT_TOKENS, limit - room), 0.5, seed=seed, chat=with_template, answer_prefix=True
    )
    return [Prompt(needle.text, "generated needle", answer=needle.answer, input_ids=tuple(needle.input_ids))]


def read_prompt(path: Path) -> str:
    from infer_patch.errors import PatchError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PatchError(f"cannot read the prompt file {path}: {error}") from error
