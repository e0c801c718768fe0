"""Work folders of calibrations: what was measured is kept, for one model and one set of values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infer_patch.artifacts import fingerprint
from infer_patch.errors import PatchError
from infer_patch.files import replace_file


def claim(folder: Path, model: Any, values: Mapping[str, Any]) -> None:
    """Make the folder that of this model and these values (plain, as JSON holds them), or find that it is already.

    Raises
    ------
    PatchError
        For a folder of another model, precision or value, naming what differs.
    """
    mine = json.loads(json.dumps({**values, "dtype": str(model.dtype), "model": fingerprint(model)}))
    file = folder / "made_for.json"
    if file.exists():
        theirs = json.loads(file.read_text(encoding="utf-8"))
        other = sorted(key for key in mine if theirs.get(key) != mine[key])
        if other:
            raise PatchError(
                f"{folder} holds what was measured with other values of {', '.join(other)}. Name another work folder, "
                "or remove this one."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(file, json.dumps(mine, indent=1).encode())
