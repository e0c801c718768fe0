"""Files that are there as a whole or not at all, and JSON files, the user's own or shipped with the package."""

from __future__ import annotations

import json
import os
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

from infer_patch.errors import PatchError


def replace_file(path: Path, data: bytes) -> None:
    """Write a file: the data goes to a temporary file beside it, which then takes its name."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: str | Path, kind: str, error: type[PatchError], remedy: str, method: str = "") -> Any:
    """What a JSON file holds; a bare name that is no file here is looked for in `infer_patch/configs`.

    Raises
    ------
    error
        For a file that is absent or no JSON: "METHOD: cannot read the KIND PATH: why. REMEDY".
    """
    prefix = f"{method}: " if method else ""
    source: Any = Path(path)
    if not source.is_file() and source.name == str(path):
        shipped = resources.files("infer_patch").joinpath("configs", source.name)
        source = shipped if shipped.is_file() else source
    try:
        return json.loads(source.read_text(encoding="utf-8"))
    except OSError as problem:
        why = problem.strerror or problem
        raise error(f"{prefix}cannot read the {kind} {path}: {why}. {remedy}".rstrip()) from problem
    except ValueError as problem:  # not JSON, or not UTF-8
        raise error(f"{prefix}the {kind} {path} is not valid JSON ({problem}). {remedy}".rstrip()) from problem
