"""The result folder, and what stands in it.

    manifest.json      how the run was made; written before it starts, with the status "running"
    plans/<name>.yaml  every plan in full; `Plan.load` and the command line read them back
    samples.jsonl      one row per plan and prompt
    summary.json       one row per plan and control: verdict, quality, drift, cost, proof of effect
    report.html        the same as one page, see `infer_patch.report.page`

Files are replaced as a whole, so a reader never sees half of one. `infer_patch.evals.schema` describes every key.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from infer_patch.errors import PatchError
from infer_patch.evals.schema import SCHEMA, Manifest, Sample, Summary
from infer_patch.files import replace_file
from infer_patch.plan import Plan


class ResultFolder:
    """Writes one result folder, step by step: `start`, `add` for every sample, then `finish` or `fail`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._manifest: Manifest | None = None
        self._began = time.monotonic()

    def start(self, manifest: Manifest, plans: list[Plan]) -> None:
        """Write the manifest and the plans. A result that was in the folder before is replaced.

        Raises
        ------
        PatchError
            When the folder holds something that is not a result.
        """
        self.check()
        self.path.mkdir(parents=True, exist_ok=True)
        for name in ("samples.jsonl", "summary.json", "report.html"):
            (self.path / name).unlink(missing_ok=True)
        for name in ("plans", "attention"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        (self.path / "plans").mkdir()
        self._manifest, self._began = manifest, time.monotonic()
        write_json(self.path / "manifest.json", manifest)
        for plan in plans:
            plan.save(self.path / "plans" / f"{file_name(plan.name)}.yaml")

    def add(self, sample: Sample) -> None:
        """Append a row to `samples.jsonl`."""
        with (self.path / "samples.jsonl").open("a", encoding="utf-8") as rows:
            rows.write(json.dumps(sample, ensure_ascii=False) + "\n")

    def add_files(self, files: Mapping[str, bytes]) -> None:
        """Write further files, by their names in the folder."""
        for name, data in files.items():
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (self.path / name).write_bytes(data)

    def finish(self, summary: Summary, page: Callable[[Manifest], str]) -> None:
        """Write the summary and the page made from the final manifest, and mark the run as done."""
        write_json(self.path / "summary.json", summary)
        final = self._closed("done", None)
        write_text(self.path / "report.html", page(final))
        write_json(self.path / "manifest.json", final)

    def fail(self, error: BaseException) -> None:
        """Mark the run as failed, and say why."""
        write_json(self.path / "manifest.json", self._closed("failed", f"{type(error).__name__}: {error}".rstrip(": ")))

    def _closed(self, status: Literal["done", "failed"], error: str | None) -> Manifest:
        if self._manifest is None:
            raise RuntimeError("ResultFolder.start was not called")
        seconds = round(time.monotonic() - self._began, 1)
        return {**self._manifest, "status": status, "error": error, "seconds": seconds}

    def check(self) -> None:
        """Raise `PatchError` when the folder holds something that is not a result."""
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / "manifest.json").is_file():
            raise PatchError(
                f"{self.path} holds files and is not a result folder (no manifest.json in it); give a new or an empty "
                "folder."
            )
        if self.path.exists() and not self.path.is_dir():
            raise PatchError(f"{self.path} is a file; a result is a folder. Give another name.")


def read(path: str | Path) -> tuple[Manifest, Summary, list[Sample]]:
    """Manifest, summary and samples of a finished comparison."""
    manifest, summary, samples = read_files(path)
    return manifest, summary, samples


def read_files(path: str | Path) -> tuple[Any, Any, list[Any]]:
    """Manifest, summary and samples of any finished result folder of this schema."""
    folder = Path(path)
    try:
        manifest, summary = (json.loads((folder / f"{n}.json").read_text("utf-8")) for n in ("manifest", "summary"))
        rows = (folder / "samples.jsonl").read_text("utf-8").splitlines()
    except OSError as error:
        raise PatchError(f"{folder} is not a finished result folder: {error.strerror}: {error.filename}") from error
    if summary.get("schema") != SCHEMA:
        raise PatchError(f"{folder} has result schema {summary.get('schema')}, this version reads {SCHEMA}.")
    return manifest, summary, [json.loads(row) for row in rows]


def plain(values: Any) -> Any:
    """Values as JSON gives them back: keys are texts, tuples are lists, floats have six digits that mean something."""
    if isinstance(values, dict):
        return {str(key): plain(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain(value) for value in values]
    return float(f"{values:.6g}") if isinstance(values, float) else values


def write_json(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole."""
    replace_file(path, text.encode("utf-8"))


def file_name(name: str) -> str:
    """A name as a file name: what could be anything but a plain character becomes a dash."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.") or "plan"


def git_commit() -> str | None:
    """The commit of the current folder, with "+changes" when files differ from it; None outside of git."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    return run.stdout.strip()
