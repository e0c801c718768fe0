"""How good a schedule of visual tokens is: measured on fixed questions, every schedule once, all kept in a trace."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from infer_patch.api import is_patched, patch
from infer_patch.artifacts import fingerprint
from infer_patch.calibration.visual_questions import Questions
from infer_patch.errors import PatchError
from infer_patch.evals.generation import forced_choices, generate_batch
from infer_patch.evals.task import Scored
from infer_patch.families import describe
from infer_patch.patches.g_search import GSearch

METRICS = ("agreement", "accuracy")


class Quality:
    """Quality in [0, 1] of visual tokens per layer, on greedy answers.

    agreement: share of the unpatched model's answer tokens that the patched model would choose too, when the answer is
    fed token by token. accuracy: share of right answers, the mean over the splits of POPE.

    Parameters
    ----------
    model : PreTrainedModel
        Unpatched; it is again after every call.
    asked : Questions
    query : str
        Whose attention ranks tokens, see `GSearch`.
    """

    def __init__(self, model: Any, processor: Any, asked: Questions, metric: str, query: str):
        if metric not in METRICS:
            raise PatchError(f"the metric must be one of {', '.join(METRICS)}, got {metric!r}.")
        if is_patched(model):
            raise PatchError("this model is patched; call infer_patch.unpatch(model) before it is calibrated.")
        self.model, self.processor, self.asked, self.metric, self.query = model, processor, asked, metric, query
        self.parts = describe(model)
        GSearch(keep_rate=(1.0,) * self.parts.num_layers).applicable_layers(self.parts)  # refuses text-only models
        self.visual, self.text = asked.tokens(self.parts)
        self._batches = asked.batches()
        self._answers: list[list[list[int]]] | None = None

    def __call__(self, counts: tuple[int, ...]) -> float:
        """Quality with counts[l] of `visual` tokens in layer l."""
        if self.metric == "agreement" and self._answers is None:
            limit = self.asked.task.max_new_tokens
            self._answers = [generate_batch(self.model, inputs, limit).ids for _, inputs in self._batches]
        if min(counts) == self.visual:
            return 1.0 if self.metric == "agreement" else self._accuracy()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*never took effect", UserWarning)
            with patch(self.model, GSearch(keep_rate=tuple(c / self.visual for c in counts), query=self.query)):
                return self._agreement() if self.metric == "agreement" else self._accuracy()

    def _agreement(self) -> float:
        shares = []
        for (_, inputs), answers in zip(self._batches, self._answers or ()):
            for answer, chosen in zip(answers, forced_choices(self.model, inputs, answers)):
                words = max(len(answer) - 1, 1)  # the end token agrees almost always and would hide the rest
                shares.append(fmean(a == c for a, c in zip(answer[:words], chosen)))
        return fmean(shares)

    def _accuracy(self) -> float:
        rows = []
        for items, inputs in self._batches:
            ids = generate_batch(self.model, inputs, self.asked.task.max_new_tokens).ids
            for item, row in zip(items, ids):
                output = str(self.processor.decode(row, skip_special_tokens=True))
                score = self.asked.task.score(item, output)
                rows.append({"item": item.name, "group": item.group, "reference": item.reference, "score": score})
                rows[-1] |= {"facts": item.facts, "output": output}
        return self.asked.task.metrics(cast("list[Scored]", rows))["accuracy"]


class Trace:
    """Measured schedules, in memory and in a file of JSON lines; the same file again measures nothing twice.

    `measured` counts those that were not there yet.
    """

    def __init__(self, quality: Quality, file: Path | None = None, on_measure: Callable[[], None] = lambda: None):
        self.quality, self.file, self._on_measure = quality, file, on_measure
        self.known: dict[tuple[int, ...], float] = {}
        self.asked: set[tuple[int, ...]] = set()
        self.measured = 0
        if file is not None:
            self._open(file)
        self.full = self((quality.visual,) * quality.parts.num_layers)

    def __call__(self, counts: tuple[int, ...]) -> float:
        if counts not in self.asked:
            self.asked.add(counts)
            self._on_measure()
        if counts not in self.known:
            self.known[counts] = self.quality(counts)
            self.measured += 1
            if self.file is not None:
                with self.file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps({"counts": list(counts), "q": self.known[counts]}) + "\n")
        return self.known[counts]

    def _open(self, file: Path) -> None:
        """Read what is there, or begin: the first line says what was measured."""
        quality = self.quality
        mine = {
            "metric": quality.metric,
            "query": quality.query,
            "questions": quality.asked.digest,
            "batch_size": quality.asked.batch_size,
            "dtype": str(quality.model.dtype),
            "model": fingerprint(quality.model),
        }
        mine = json.loads(json.dumps(mine))
        if not file.exists():
            file.write_text(json.dumps(mine) + "\n", encoding="utf-8")
            return
        try:
            *whole, torn = file.read_text(encoding="utf-8").split("\n")
            theirs, *rows = [json.loads(line) for line in whole]
            self.known = {tuple(row["counts"]): float(row["q"]) for row in rows}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PatchError(f"{file} is no trace of a calibration ({error}); name another file.") from error
        other = sorted(key for key in mine if not isinstance(theirs, dict) or theirs.get(key) != mine[key])
        if other:
            raise PatchError(
                f"{file} holds what was measured with other values of {', '.join(other)}. Name another trace, or "
                "remove this one."
            )
        if torn:  # a run was stopped while it wrote
            file.write_text("\n".join([*whole, ""]), encoding="utf-8")
