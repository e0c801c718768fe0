"""`infer-patch report sinks`: which tokens are attention sinks, per layer and head, with pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from infer_patch.cli.common import Device, Dtype
from infer_patch.cli.compare import quiet, read_prompt, show_places

TOKENS = 600  # of the prompt that is generated when none is given


def sinks(
    model: Annotated[str, typer.Argument(help="A hub id, a folder, `demo`, or `demo-vlm` for pictures.")],
    prompt: Annotated[str | None, typer.Option(help="The prompt; a generated text if none is given.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A text file with the prompt.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture before the prompt; again for more.")] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="Apply the chat template (if any).")] = None,
    threshold: Annotated[float, typer.Option(help="A sink receives more than this share of attention.")] = 0.1,
    layer: Annotated[int | None, typer.Option(help="Pictures of this layer, instead of the mean over all.")] = None,
    head: Annotated[int | None, typer.Option(help="Pictures of this head, instead of the mean over all.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[Path, typer.Option(help="The page; its numbers go into a .json file beside it.")] = Path(
        "sinks.html"
    ),
) -> None:
    """Which tokens of a prompt are attention sinks, per layer and head: a map over the text, and over its pictures."""
    from infer_patch.availability import require
    from infer_patch.errors import PatchError

    console = Console(stderr=True)
    if out.is_dir() or out.suffix != ".html" or not out.absolute().parent.is_dir():
        raise PatchError(f"--out must be a .html file in a folder that exists, got {out}.")
    if prompt is not None and prompt_file is not None:
        raise PatchError("give either --prompt or --prompt-file.")
    for package in ("jinja2", "matplotlib"):
        require(package, "The HTML page")
    with console.status("Loading PyTorch and transformers") as status:
        from infer_patch.evals.compare import model_facts
        from infer_patch.evals.haystack import build_haystack
        from infer_patch.evals.kept_tokens import as_seen
        from infer_patch.evals.loading import load, open_images
        from infer_patch.evals.prompts import Prompt, encode
        from infer_patch.evals.results import write_text
        from infer_patch.evals.sinks import find_sinks
        from infer_patch.families import describe
        from infer_patch.report import sinks_page
        from infer_patch.visual_grid import picture_grids

        images = open_images(image or [])
        with quiet():
            loaded, processor = load(model, device, dtype, status.update)
        tokenizer = getattr(processor, "tokenizer", processor)
        text = read_prompt(prompt_file) if prompt_file is not None else prompt
        if text is None:
            text = "Describe the image." if images else build_haystack(tokenizer, TOKENS)
        parts = describe(loaded)
        for name, number, count in (("layer", layer, parts.num_layers), ("head", head, parts.num_heads)):
            if number is not None and not 0 <= number < count:
                raise PatchError(f"--{name} must be 0 to {count - 1} for this model, got {number}.")
        status.update("Reading the prompt")
        inputs = encode(Prompt(text, images=images), processor, loaded, chat)
        found = find_sinks(loaded, inputs, threshold)
        pieces = [str(tokenizer.decode([token])) for token in found.input_ids.tolist()]
        seen, grids = as_seen(inputs, images, processor) if images else [], picture_grids(inputs, loaded.config)
        if len(grids) != len(seen):
            grids = [None] * len(seen)
        name = Path(model).name or "model"
        page = sinks_page.render(found, pieces, list(zip(seen, grids)), f"Attention sinks of {name}", layer, head)
        numbers = sinks_page.document(found, pieces, dict(model_facts(loaded, model)))
        write_text(out, page)
        write_text(out.with_suffix(".json"), json.dumps(numbers) + "\n")
    per_token = found.heads_per_token()
    heads, layers = found.received.shape[1], found.received.shape[0]
    shown = Console()
    shown.print(
        f"{int(found.is_sink.any(-1).sum())} of {layers * heads} heads have a sink above {threshold}; "
        f"{int((per_token > 0).sum())} of {len(pieces)} tokens are one in some head.",
        highlight=False,
    )
    for i in per_token.argsort(descending=True, stable=True)[:5].tolist():
        if count := int(per_token[i]):
            words = f"{count} head" + "s" * (count > 1)
            shown.print(f"  token {i} {pieces[i]!r}: {words}", highlight=False, markup=False)
    show_places(out, None, shown)
