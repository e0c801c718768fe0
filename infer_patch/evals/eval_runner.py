"""The runs of an evaluation: one batch under one plan at a time, and what is noted of each answer."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from infer_patch.api import patch
from infer_patch.evals.cost import rotated
from infer_patch.evals.drift import other_backend
from infer_patch.evals.eval_schema import EvalSample
from infer_patch.evals.kept_tokens import example_items
from infer_patch.evals.prompts import encode, prompt_hash
from infer_patch.evals.question_last import question_tokens
from infer_patch.evals.results import plain
from infer_patch.evals.shards import Shard
from infer_patch.evals.summary import OTHER_BACKEND, UNPATCHED
from infer_patch.evals.task import Batch, Item, Task
from infer_patch.plan import Plan
from infer_patch.progress import Progress
from infer_patch.stats import Report


class Runner:
    """Answers batches under every plan, in an order that rotates.

    `controls` are further runs of the unpatched model, of the first `control_batches` batches.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        task: Task,
        plans: Sequence[Plan],
        items: Sequence[Item],
        *,
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

    def batches(
        self, shard: Shard, done: set[tuple[str, int]], on_progress: Progress | None
    ) -> Iterator[list[EvalSample]]:
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
