"""A task answered by the unpatched model and by plans: the same batches, one process, paired statistics, a verdict.

A run that was cut off goes on where it stopped, batch by batch. Processes started with `accelerate launch` share the
batches; which process answers a batch changes nothing, because batches are fixed by the order of the items.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infer_patch.api import patch
from infer_patch.availability import require
from infer_patch.errors import PatchError
from infer_patch.evals.compare import Progress, checked, model_facts
from infer_patch.evals.cost import rotated
from infer_patch.evals.drift import other_backend, why_no_other_backend
from infer_patch.evals.eval_folder import EvalFolder
from infer_patch.evals.eval_summary import summarise_eval
from infer_patch.evals.kept_tokens import draw_examples, example_items
from infer_patch.evals.prompts import encode, prompt_hash
from infer_patch.evals.question_last import feeds_question_last, question_tokens
from infer_patch.evals.results import git_commit, plain
from infer_patch.evals.schema import SCHEMA, EvalSample, EvalSummary, Manifest
from infer_patch.evals.shards import Shard
from infer_patch.evals.summary import OTHER_BACKEND, REPEATED, UNPATCHED
from infer_patch.evals.task import Batch, Item, Task
from infer_patch.machine import machine
from infer_patch.method import Method
from infer_patch.plan import Plan, PlanLike
from infer_patch.pruning import LayerPruning
from infer_patch.stats import Report


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
    runner = _Runner(model, processor, task, wanted, items, batch_size, controls, control_batches, question_last, seed)
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
    from infer_patch.patches import RandomPruning

    methods: list[Method] = []
    for method in plan:
        if isinstance(method, LayerPruning) and not isinstance(method, RandomPruning):
            shared = {f.name: getattr(method, f.name) for f in dataclasses.fields(LayerPruning)}
            methods.append(RandomPruning(**shared))
        else:
            methods.append(method)
    return None if tuple(methods) == plan.methods else Plan(tuple(methods), f"{plan.name}-random")


def _why_no_other_backend(model: Any, processor: Any, task: Task, items: Sequence[Item]) -> str | None:
    if not task.other_backend:
        return None
    longest = max(encode(item.prompt, processor, model, task.chat)["input_ids"].shape[1] for item in items)
    return why_no_other_backend(model, longest)


class _Runner:
    """Answers batches under every plan, in an order that rotates."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        task: Task,
        plans: Sequence[Plan],
        items: Sequence[Item],
        batch_size: int,
        controls: Sequence[str],
        control_batches: int,
        question_last: bool,
        seed: int,
    ):
        self.model, self.processor, self.task, self.seed = model, processor, task, seed
        self.plans: dict[str, Plan | None] = {UNPATCHED: None, **{plan.name: plan for plan in plans}}
        self._controls = controls
        self.plans |= dict.fromkeys(controls)
        self.examples = example_items(items)
        self._batches = [list(items[i : i + batch_size]) for i in range(0, len(items), batch_size)]
        self._control, self._question_last = control_batches, question_last

    def batches(self, shard: Shard, done: set[tuple[str, int]], on_progress: Progress | None) -> Any:
        """Rows of one batch under one plan at a time, of those that this process is to run and are not done."""
        todo = [(number, name) for number in shard.of(len(self._batches)) for name in self._names(number)]
        left = [(number, name) for number, name in todo if (name, number) not in done]
        current, batch, hashes = -1, None, []
        for i, (number, name) in enumerate(left):
            if on_progress is not None:
                on_progress(len(todo) - len(left) + i, len(todo), f"{name}, batch {number + 1} of {len(self._batches)}")
            if batch is None or number != current:
                current, batch = number, self._batch(number)
                hashes = [prompt_hash(encoded) for encoded in batch.inputs]
                if i == 0:  # the first call of a process pays for allocations and compiled kernels
                    self.task.answer(self.model, dataclasses.replace(batch, max_new_tokens=2))
            yield self._answer(number, name, batch, hashes)
        if on_progress is not None:
            on_progress(len(todo), len(todo), "done")

    def _names(self, number: int) -> list[str]:
        names = rotated([name for name in self.plans if name not in self._controls], number)
        return [*names, *self._controls] if number < self._control else names

    def _batch(self, number: int) -> Batch:
        items = self._batches[number]
        inputs = [encode(item.prompt, self.processor, self.model, self.task.chat) for item in items]
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
        longest = max(item.facts.get("max_new_tokens", self.task.max_new_tokens) for item in items)
        asked = question_tokens(self.model, items, inputs) if self._question_last else 0
        batch = Batch(inputs, pad, longest, asked)
        return dataclasses.replace(batch, reference=self.task.reference(self.model, batch))

    def _answer(self, number: int, name: str, batch: Batch, hashes: list[str]) -> list[EvalSample]:
        items, plan, longest = self._batches[number], self.plans[name], batch.max_new_tokens
        drawn = {item.name for item in self.examples}
        torch.manual_seed(self.seed)
        with warnings.catch_warnings(), other_backend() if name == OTHER_BACKEND else nullcontext():
            warnings.filterwarnings("ignore", ".*never took effect", UserWarning)  # the verdict says so
            handle = None if plan is None else patch(self.model, plan)
            try:
                if handle is not None:
                    handle.record_visual_tokens(any(item.name in drawn for item in items))
                trace = self.task.answer(self.model, batch)
                report = None if handle is None else handle.report()
                recorded = [] if handle is None else handle.visual_tokens()
            finally:
                if handle is not None:
                    handle.remove()
        rows: list[EvalSample] = []
        for i, (item, encoded, ids) in enumerate(zip(items, batch.inputs, trace.ids)):
            ids = ids[: item.facts.get("max_new_tokens", longest)]
            output = str(self.processor.decode(ids, skip_special_tokens=True))
            rows.append(
                {
                    "plan": name,
                    "item": item.name,
                    "batch": number,
                    "group": item.group or item.name,
                    "reference": item.reference,
                    "facts": dict(item.facts),
                    "prompt_hash": hashes[i],
                    "prompt_tokens": int(encoded["input_ids"].shape[1]),
                    "output": output,
                    "output_tokens": len(ids),
                    "score": plain({**self.task.score(item, output), **(trace.scores[i] if trace.scores else {})}),
                    "first_token_s": trace.first_token_s,
                    "per_token_s": trace.per_token_s,
                    "cache_bytes": trace.cache_bytes,
                    "fired": None if report is None or not report.methods else not report.silent,
                    "effect": None if report is None or rows else _effect(report),
                    "left_at": recorded[0].left_at(i) if len(recorded) == 1 and item.name in drawn else None,
                }
            )
        return rows


def _effect(report: Report) -> dict[str, Any]:
    """A report without its counts per picture, which would be most of the file."""
    found = report.to_dict()
    methods = {
        name: {key: value for key, value in figures.items() if key != "kept_per_image"}
        for name, figures in found["methods"].items()
    }
    kept: dict[str, Any] = plain({**found, "methods": methods})
    return kept


def _values(task: Task) -> dict[str, Any]:
    """The settings of a task; of paths only the name, so that results name no folder of a machine."""
    values = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}  # type: ignore[arg-type]

    def named(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [named(v) for v in value]
        return value.name if isinstance(value, Path) else value

    return {name: named(value) for name, value in values.items()}
