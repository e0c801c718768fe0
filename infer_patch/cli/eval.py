"""`infer-patch eval`: a benchmark answered unpatched and with plans, on the same batches, with paired statistics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infer_patch.cli.common import Device, Dtype
from infer_patch.cli.compare import read_prompt
from infer_patch.cli.eval_run import run

if TYPE_CHECKING:
    from infer_patch.evals.task import Task

Model = Annotated[str, typer.Argument(help="A hub id, a folder, `demo` or `demo-vlm` (the demo models).")]
Plans = Annotated[list[str], typer.Option("--plan", help="A preset or a .yaml file; give it again for more plans.")]
BatchSize = Annotated[int, typer.Option(help="Prompts per batch; the same batches for every run.", min=1)]
Control = Annotated[int, typer.Option(help="Batches that unpatched answers twice, as the floor.", min=0)]
Out = Annotated[Path | None, typer.Option(help="Result folder; the same one again goes on with an unfinished run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a result of other settings in the folder.")]
Seed = Annotated[int, typer.Option(help="Draws the items.")]
QuestionLast = Annotated[
    bool | None,
    typer.Option(
        "--question-last/--question-in-prefill",
        help="Feed the question after the context is in the cache; default: where a plan changes the cache.",
    ),
]
RandomBaseline = Annotated[
    bool, typer.Option("--random-baseline", help="Beside every pruning plan, one that prunes at random.")
]
TextFolder = Annotated[Path | None, typer.Option("--text", help="Folder of .txt files as the haystack.")]

evaluations = typer.Typer(
    help="Run a benchmark unpatched and with each plan: quality with paired statistics, cost, verdict.",
    no_args_is_help=True,
)


@evaluations.command()
def pope(
    model: Model,
    plan: Plans,
    questions: Annotated[
        list[Path] | None, typer.Option(help="An official question file (JSON lines); again for each split.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures that the files name.")] = None,
    hub: Annotated[str | None, typer.Option(help="A data set of the hub instead, such as lmms-lab/POPE.")] = None,
    scenes: Annotated[int, typer.Option(help="Without files: pictures of the built-in set, 18 questions each.")] = 50,
    limit_images: Annotated[int | None, typer.Option(help="Only that many pictures, with all their questions.")] = None,
    random_baseline: RandomBaseline = False,
    batch_size: BatchSize = 8,
    question_last: QuestionLast = None,
    control_batches: Control = 4,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Out = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
) -> None:
    """Object presence in pictures (POPE): yes or no, three splits. Without files, generated scenes of shapes."""

    def make() -> Task:
        from infer_patch.errors import PatchError
        from infer_patch.evals.pope import Pope, PopeHub
        from infer_patch.evals.pope_scenes import PopeScenes

        if questions and hub:
            raise PatchError("--questions and --hub name two sources; give one.")
        if bool(questions) != bool(images):
            raise PatchError("question files need --images, the folder of their pictures, and the other way round.")
        if questions and images:
            return Pope(files=tuple(questions), images=images, limit_images=limit_images, seed=seed)
        if hub:
            return PopeHub(dataset=hub, limit_images=limit_images, seed=seed)
        return PopeScenes(scenes=limit_images or scenes, seed=seed)

    run(
        model,
        plan,
        make,
        batch_size,
        control_batches,
        device,
        dtype,
        out,
        overwrite,
        seed,
        random_baseline,
        question_last=question_last,
    )


@evaluations.command()
def needle(
    model: Model,
    plan: Plans,
    length: Annotated[
        list[int] | None, typer.Option(help="Tokens of a prompt; again for more. [1000, 2000, 3000]")
    ] = None,
    depth: Annotated[list[float] | None, typer.Option(help="Share of text before the needle; again for more.")] = None,
    repeats: Annotated[int, typer.Option(help="Prompts per cell, each with its own text and number.", min=1)] = 1,
    text: TextFolder = None,
    batch_size: BatchSize = 1,
    question_last: QuestionLast = None,
    control_batches: Control = 2,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Out = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
) -> None:
    """A number hidden in a long text, over a grid of depths and lengths; heat maps per plan and of the difference."""

    def make() -> Task:
        from infer_patch.evals.needle import NeedleGrid

        given: dict[str, Any] = {}
        if length:
            given["lengths"] = tuple(length)
        if depth:
            given["depths"] = tuple(depth)
        return NeedleGrid(repeats=repeats, text_folder=text, seed=seed, **given)

    run(
        model, plan, make, batch_size, control_batches, device, dtype, out, overwrite, seed, question_last=question_last
    )


@evaluations.command("mm-needle")
def mm_needle(
    model: Model,
    plan: Plans,
    images: Annotated[list[int] | None, typer.Option(help="Images per prompt; again for more. [1, 2]")] = None,
    grid: Annotated[list[int] | None, typer.Option(help="Cells a side: 1, 2 or 4; again for more. [1, 2, 4]")] = None,
    samples: Annotated[int, typer.Option(help="Items per number of images and grid.", min=2)] = 40,
    wording: Annotated[
        str | None, typer.Option(help="general, or demo: the sentences that demo-vlm knows (its default).")
    ] = None,
    random_baseline: RandomBaseline = False,
    batch_size: BatchSize = 4,
    question_last: QuestionLast = None,
    control_batches: Control = 4,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Out = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
) -> None:
    """Which image, and which cell of it, shows an object, or none (after MMNeedle): drawn scenes, nothing to load."""

    def make() -> Task:
        from infer_patch.evals.mm_needle import MMNeedle

        given: dict[str, Any] = {"wording": wording or ("demo" if model == "demo-vlm" else "general")}
        if images:
            given["images"] = tuple(images)
        if grid:
            given["grids"] = tuple(grid)
        return MMNeedle(samples=samples, seed=seed, **given)

    run(
        model,
        plan,
        make,
        batch_size,
        control_batches,
        device,
        dtype,
        out,
        overwrite,
        seed,
        random_baseline,
        question_last=question_last,
    )


@evaluations.command()
def ruler(
    model: Model,
    plan: Plans,
    task: Annotated[list[str] | None, typer.Option(help="A RULER task, such as niah_multikey_1; default all.")] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="Tokens, those to be generated included; again for more.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Prompts per task and length.", min=1)] = 10,
    text: TextFolder = None,
    batch_size: BatchSize = 1,
    question_last: QuestionLast = None,
    control_batches: Control = 2,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Out = None,
    overwrite: Overwrite = False,
    seed: Seed = 42,
) -> None:
    """RULER without its question answering, generated offline: needles, variable tracking, word counts."""

    def make() -> Task:
        from infer_patch.evals.ruler import Ruler

        given: dict[str, Any] = {}
        if task:
            given["tasks"] = tuple(task)
        if length:
            given["lengths"] = tuple(length)
        return Ruler(samples=samples, text_folder=text, seed=seed, **given)

    run(
        model, plan, make, batch_size, control_batches, device, dtype, out, overwrite, seed, question_last=question_last
    )


@evaluations.command()
def ppl(
    model: Model,
    plan: Plans,
    tokens: Annotated[int, typer.Option(help="Tokens per window.")] = 3072,
    windows: Annotated[int, typer.Option(help="Consecutive windows of the text.")] = 4,
    prefill: Annotated[int, typer.Option(help="Tokens read at once, not scored; 0: one pass, no cache.")] = 2944,
    chunk: Annotated[int, typer.Option(help="Tokens per step after the prefill; 1 is what decoding does.")] = 1,
    text: TextFolder = None,
    control_batches: Control = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Out = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
) -> None:
    """Perplexity of windows of text: the first part prefilled, the rest scored through the cache."""

    def make() -> Task:
        from infer_patch.evals.perplexity import Perplexity

        return Perplexity(tokens=tokens, windows=windows, prefill=prefill, chunk=chunk, text_folder=text, seed=seed)

    run(model, plan, make, 1, control_batches, device, dtype, out, overwrite, seed)


@evaluations.command()
def drift(
    model: Model,
    plan: Plans,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt of yours; again for more.")] = None,
    prompt_file: Annotated[list[Path] | None, typer.Option(help="A text file with one prompt; again for more.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture before each prompt; again for more.")] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="Tokens of generated prompts; again for more. [1000, 3000]")
    ] = None,
    samples: Annotated[int, typer.Option(help="Generated prompts per kind and length.", min=1)] = 4,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of the unpatched output to compare.", min=1)] = 32,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="Chat template for prompts of yours.")] = None,
    text: TextFolder = None,
    control_batches: Control = 2,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Out = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
) -> None:
    """How far a plan moves the model: KL per token, top-1 agreement, first differing token, answers that flip."""

    def make() -> Task:
        from infer_patch.evals.drift_task import Drift

        texts = (*(prompt or ()), *(read_prompt(file) for file in prompt_file or ()))
        given: dict[str, Any] = {"lengths": tuple(length)} if length else {}
        return Drift(
            texts=texts,
            images=tuple(image or ()),
            samples=samples,
            max_new_tokens=max_new_tokens,
            chat=chat,
            text_folder=text,
            seed=seed,
            **given,
        )

    run(model, plan, make, 1, control_batches, device, dtype, out, overwrite, seed)
