"""The result folder of an evaluation: rows as they come, so that a run can go on, and a summary at the end.

Every process appends to a file of its own, `rows-<rank>.jsonl`; the first process joins them into `samples.jsonl`, in
the order of the items, and deletes them.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infer_patch.errors import PatchError
from infer_patch.evals.eval_schema import EvalSample, EvalSummary
from infer_patch.evals.results import ResultFolder, file_name, write_json, write_text
from infer_patch.evals.schema import Manifest
from infer_patch.evals.shards import Shard
from infer_patch.plan import Plan

_SAME = ("schema", "kind", "seed", "settings", "plans")  # what must be equal for a run to go on
_SAME_MODEL = ("id", "type", "dtype", "device", "attention", "layers", "parameters")


class EvalFolder:
    """Keeps rows in memory, and in a folder if there is one."""

    def __init__(self, path: str | Path | None, shard: Shard):
        if path is None and shard.count > 1:
            raise PatchError("several processes need a result folder to share; give one.")
        self.path = None if path is None else Path(path)
        self.samples: list[EvalSample] = []
        self._shard, self._began, self._before = shard, time.monotonic(), 0.0
        self._manifest: Manifest | None = None

    @property
    def _rows(self) -> Path:
        return (self.path or Path()) / f"rows-{self._shard.rank}.jsonl"

    def _end_line(self) -> None:
        """So that new rows do not join a line that was cut off half-way."""
        if self._rows.is_file() and not self._rows.read_bytes().endswith(b"\n"):
            with self._rows.open("a", encoding="utf-8") as file:
                file.write("\n")

    @property
    def done(self) -> set[tuple[str, int]]:
        """(run, batch) that rows exist of."""
        return {(row["plan"], row["batch"]) for row in self.samples}

    def open(self, manifest: Manifest, plans: Sequence[Plan], overwrite: bool) -> None:
        """Start, or go on with what is there.

        Raises
        ------
        PatchError
            When the folder holds a result of other settings (unless `overwrite`), or something else altogether.
        """
        self._manifest = manifest
        if self.path is None:
            return
        ResultFolder(self.path).check()
        if self.path.is_dir() and (self.path / "manifest.json").is_file():
            old = json.loads((self.path / "manifest.json").read_text("utf-8"))
            if difference := _difference(old, manifest):
                if not overwrite:
                    raise PatchError(
                        f"{self.path} holds a run that differs in {difference}; give another folder, or --overwrite."
                    )
                if self._shard.first:
                    shutil.rmtree(self.path)
            else:
                manifest["started"], self._before = old["started"], old.get("seconds") or 0.0
                self._end_line()
                self.samples = self._read()
        if not self._shard.first:
            self.path.mkdir(parents=True, exist_ok=True)
            return
        (self.path / "plans").mkdir(parents=True, exist_ok=True)
        write_json(self.path / "manifest.json", manifest)
        for plan in plans:
            plan.save(self.path / "plans" / f"{file_name(plan.name)}.yaml")

    def add(self, rows: Sequence[EvalSample]) -> None:
        """Keep the rows of one batch under one plan: all of them or none."""
        self.samples += rows
        if self.path is not None:
            with self._rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(list(rows), ensure_ascii=False) + "\n")

    def merged(self, plans: Sequence[str], items: Sequence[str]) -> list[EvalSample]:
        """Rows of all processes, by plan, then in the order of the items."""
        rows = self._read() if self.path is not None else self.samples
        order, place = {name: i for i, name in enumerate(plans)}, {name: i for i, name in enumerate(items)}
        return sorted(rows, key=lambda row: (order[row["plan"]], place[row["item"]]))

    def finish(self, summary: EvalSummary, samples: Sequence[EvalSample], pictures: Mapping[str, bytes]) -> None:
        """Write summary, samples, pictures (by file name) and page, and mark the run as done."""
        if self.path is None:
            return
        from infer_patch.report.eval_page import render_eval

        final = self._closed("done", None)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in samples]
        write_text(self.path / "samples.jsonl", "".join(lines))
        shutil.rmtree(self.path / "kept", ignore_errors=True)
        for name, picture in pictures.items():
            (self.path / name).parent.mkdir(exist_ok=True)
            (self.path / name).write_bytes(picture)
        write_json(self.path / "summary.json", summary)
        write_text(self.path / "report.html", render_eval(final, summary, samples, pictures))
        write_json(self.path / "manifest.json", final)
        for file in self.path.glob("rows-*.jsonl"):
            file.unlink()

    def fail(self, error: BaseException) -> None:
        """Mark the run as cut off, and say why; it can go on."""
        if self.path is not None and self._shard.first:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            write_json(self.path / "manifest.json", self._closed("failed", reason))

    def _closed(self, status: Any, error: str | None) -> Manifest:
        if self._manifest is None:
            raise RuntimeError("EvalFolder.open was not called")
        seconds = round(self._before + time.monotonic() - self._began, 1)
        return {**self._manifest, "status": status, "error": error, "seconds": seconds}

    def _read(self) -> list[EvalSample]:
        """Rows of a finished run, or of all processes of one that is not; a line cut off half-way is left out."""
        if self.path is None:
            return []
        rows: dict[tuple[str, str], EvalSample] = {}
        finished = self.path / "samples.jsonl"
        lines = finished.read_text("utf-8").splitlines() if finished.is_file() else []
        for line in lines:
            row = json.loads(line)
            rows[row["plan"], row["item"]] = row
        for file in sorted(self.path.glob("rows-*.jsonl")):
            for line in file.read_text("utf-8").splitlines():
                try:
                    batch = json.loads(line)
                except json.JSONDecodeError:
                    continue
                rows.update({(row["plan"], row["item"]): row for row in batch})
        return list(rows.values())


def _difference(old: dict[str, Any], new: Manifest) -> str:
    """In words, what keeps a run from going on as another; empty if nothing does."""
    current: dict[str, Any] = dict(new)
    changed = [name for name in _SAME if old.get(name) != current[name]]
    changed += [f"model {name}" for name in _SAME_MODEL if old.get("model", {}).get(name) != current["model"][name]]
    versions = old.get("machine", {}).get("versions", {})
    changed += [name for name, v in current["machine"]["versions"].items() if versions.get(name) != v]
    return ", ".join(changed)
