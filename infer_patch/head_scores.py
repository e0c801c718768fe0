"""A number for every attention head, measured in many tests: files that calibrations write and methods read.

The published layout is one JSON object, `{"layer-head": [score per test, ...]}`. Ours holds the same under `scores`,
with the mean matrix and where it came from beside it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer_patch.errors import ArtifactError
from infer_patch.files import read_json

VERSION = 1
Head = tuple[int, int]  # layer, query head


def parse_head(name: Any) -> Head | None:
    """("16-19") -> (16, 19); None for anything else."""
    found = re.fullmatch(r"(\d+)-(\d+)", name) if isinstance(name, str) else None
    return None if found is None else (int(found[1]), int(found[2]))


@dataclass(frozen=True)
class HeadScores:
    """Scores of each head, one per test it was measured in, keyed by (layer, query head)."""

    scores: dict[Head, tuple[float, ...]]

    @property
    def layers(self) -> int:
        return 1 + max(layer for layer, _ in self.scores)

    @property
    def heads(self) -> int:
        return 1 + max(head for _, head in self.scores)

    @property
    def tests(self) -> int:
        return max(len(values) for values in self.scores.values())

    def mean(self, head: Head) -> float:
        values = self.scores.get(head, ())
        return sum(values) / len(values) if values else 0.0

    def matrix(self) -> list[list[float]]:
        """Mean scores, a row per layer."""
        return [[self.mean((layer, head)) for head in range(self.heads)] for layer in range(self.layers)]

    def ranked(self) -> list[Head]:
        """All heads, the highest mean first; equal ones by layer and head."""
        every = [(layer, head) for layer in range(self.layers) for head in range(self.heads)]
        return sorted(every, key=lambda head: (-self.mean(head), head))

    def to_dict(self) -> dict[str, Any]:
        """The published layout under `scores`, and the mean matrix."""
        scores = {f"{layer}-{head}": _short(values) for (layer, head), values in sorted(self.scores.items())}
        return {"version": VERSION, "scores": scores, "mean": [_short(row) for row in self.matrix()]}

    @classmethod
    def from_dict(cls, values: Any, source: str, remedy: str = "") -> HeadScores:
        """Read either layout; raises `ArtifactError` naming what is wrong."""

        def wrong(problem: str) -> ArtifactError:
            return ArtifactError(f"{source}: {problem}. {remedy}".rstrip())

        if isinstance(values, dict) and "scores" in values:
            if values.get("version") != VERSION:
                raise wrong(f"it has version {values.get('version')!r}, this release reads version {VERSION}")
            values = values["scores"]
        if not isinstance(values, dict) or not values:
            raise wrong('expected an object like {"16-19": [0.9, 0.8]}, keyed by layer-head')
        scores: dict[Head, tuple[float, ...]] = {}
        for name, row in values.items():
            head = parse_head(name)
            if head is None:
                raise wrong(f"heads are named layer-head, like 16-19; got {name!r}")
            if not isinstance(row, list) or not all(_is_number(x) for x in row):
                raise wrong(f"head {name} must hold a list of finite numbers, got {str(row)[:60]}")
            scores[head] = tuple(float(x) for x in row)
        if not any(scores.values()):
            raise wrong("it holds no test")
        return cls(scores)

    @classmethod
    def read(cls, path: str | Path, remedy: str = "") -> HeadScores:
        """Read a file; a bare name that is no file here is looked for in `infer_patch/configs`."""
        return cls.from_dict(read_json(path, "score file", ArtifactError, remedy), str(path), remedy)


def _short(values: Any) -> list[float]:
    return [round(x, 5) + 0.0 for x in values]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
