"""What the commands of `calibrate` share: options, checks before minutes are spent, JSON that can be read by rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

WorkFolder = Annotated[
    Path | None, typer.Option(help="Folder for what is measured; the same one again goes on. [OUT without .json]")
]


def check_out(out: Path, *endings: str) -> None:
    """Refuse a result file without one of these endings (the first is named), or in a folder that is not there."""
    from infer_patch.errors import PatchError

    if out.suffix not in endings or not out.absolute().parent.is_dir():
        raise PatchError(f"--out must be a {endings[0]} file in a folder that exists, got {out}.")


def work_folder(work: Path | None, out: Path, holds: str = "what is measured") -> Path:
    """The folder for what is measured: `work`, or `out` without its ending."""
    from infer_patch.errors import PatchError

    folder = work or out.with_suffix("")
    if folder.exists() and not folder.is_dir():
        raise PatchError(f"{folder} is a file; name a folder for {holds} with --work.")
    return folder


def dumps(document: dict[str, Any], *by_row: str) -> str:
    """JSON, indented by 1; of the entries named, lists or dictionaries, each row takes a line of its own."""
    text = json.dumps({name: f"@{name}" if name in by_row else value for name, value in document.items()}, indent=1)
    for name in by_row:
        rows = document[name]
        if isinstance(rows, dict):
            (start, end), lines = "{}", [f"{json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items()]
        else:
            (start, end), lines = "[]", [json.dumps(row) for row in rows]
        text = text.replace(f'"@{name}"', f"{start}\n  " + ",\n  ".join(lines) + f"\n {end}")
    return text + "\n"
