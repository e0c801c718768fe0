"""Unpatched against plans: the same prompts, one process, outputs, drift, cost, proof of effect, and a verdict."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer_patch.api import patch
from infer_patch.availability import require
from infer_patch.errors import PatchError, PlanError
from infer_patch.evals.attention_view import attention_views, check_head
from infer_patch.evals.prompts import Prompt
from infer_patch.evals.results import ResultFolder, file_name, git_commit
from infer_patch.evals.schema import SCHEMA, Manifest, ModelFacts, Sample, Summary
from infer_patch.evals.session import Session, make_ready
from infer_patch.evals.summary import OTHER_BACKEND, REPEATED, UNPATCHED
from infer_patch.families import describe
from infer_patch.machine import machine
from infer_patch.plan import Plan, PlanLike
from infer_patch.progress import Progress


@dataclass(frozen=True)
class Settings:
    """How to compare.

    Parameters
    ----------
    max_new_tokens : int
        Greedy tokens per prompt.
    rounds : int
        Timed passes over all prompts and plans.
    warm_up : bool
        Run one more pass first that is not timed. Without it the first pass is timed too.
    drift_prompts : int, optional
        Compare logits on that many prompts only (the first ones); by default on all.
    may_stay_dense : collection of str
        Names of plans that need not take effect, because their settings ask for nothing to be left out.
    seed : int
        Of torch, and noted in the manifest.
    attention : (int, int), optional
        A layer and a head, whose attention on the first prompt is measured before and after, plan by plan.
    """

    max_new_tokens: int = 32
    rounds: int = 3
    warm_up: bool = True
    drift_prompts: int | None = None
    may_stay_dense: Collection[str] = ()
    seed: int = 0
    attention: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("rounds", 1), ("drift_prompts", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise PatchError(f"{name} must be {least} or more, got {value}")


@dataclass
class Comparison:
    """What `compare` found: the three parts of a result folder, and where it is (None: nothing was written)."""

    manifest: Manifest
    summary: Summary
    samples: list[Sample]
    folder: Path | None = None

    @property
    def verdicts(self) -> dict[str, str]:
        """The verdict on each plan."""
        return {row["name"]: row["verdict"] for row in self.summary["rows"] if row["role"] == "plan"}

    @property
    def failed(self) -> list[str]:
        """Plans of which a method never took effect."""
        return [row["name"] for row in self.summary["rows"] if row["status"] == "failed"]

    @property
    def page(self) -> Path | None:
        return None if self.folder is None else self.folder / "report.html"


def compare(
    model: Any,
    processor: Any,
    plans: Sequence[PlanLike],
    prompts: Sequence[Prompt | str],
    settings: Settings | None = None,
    *,
    chat: bool | None = None,
    out: str | Path | None = None,
    model_id: str = "",
    title: str = "",
    command: str = "",
    kind: str = "compare",
    on_progress: Progress | None = None,
) -> Comparison:
    """Compare an unpatched model with plans, on the same prompts and in one process.

    Parameters
    ----------
    model : PreTrainedModel
        Unpatched; it is again afterwards.
    processor : tokenizer or processor
    plans : sequence of plans
        Preset names, YAML files, `Plan`s or methods; names must differ.
    prompts : sequence of Prompt or str
        Run one at a time: batching alone changes the output of some models.
    chat : bool, optional
        Apply the chat template; by default where there is one.
    out : path, optional
        Result folder; needs jinja2 for the page.
    on_progress : callable, optional
        Told (runs done, runs in all, what comes next) before each run.

    Raises
    ------
    PatchError
        Before anything is run or written: a plan that does not fit the model, a prompt that does not.
    """
    settings = settings or Settings()
    if out is not None:
        require("jinja2", "The HTML page")
    if settings.attention is not None:
        require("matplotlib", "Drawing attention")
        check_head(model, *settings.attention)
    wanted = checked(model, plans)
    ready = [make_ready(i, p, processor, model, chat) for i, p in enumerate(prompts)]
    if not ready:
        raise PatchError("nothing to compare on: give at least one prompt.")
    if twice := _repeated([prompt.name for prompt in ready]):
        raise PatchError(f"prompts need different names to be told apart; {twice} stands for more than one.")
    manifest: Manifest = {
        "schema": SCHEMA,
        "kind": kind,
        "status": "running",
        "error": None,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": None,
        "command": command,
        "git": git_commit(),
        "seed": settings.seed,
        "settings": _settings(settings, len(ready), chat),
        "model": model_facts(model, model_id),
        "machine": machine(),
        "plans": [plan.to_dict() for plan in wanted],
    }
    folder = None if out is None else ResultFolder(out)
    if folder is not None:
        folder.start(manifest, wanted)
    on_sample = None if folder is None else folder.add
    session = Session(model, processor, wanted, ready, settings, on_progress, on_sample)
    try:
        summary = session.run(
            title or f"{manifest['model']['id']}: {', '.join(p.name for p in wanted)} against unpatched"
        )
        files: dict[str, bytes] = {}
        if settings.attention is not None:
            images = prompts[0].images if isinstance(prompts[0], Prompt) else ()
            views = attention_views(model, processor, wanted, ready[0], *settings.attention, images)
            summary["attention"], files = views
        if folder is not None:
            from infer_patch.report.page import render

            folder.add_files(files)
            folder.finish(summary, lambda final: render(final, summary, session.samples, files))
    except BaseException as error:
        if folder is not None:
            folder.fail(error)
        raise
    return Comparison(manifest, summary, session.samples, None if folder is None else folder.path)


def model_facts(model: Any, model_id: str = "") -> ModelFacts:
    """What the manifest says of a model."""
    parts = describe(model)
    weights = {id(p): p for p in model.parameters()}.values()
    return {
        "id": Path(model_id).name if model_id and Path(model_id).is_dir() else model_id or parts.model_type,
        "type": parts.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "attention": str(parts.text_config._attn_implementation),
        "layers": parts.num_layers,
        "parameters": sum(p.numel() for p in weights),
        "weights_bytes": sum(p.numel() * p.element_size() for p in weights),
    }


def checked(model: Any, plans: Sequence[PlanLike]) -> list[Plan]:
    """The plans, each known to fit the model."""
    wanted = [Plan.of(plan) for plan in plans]
    names = [file_name(name) for name in (UNPATCHED, REPEATED, OTHER_BACKEND, *(plan.name for plan in wanted))]
    if twice := _repeated(names):
        raise PlanError(
            f"plans need different names to be told apart; {twice} stands for more than one. "
            "Write a `name:` into each plan file."
        )
    if not wanted:
        raise PlanError("nothing to compare: give at least one plan.")
    for plan in wanted:
        patch(model, plan).remove()
    return wanted


def _repeated(names: Sequence[str]) -> str:
    """What occurs more than once, as a list in words; empty when nothing does."""
    return ", ".join(sorted({name for name in names if names.count(name) > 1}))


def _settings(settings: Settings, prompts: int, chat: bool | None) -> dict[str, Any]:
    values = dataclasses.asdict(settings) | {"may_stay_dense": sorted(settings.may_stay_dense)}
    values["attention"] = None if settings.attention is None else "{}:{}".format(*settings.attention)
    return {**values, "prompts": prompts, "chat": "where there is a template" if chat is None else chat}
