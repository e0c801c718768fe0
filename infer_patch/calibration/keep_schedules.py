"""`infer-patch calibrate g-search` and `p-sigmoid`: from a model to a schedule file.

Both measure schedules on the same questions and share a trace. The result is judged once more, on pictures that the
search did not see.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infer_patch.availability import installed_version, require
from infer_patch.calibration.bayes import Point, maximise
from infer_patch.calibration.schedule_settings import ScheduleSettings, SearchSettings, SigmoidSettings
from infer_patch.calibration.visual_quality import Quality, Trace
from infer_patch.calibration.visual_questions import Questions, questions
from infer_patch.errors import PatchError
from infer_patch.evals.visual_cost import cost_ratio
from infer_patch.keep_schedule import Schedule, counts_of, read_schedule
from infer_patch.patches.g_search import search
from infer_patch.patches.p_sigmoid import reachable, sigmoid_rates
from infer_patch.progress import Progress

Counts = tuple[int, ...]
TOP, STEEPNESS = (0.5, 1.0), (2.0, 40.0)  # ranges of a and kappa; b goes from 0 to the budget
_DRAWN = 4096  # curves looked at for the one nearest a given schedule


def calibrate_g_search(
    model: Any,
    processor: Any,
    settings: SearchSettings,
    trace: Path | None = None,
    model_id: str = "",
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """The fewest visual tokens in each layer whose quality is within eps of the unpatched model.

    Parameters
    ----------
    model, processor
        As `infer_patch.evals.loading.load` gives them; the model is not patched.
    trace : path, optional
        File for what was measured; the same one again measures nothing twice and gives the same schedule.
    on_progress : callable
        Told (measurements done, about how many there will be, what comes next).

    Returns
    -------
    dict
        The contents of a schedule file.
    """
    asked, held_out = questions(settings.source, model, processor)
    quality = Quality(model, processor, asked, settings.metric, settings.query)
    layers, tokens = quality.parts.num_layers, quality.visual
    _check_first(settings.first, layers)
    if settings.least > tokens:
        raise PatchError(f"least must be at most the {tokens} visual tokens of a question, got {settings.least}.")
    grid = settings.grid or max(1, tokens // 36)
    groups = -(-(layers - settings.first) // settings.group)
    steps = _Steps(1 + groups * math.ceil(math.log2(-(-tokens // grid) + 1)), on_progress)
    known = Trace(quality, trace, lambda: steps.begin("measuring a schedule"))
    counts = search(
        known,
        layers,
        tokens,
        known.full - settings.eps,
        first=settings.first,
        grid=grid,
        group=settings.group,
        least=settings.least,
        confirm=settings.confirm,
    )
    params = {"grid": grid, "group": settings.group, "least": settings.least, "confirm": settings.confirm}
    document = {
        **_document("g_search", settings, known, counts, tuple(c / tokens for c in counts), params, model_id),
        "budget": None,
        "eps": settings.eps,
        "held_out": _held_out(settings, model, processor, held_out, counts, steps),
    }
    steps.finish()
    return document


def calibrate_p_sigmoid(
    model: Any,
    processor: Any,
    settings: SigmoidSettings,
    trace: Path | None = None,
    model_id: str = "",
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """The curve of the best quality at a budget; arguments and result as of `calibrate_g_search`."""
    require("scikit-learn", "Calibrating P-Sigmoid")
    asked, held_out = questions(settings.source, model, processor)
    quality = Quality(model, processor, asked, settings.metric, settings.query)
    layers, tokens = quality.parts.num_layers, torch.tensor(quality.visual)
    _check_first(settings.first, layers)
    curves = Curves(settings.budget, layers, settings.first)
    steps = _Steps(1 + settings.starts + settings.iterations, on_progress)
    known = Trace(quality, trace, lambda: steps.begin("measuring a curve"))

    def counts(point: Point) -> Counts:
        return tuple(counts_of(curves.rates(point) or (), tokens).tolist())

    given = [curves.point(1.0, 0.0, STEEPNESS[1])]
    if settings.near is not None:
        given.append(curves.nearest(read_schedule(settings.near, "g_search")))
    tried = maximise(
        lambda point: known(counts(point)),
        lambda point: curves.rates(point) is not None,
        3,
        given,
        settings.starts,
        settings.iterations,
        settings.seed,
    )
    if not tried:
        raise PatchError(f"no curve keeps a budget of {settings.budget} here: {curves.range_in_words()}.")
    best = max(tried, key=lambda pair: pair[1])[0]
    top, bottom, steepness = curves.parameters(best)
    params = {"top": top, "bottom": bottom, "steepness": steepness, "curves": len(tried)}
    rates = curves.rates(best) or ()
    document = {
        **_document("p_sigmoid", settings, known, counts(best), rates, params, model_id),
        "budget": settings.budget,
        "eps": None,
        "held_out": _held_out(settings, model, processor, held_out, counts(best), steps),
    }
    steps.finish()
    return document


@dataclass(frozen=True)
class Curves:
    """The curves of one budget as points of the unit cube: top, bottom, and steepness on a logarithmic scale."""

    budget: float
    layers: int
    first: int

    def parameters(self, point: Point) -> tuple[float, float, float]:
        low, high = map(math.log, STEEPNESS)
        top = TOP[0] + point[0] * (TOP[1] - TOP[0])
        return top, point[1] * min(self.budget, top), math.exp(low + point[2] * (high - low))

    def point(self, top: float, bottom: float, steepness: float) -> Point:
        low, high = map(math.log, STEEPNESS)
        x = (top - TOP[0]) / (TOP[1] - TOP[0])
        return x, bottom / min(self.budget, top), (math.log(steepness) - low) / (high - low)

    def rates(self, point: Point) -> tuple[float, ...] | None:
        return sigmoid_rates(*self.parameters(point), self.budget, self.layers, self.first)

    def nearest(self, schedule: Schedule) -> Point:
        """The curve with the least squared distance to a schedule, of many drawn evenly."""
        if len(schedule.rates) != self.layers:
            raise PatchError(f"the schedule has {len(schedule.rates)} layers, and this model {self.layers}.")
        drawn = torch.rand(_DRAWN, 3, generator=torch.Generator().manual_seed(0)).tolist()
        fits = [(point, self.rates(tuple(point))) for point in drawn]
        served = [(sum((a - b) ** 2 for a, b in zip(r, schedule.rates)), point) for point, r in fits if r is not None]
        if not served:
            raise PatchError(f"no curve keeps a budget of {self.budget} here: {self.range_in_words()}.")
        return tuple(min(served)[1])

    def range_in_words(self) -> str:
        low, high = reachable(1.0, 0.0, STEEPNESS[1], self.layers, self.first)
        return f"{self.layers} layers, of which the first {self.first} hold everything, reach {low:.3f} to {high:.3f}"


class _Steps:
    """Progress: a step counts as done when the next one begins."""

    def __init__(self, total: int, on_progress: Progress | None):
        self._done, self._total, self._on_progress = 0, total, on_progress or (lambda done, total, what: None)

    def begin(self, what: str) -> None:
        self._on_progress(self._done, max(self._total, self._done + 1), what)
        self._done += 1

    def finish(self) -> None:
        self._on_progress(self._done, self._done, "done")


def _check_first(first: int, layers: int) -> None:
    if first >= layers:
        raise PatchError(f"first must be below the {layers} layers of this model, got {first}.")


def _document(
    method: str,
    settings: ScheduleSettings,
    known: Trace,
    counts: Counts,
    rates: tuple[float, ...],
    params: dict[str, Any],
    model_id: str,
) -> dict[str, Any]:
    quality = known.quality
    config = quality.parts.text_config
    sizes = quality.text, quality.visual, config.hidden_size, config.intermediate_size
    return {
        "method": method,
        "model": Path(model_id).name if Path(model_id).exists() else model_id,
        "num_layers": len(counts),
        "n_visual_ref": quality.visual,
        "first": settings.first,
        "query": settings.query,
        "keep_rate": [round(rate, 6) for rate in rates],
        "counts": list(counts),
        "mean_rate": round(sum(counts) / len(counts) / quality.visual, 6),
        "cost_model": "F1",
        "cost": round(cost_ratio(counts, *sizes), 4),
        "params": params,
        "metric": quality.metric,
        "q_full": round(known.full, 6),
        "q": round(known(counts), 6),
        "data": f"{len(quality.asked)} {settings.source.describe()}; hash {quality.asked.digest}",
        "evaluations": len(known.asked),
        "seed": getattr(settings, "seed", settings.source.seed),
        "made_with": {name: installed_version(name) for name in ("infer_patch", "torch", "transformers")},
    }


def _held_out(
    settings: ScheduleSettings,
    model: Any,
    processor: Any,
    asked: Questions | None,
    counts: Counts,
    steps: _Steps,
) -> dict[str, Any] | None:
    """Quality on other pictures, unpatched and with the schedule."""
    if asked is None:
        return None
    steps.begin("measuring on held-out pictures")
    measure = Quality(model, processor, asked, settings.metric, settings.query)
    full = measure((measure.visual,) * len(counts))
    return {"questions": len(asked), "q_full": round(full, 6), "q": round(measure(counts), 6)}
