"""A task answered by the unpatched model and by plans: the same batches, one process, paired statistics, a verdict.

A run that was cut off goes on where it stopped, batch by batch. Processes started with `accelerate launch` share the
batches; which process answers a batch changes nothing, because batches are fixed by the order of the items.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infer_patch.availability import require
from infer_patch.errors import PatchError
from infer_patch.evals.compare import checked, model_facts
from infer_patch.evals.drift import why_no_other_backend
from infer_patch.evals.eval_folder import EvalFolder
from infer_patch.evals.eval_runner import Runner
from infer_patch.evals.eval_schema import EvalSample, EvalSummary
from infer_patch.evals.eval_summary import summarise_eval
from infer_patch.evals.kept_tokens import draw_examples
from infer_patch.evals.prompts import encode
from infer_patch.evals.question_last import feeds_question_last
from infer_patch.evals.results import git_commit, plain
from infer_patch.evals.schema import SCHEMA, Manifest
from infer_patch.evals.shards import Shard
from infer_patch.evals.summary import OTHER_BACKEND, REPEATED
from infer_patch.evals.task import Item, Task
from infer_patch.keep_schedule import RANDOM, ScheduledPruning
from infer_patch.machine import machine
from infer_patch.method import Method
from infer_patch.plan import Plan, PlanLike
from infer_patch.progress import Progress
from infer_patch.pruning import LayerPruning


@dataclass
class Evaluation:
    """What `evaluate` found. `summary` is None in processes that only helped (rank 1 and up)."""

    manifest: Manifest
    summary: EvalSummary | None
    samples: list[EvalSample]
    folder: Path | None = None

    @property
    def failed(self) -> list[str]:
        """Plans of which a method never took effect."""
        return [row["name"] for row in self.summary["rows"] if row["status"] == "failed"] if self.summary else []

    @property
    def page(self) -> Path | None:
        return None if self.folder is None else self.folder / "report.html"


def evaluate(
    model: Any,
    processor: Any,
    task: Task,
    plans: Sequence[PlanLike],
    *,
    batch_size: int = 1,
    control_batches: int = 4,
    random_baseline: bool = False,
    question_last: bool | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
    model_id: str = "",
    command: str = "",
    on_progress: Progress | None = None,
) -> Evaluation:
    """Answer the items of a task unpatched and with each plan.

    Parameters
    ----------
    model : PreTrainedModel
        Unpatched; it is again afterwards.
    plans : sequence of plans
        Preset names, YAML files, `Plan`s or methods; names must differ.
    batch_size : int
        Prompts per batch, padded on the left; the same batches for every run.
    control_batches : int
        The unpatched model answers that many batches a second time, as the floor of every difference; 0 for none.
    random_baseline : bool
        Beside every plan that prunes visual tokens, one that drops as many at random.
    question_last : bool, optional
        In every run, read what stands before the question first and feed the question afterwards, so that answers
        depend on what a method keeps in the cache. By default where a plan changes the cache and the prompts of the
        task tell where their question begins.
    out : path, optional
        Result folder; an unfinished run of the same settings in it goes on. Needs jinja2 for the page.
    overwrite : bool
        Replace a result of other settings instead of refusing.

    Raises
    ------
    PatchError
        Before anything is run: a plan that does not fit the model, items that do not, a folder with another result.
    """
    if batch_size < 1 or control_batches < 0:
        raise PatchError(
            f"batch_size must be 1 or more and control_batches 0 or more, got {batch_size}, {control_batches}"
        )
    require("scipy", "Paired statistics")
    if out is not None:
        require("jinja2", "The HTML page")
    wanted = [Plan.of(plan) for plan in plans]
    if random_baseline:
        wanted = [p for plan in wanted for p in (plan, at_random(plan)) if p is not None]
    wanted = checked(model, wanted)
    items = task.items(processor, model)
    if len({item.name for item in items}) < len(items) or not items:
        raise PatchError(
            f"the task {task.name} gives {len(items)} items; it needs at least one, and names that differ."
        )
    shard = Shard.from_environment()
    question_last = feeds_question_last(model, processor, task, wanted, items[0], question_last)
    no_control = _why_no_other_backend(model, processor, task, items) if control_batches else None
    settings = {
        **_values(task),
        "items": len(items),
        "batch_size": batch_size,
        "control_batches": control_batches,
        "question_last": question_last,
        **({"no_other_backend": no_control} if no_control else {}),
    }
    manifest: Manifest = {
        "schema": SCHEMA,
        "kind": f"eval {task.name}",
        "status": "running",
        "error": None,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": None,
        "command": command,
        "git": git_commit(),
        "seed": seed,
        "settings": plain(settings),
        "model": model_facts(model, model_id),
        "machine": {**machine(), "processes": shard.count},
        "plans": [plan.to_dict() for plan in wanted],
    }
    folder = EvalFolder(out, shard)
    if shard.first:
        folder.open(manifest, wanted, overwrite)
    shard.wait()
    if not shard.first:
        folder.open(manifest, wanted, overwrite=False)
    controls = [REPEATED, OTHER_BACKEND] if task.other_backend and no_control is None else [REPEATED]
    controls = controls if control_batches else []
    runner = Runner(
        model,
        processor,
        task,
        wanted,
        items,
        batch_size=batch_size,
        controls=controls,
        control_batches=control_batches,
        question_last=question_last,
        seed=seed,
    )
    try:
        for batch in runner.batches(shard, folder.done, on_progress):
            folder.add(batch)
        shard.wait()
        if not shard.first:
            return Evaluation(manifest, None, folder.samples, folder.path)
        samples = folder.merged([*runner.plans], [item.name for item in items])
        found = summarise_eval(task, runner.plans, samples, manifest["model"]["id"], question_last, seed)
        found["examples"], pictures = draw_examples(runner.examples, samples, processor, model, task.chat)
        summary: EvalSummary = plain(found)
        folder.finish(summary, samples, pictures)
    except BaseException as error:
        folder.fail(error)
        raise
    return Evaluation(manifest, summary, samples, folder.path)


def at_random(plan: Plan) -> Plan | None:
    """The plan with its pruning done at random, at the same budget; None where there is nothing to replace."""
    from infer_patch.patches import VTCCLS, RandomPruning

    methods: list[Method] = []
    for method in plan:
        if isinstance(method, LayerPruning) and not isinstance(method, RandomPruning):
            shared = {f.name: getattr(method, f.name) for f in dataclasses.fields(LayerPruning)}
            methods.append(RandomPruning(**shared))
        elif isinstance(method, ScheduledPruning):
            methods.append(dataclasses.replace(method, query=RANDOM))
        elif isinstance(method, VTCCLS):
            methods.append(RandomPruning(**method.at_random()))
        else:
            methods.append(method)
    return None if tuple(methods) == plan.methods else Plan(tuple(methods), f"{plan.name}-random")


def _why_no_other_backend(model: Any, processor: Any, task: Task, items: Sequence[Item]) -> str | None:
    if not task.other_backend:
        return None
    longest = max(encode(item.prompt, processor, model, task.chat)["input_ids"].shape[1] for item in items)
    return why_no_other_backend(model, longest)


def _values(task: Task) -> dict[str, Any]:
    """The settings of a task; of paths only the name, so that results name no folder of a machine."""
    values = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}  # type: ignore[arg-type]

    def named(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [named(v) for v in value]
        return value.name if isinstance(value, Path) else value

    return {name: named(value) for name, value in values.items()}
