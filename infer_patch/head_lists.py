"""Lists of attention heads in files: which heads of which layers a method acts on.

Two layouts are read, both JSON: an object with `heads`, from layer numbers to lists of heads, as `infer-patch
calibrate` writes it; and the plain list of lists that ACT's authors published, whose first row is layer 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infer_patch.errors import PlanError
from infer_patch.files import read_json

FIRST_PUBLISHED_LAYER = 2


@dataclass(frozen=True)
class HeadList:
    """Query heads by layer, ascending; and what else the file says of them (`facts`)."""

    heads: dict[int, tuple[int, ...]]
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]]) -> HeadList:
        """From (layer, head) pairs."""
        heads: dict[int, set[int]] = {}
        for layer, head in pairs:
            heads.setdefault(layer, set()).add(head)
        return cls({layer: tuple(sorted(heads[layer])) for layer in sorted(heads)})

    def check(self, method: str, layers: int, heads: int, source: str) -> None:
        """Raise `PlanError` unless every head is one of a model of this shape."""
        strange = [(i, h) for i, row in self.heads.items() for h in row if i >= layers or h >= heads]
        if strange:
            raise PlanError(
                f"{method}: {source} names head {strange[0][1]} of layer {strange[0][0]}; this model has {layers} "
                f"layers of {heads} heads, counted from 0. Take a list that was made for this model."
            )


def read_heads(path: str | Path, method: str, remedy: str) -> HeadList:
    """Read a list of heads; a bare name that is no file here is looked for in `infer_patch/configs`.

    Raises
    ------
    PlanError
        Naming the file, what it holds and what was expected.
    """
    values = read_json(path, "head list", PlanError, remedy, method)
    facts: dict[str, Any] = {}
    rows: Any = None
    if isinstance(values, dict):
        facts = {key: value for key, value in values.items() if key != "heads"}
        rows = values.get("heads")
    elif isinstance(values, list):
        rows = {str(i + FIRST_PUBLISHED_LAYER): row for i, row in enumerate(values)}
    if not isinstance(rows, Mapping) or not all(_is_row(layer, row) for layer, row in rows.items()):
        raise PlanError(
            f"{method}: the head list {path} should be an object with `heads`, lists of head numbers by layer, or the "
            f"published list of lists, got {_short(rows if rows is not None else values)}. {remedy}"
        )
    return HeadList(HeadList.of((int(layer), head) for layer, row in rows.items() for head in row).heads, facts)


def _is_row(layer: str, row: Any) -> bool:
    return layer.isdigit() and isinstance(row, list) and all(is_number(head) for head in row)


def is_number(value: Any) -> bool:
    """Whether a value can number a layer, a head or a dimension."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
