"""What several commands share: options, lists of numbers, result files, the command that repeats a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

LanguageModel = Annotated[str, typer.Argument(help="A hub id, a folder, or `demo` for the demo language model.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: float32 on CPU.")]


def numbers(text: str, example: str) -> tuple[int, ...]:
    """Numbers with commas between."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"numbers with commas between, like {example}; got {text!r}") from error


def check_writable(*files: str | None) -> None:
    """Before minutes are spent on a result that cannot be kept."""
    from infer_patch.errors import PatchError

    for out in files:
        if out not in (None, "-") and not Path(out).absolute().parent.is_dir():
            raise PatchError(f"cannot write {out}: its folder does not exist.")


def save(document: dict[str, Any], out: str | None) -> None:
    """Write a result as JSON to a file, or to stdout for -."""
    if out == "-":
        typer.echo(json.dumps(document))
    elif out is not None:
        Path(out).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def repeat_command(name: str, **options: Any) -> str:
    """The command that repeats a run, without this machine's folders: None is left out, a list is repeated."""
    words = [f"infer-patch bench {name}"]
    for option, value in options.items():
        flag = f"--{option.replace('_', '-')}"
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if each is True:
                words.append(flag)
            elif each is not None and each is not False:
                words.append(f"{flag} {without_folder(each)}")
    return " ".join(words)


def without_folder(value: Any) -> Any:
    """The bare name, if this is a path to something that exists."""
    return Path(value).name if isinstance(value, str) and Path(value).exists() else value
