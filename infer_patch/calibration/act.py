"""`infer-patch calibrate act`: which heads of a model answer better under ACT.

Head by head, every question is answered with ACT on that head alone; a head is kept if it answers better than the
unpatched model. What enters layer l does not depend on an edit in layer l, so hidden states are kept from one unpatched
pass and only the layers from l on run again, with the very modules of the model. Batches are kept in a work folder: an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infer_patch.api import patch
from infer_patch.artifacts import fingerprint
from infer_patch.attention import PORT
from infer_patch.availability import installed_version
from infer_patch.calibration.act_settings import Settings
from infer_patch.calibration.choices import Question
from infer_patch.calibration.work_folder import claim
from infer_patch.errors import PatchError
from infer_patch.evals.statistics import paired
from infer_patch.families import describe
from infer_patch.files import replace_file
from infer_patch.progress import Progress
from infer_patch.selection import plain_attention_layers

Datasets = Mapping[str, Sequence[Question]]


def calibrate(
    model: Any,
    tokenizer: Any,
    datasets: Datasets,
    settings: Settings,
    work: str | Path,
    held_out: Datasets | None = None,
    model_id: str = "",
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Choose heads for one model.

    Parameters
    ----------
    datasets, held_out : mapping of str to questions
        Heads are chosen on the first; on the second, unpatched and patched are compared, if it is given.
    work : path
        Folder for what has been measured; called again with it, no batch is answered twice.
    on_progress : callable
        Told (steps done, steps in all, what comes next).

    Returns
    -------
    dict
        The contents of a `heads_file`: `heads`, `delta` [layer][head] (None where not tried), `baseline` accuracies,
        and `held_out` with paired statistics.

    Raises
    ------
    PatchError
        Before any work: for a model that cannot be served, and a folder that was made for something else.
    """
    return _Calibration(model, tokenizer, settings, Path(work), model_id, on_progress).run(datasets, held_out or {})


def chosen_heads(delta: Sequence[Sequence[float | None]], min_gain: float, most: int | None) -> dict[str, list[int]]:
    """Heads by layer whose gain is above `min_gain`, at most so many of the best (ties: the earlier head)."""
    gains = [(d, layer, head) for layer, row in enumerate(delta) for head, d in enumerate(row) if d is not None]
    better = sorted((x for x in gains if x[0] > min_gain), key=lambda x: (-x[0], x[1], x[2]))[:most]
    heads: dict[str, list[int]] = {}
    for _, layer, head in sorted(better, key=lambda x: x[1:]):
        heads.setdefault(str(layer), []).append(head)
    return heads


class _Calibration:
    def __init__(
        self, model: Any, tokenizer: Any, settings: Settings, work: Path, model_id: str, on_progress: Progress | None
    ):
        self.model, self.tokenizer = model, getattr(tokenizer, "tokenizer", tokenizer)
        self.settings, self.work, self.model_id, self.on_progress = settings, work, model_id, on_progress
        self.parts = describe(model)
        if any(PORT in vars(attention) for attention in self.parts.attentions):
            raise PatchError("this model is patched; call infer_patch.unpatch(model) before it is calibrated.")
        possible = [i for i in plain_attention_layers("act", self.parts) if 2 <= i <= self.parts.num_layers - 2]
        self.layers = possible if settings.layers is None else list(settings.layers)
        strange = sorted(
            set(self.layers) - set(plain_attention_layers("act", self.parts)) | {i for i in self.layers if i < 1}
        )
        if strange or not self.layers:
            raise PatchError(
                f"heads of layers {strange or 'none'} were asked for; this {self.parts.model_type} has "
                f"{self.parts.num_layers} layers, and those from 1 on without a window can be tried."
            )
        settings.method([(self.layers[0], 0)])  # refuses values that make no sense
        self.done = self.total = 0

    def run(self, datasets: Datasets, held_out: Datasets) -> dict[str, Any]:
        self._claim_folder(datasets)
        batches = [(name, n, batch) for name, rows in datasets.items() for n, batch in self._batches(rows)]
        final = [(name, batch) for name, rows in held_out.items() for _, batch in self._batches(rows)]
        self.total = len(batches) * len(self.layers) + 2 * len(final)
        right: dict[str, list[Any]] = {}
        for name, number, batch in batches:
            right.setdefault(name, []).extend(self._tried(name, number, batch))
        heads = self.parts.num_heads
        baseline = {name: _mean([row["unpatched"] for row in rows]) for name, rows in right.items()}
        delta: list[list[float | None]] = [[None] * heads for _ in range(self.parts.num_layers)]
        for place, layer in enumerate(self.layers):
            for head in range(heads):
                gains = [_mean([row["edited"][place][head] for row in right[n]]) - baseline[n] for n in right]
                delta[layer][head] = round(_mean(gains), 6)
        chosen = chosen_heads(delta, self.settings.min_gain, self.settings.max_heads)
        return {
            "model": {"id": self.model_id, **{k: v for k, v in fingerprint(self.model).items() if k != "weights"}},
            "family": sorted(datasets),
            "beta": self.settings.beta,
            "threshold": self.settings.threshold,
            "threshold_mode": self.settings.threshold_mode,
            "layers": self.layers,
            "questions": {name: len(rows) for name, rows in datasets.items()},
            "baseline": {name: round(x, 4) for name, x in baseline.items()},
            "heads": chosen,
            "delta": delta,
            "held_out": self._compared(final, chosen) if final and chosen else {},
            "settings": dataclasses.asdict(self.settings) | {"layers": self.layers},
            "made_with": {name: installed_version(name) for name in ("infer_patch", "torch", "transformers")},
        }

    def _begin(self, what: str) -> None:
        if self.on_progress is not None:
            self.on_progress(self.done, self.total, what)
        self.done += 1

    # Answering

    def _batches(self, questions: Sequence[Question]) -> Iterator[tuple[int, Sequence[Question]]]:
        size = self.settings.batch
        return ((n, questions[n : n + size]) for n in range(0, len(questions), size))

    def _inputs(self, batch: Sequence[Question]) -> dict[str, Tensor]:
        """Prompts as a left-padded batch: the last column is the last token of each."""
        rows = [self.tokenizer(q.prompt).input_ids for q in batch]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, ids.shape[1] - len(row) :], mask[i, ids.shape[1] - len(row) :] = torch.tensor(row), 1
        places = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        return {name: x.to(self.model.device) for name, x in inputs.items()}

    @torch.no_grad()
    def _answers(self, inputs: dict[str, Tensor], batch: Sequence[Question]) -> list[bool]:
        """Whether each question is answered right."""
        options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        logits = self.model(**inputs, use_cache=False, **options).logits[:, -1].float().cpu()
        right = []
        for row, question in zip(logits, batch):
            last = [self.tokenizer(c, add_special_tokens=False).input_ids[-1] for c in question.choices]
            right.append(int(row[last].argmax()) == question.answer)
        return right

    def _tried(self, name: str, number: int, batch: Sequence[Question]) -> list[dict[str, Any]]:
        """For each question of a batch: right unpatched, and with every head of every layer edited alone."""
        file = self.work / f"answers-{name}-{number}.json"
        if file.exists():
            self.done += len(self.layers)
            kept: list[dict[str, Any]] = json.loads(file.read_text())
            return kept
        inputs = self._inputs(batch)
        states: dict[int, Any] = {}
        with ExitStack() as hooks:
            for layer in self.layers:
                keep = _Keep(states, layer)
                hooks.callback(self.parts.layers[layer - 1].register_forward_hook(keep).remove)
            unpatched = self._answers(inputs, batch)
        edited = []
        for layer in self.layers:
            self._begin(f"{name}, questions from {number + 1} on, layer {layer}")
            rows = []
            with self._starting_at(layer, states[layer]):
                for head in range(self.parts.num_heads):
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", UserWarning)  # heads without sinks never take effect
                        with patch(self.model, self.settings.method([(layer, head)])):
                            rows.append(self._answers(inputs, batch))
            edited.append(rows)
        found = [
            {"unpatched": was, "edited": [[row[i] for row in rows] for rows in edited]}
            for i, was in enumerate(unpatched)
        ]
        replace_file(file, json.dumps(found).encode())
        return found

    @contextmanager
    def _starting_at(self, layer: int, state: Any) -> Iterator[None]:
        """The model runs from `layer` on: earlier layers hand on what entered it in the unpatched pass."""
        skipped = self.parts.layers[:layer]
        try:
            for module in skipped:
                module.forward = lambda *args, **kwargs: state
            yield
        finally:
            for module in skipped:
                vars(module).pop("forward", None)

    def _compared(self, batches: list[tuple[str, Sequence[Question]]], heads: dict[str, list[int]]) -> dict[str, Any]:
        """Accuracy on questions that heads were not chosen on, unpatched and with the chosen heads."""
        plan = self.settings.method([(int(layer), head) for layer, row in heads.items() for head in row])
        before, after, groups = [], [], []
        for name, batch in batches:
            inputs = self._inputs(batch)
            self._begin(f"{name}, unpatched")
            before += self._answers(inputs, batch)
            self._begin(f"{name}, patched")
            with patch(self.model, plan):
                after += self._answers(inputs, batch)
            groups += [name] * len(batch)
        questions = [q.prompt for _, batch in batches for q in batch]
        scores = {
            name: {
                "questions": groups.count(name),
                "unpatched": round(_mean([x for x, g in zip(before, groups) if g == name]), 4),
                "patched": round(_mean([x for x, g in zip(after, groups) if g == name]), 4),
            }
            for name in dict.fromkeys(groups)
        }
        statistics = paired(before, after, questions, self.settings.seed)
        return {
            "datasets": scores,
            "all": {"unpatched": _mean(before), "patched": _mean(after)},
            **statistics.to_dict(),
        }

    def _claim_folder(self, datasets: Datasets) -> None:
        asked = {name: [dataclasses.astuple(q) for q in rows] for name, rows in datasets.items()}
        values = {
            "questions": hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest(),
            "act": [self.settings.beta, self.settings.threshold, self.settings.threshold_mode],
            "layers": self.layers,
            "batch": self.settings.batch,
        }
        claim(self.work, self.model, values)


class _Keep:
    """A hook that keeps what a layer hands on as the state that enters the next."""

    def __init__(self, states: dict[int, Any], layer: int):
        self.states, self.layer = states, layer

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        self.states[self.layer] = output


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
