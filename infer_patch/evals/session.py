"""The runs of one comparison: who runs when, held to what, and what is noted of each run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from infer_patch.api import patch
from infer_patch.evals import drift
from infer_patch.evals.cost import Measurement, rotated
from infer_patch.evals.generation import Trace, generate
from infer_patch.evals.haystack import score
from infer_patch.evals.prompts import Prompt, encode, prompt_hash
from infer_patch.evals.results import plain
from infer_patch.evals.schema import Sample, Summary
from infer_patch.evals.summary import OTHER_BACKEND, REPEATED, UNPATCHED, Findings, summarise
from infer_patch.plan import Plan
from infer_patch.stats import Report

if TYPE_CHECKING:
    from infer_patch.evals.compare import Settings
    from infer_patch.progress import Progress


@dataclass(frozen=True)
class Ready:
    """A prompt with what `generate` takes for it."""

    name: str
    text: str
    answer: str | None
    inputs: Mapping[str, Any]
    hash: str

    @property
    def tokens(self) -> int:
        return int(self.inputs["input_ids"].shape[1])


def make_ready(number: int, prompt: Prompt | str, processor: Any, model: Any, chat: bool | None) -> Ready:
    prompt = Prompt(prompt) if isinstance(prompt, str) else prompt
    inputs = encode(prompt, processor, model, chat)
    return Ready(prompt.name or f"prompt {number + 1}", prompt.text, prompt.answer, inputs, prompt_hash(inputs))


class Session:
    """Runs the unpatched model and the plans over the prompts, in an order that rotates."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        plans: Sequence[Plan],
        prompts: Sequence[Ready],
        settings: Settings,
        on_progress: Progress | None = None,
        on_sample: Callable[[Sample], None] | None = None,
    ):
        self.model, self.processor, self.prompts, self.settings = model, processor, prompts, settings
        self.plans: dict[str, Plan | None] = {UNPATCHED: None, **{plan.name: plan for plan in plans}}
        self.samples: list[Sample] = []
        self._findings = Findings(self.plans, list(settings.may_stay_dense))
        self._on_progress, self._on_sample = on_progress, on_sample
        self._with_drift = prompts[: settings.drift_prompts]
        self._done = 0
        self._total = len(self.plans) * len(prompts) * (settings.rounds + settings.warm_up)
        self._total += (len(self.plans) + 1) * len(self._with_drift)

    def run(self, title: str) -> Summary:
        """Everything: first pass with outputs and drift, then the timed rounds."""
        torch.manual_seed(self.settings.seed)
        for turn, prompt in enumerate(self.prompts):
            self._first_pass(turn, prompt)
        for round_ in range(1 - self.settings.warm_up, self.settings.rounds):
            for turn, prompt in enumerate(self.prompts):
                for name in rotated(list(self.plans), round_ + turn):
                    self._announce(f"{name}, {prompt.name}, timed")
                    self._measure(name, prompt, self._generate(name, prompt, keep_logits=False)[0])
        self._announce("done", step=0)
        rough = self.model.device.type != "cuda"
        return plain(summarise(title, self._findings, self.settings.rounds, len(self._with_drift), rough))

    def _first_pass(self, turn: int, prompt: Ready) -> None:
        traces: dict[str, Trace] = {}
        reports: dict[str, Report | None] = {}
        for name in rotated(list(self.plans), turn):
            self._announce(f"{name}, {prompt.name}")
            traces[name], reports[name] = self._generate(name, prompt)
            if not self.settings.warm_up:
                self._measure(name, prompt, traces[name])
        found = self._drift(prompt, traces) if turn < len(self._with_drift) else {}
        for name in self.plans:
            report = reports[name]
            sample = self._sample(name, prompt, traces, report)
            if name in found:
                sample["drift"] = plain(drift.pool([found[name]]))
            self.samples.append(sample)
            self._findings.add(sample, report)
            if self._on_sample is not None:
                self._on_sample(sample)
        self._findings.add_distances(found)

    def _drift(self, prompt: Ready, traces: Mapping[str, Trace]) -> dict[str, drift.Distances]:
        """Distances to the unpatched run, all over the tokens it gave."""
        reference, found = traces[UNPATCHED], {}

        def distances(trace: Trace) -> drift.Distances:
            return drift.distances(reference.recorded(), trace.recorded())

        for name in list(self.plans)[1:]:
            self._announce(f"{name}, {prompt.name}, drift")
            trace = traces[name]
            if trace.ids != reference.ids:  # else it has read the reference already, token by token
                trace = self._generate(name, prompt, reference.ids)[0]
            found[name] = distances(trace)
        self._announce(f"{REPEATED}, {prompt.name}")
        found[REPEATED] = distances(self._generate(UNPATCHED, prompt, reference.ids)[0])
        self._announce(f"{OTHER_BACKEND}, {prompt.name}")
        reason = drift.why_no_other_backend(self.model, prompt.tokens)
        if reason is None:
            with drift.other_backend():
                found[OTHER_BACKEND] = distances(self._generate(UNPATCHED, prompt, reference.ids)[0])
        else:
            self._findings.no_other_backend = reason
        return found

    def _generate(
        self, name: str, prompt: Ready, forced: list[int] | None = None, keep_logits: bool = True
    ) -> tuple[Trace, Report | None]:
        plan = self.plans[name]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*never took effect", UserWarning)  # the verdict says so
            handle = None if plan is None else patch(self.model, plan)
            try:
                trace = generate(self.model, prompt.inputs, self.settings.max_new_tokens, forced, keep_logits)
                return trace, None if handle is None else handle.report()
            finally:
                if handle is not None:
                    handle.remove()

    def _sample(self, name: str, prompt: Ready, traces: Mapping[str, Trace], report: Report | None) -> Sample:
        ids, reference = traces[name].ids, traces[UNPATCHED].ids
        output, difference = self._decode(ids), drift.first_difference(reference, ids)
        same = output if difference is None else self._decode(ids[:difference])
        ends = self.model.generation_config.eos_token_id
        return {
            "plan": name,
            "prompt": prompt.name,
            "prompt_hash": prompt.hash,
            "prompt_text": prompt.text,
            "prompt_tokens": prompt.tokens,
            "answer": prompt.answer,
            "output": output,
            "output_ids": ids,
            "first_difference": difference,
            "same_text": len(same) if output.startswith(same) else 0,
            "flags": {
                "finished": ids[-1] in (ends if isinstance(ends, list) else [ends]),
                "found": None if prompt.answer is None else score(output, prompt.answer),
                "identical": difference is None,
                "fired": None if report is None or not report.methods else not report.silent,
            },
            "drift": None,
            "effect": None if report is None else plain(report.to_dict()),
        }

    def _decode(self, ids: list[int]) -> str:
        return str(self.processor.decode(ids, skip_special_tokens=True))

    def _measure(self, name: str, prompt: Ready, trace: Trace) -> None:
        measured = (trace.first_token_s, trace.per_token_s, trace.peak_bytes, trace.cache_bytes)
        self._findings.measurements.append(Measurement(name, prompt.tokens, len(trace.ids), *measured))

    def _announce(self, what: str, step: int = 1) -> None:
        if self._on_progress is not None:
            self._on_progress(self._done, self._total, what)
        self._done += step
