"""P-Sigmoid: a fixed budget of visual tokens, spread over the layers along an S-shaped curve (arXiv 2412.00556)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from infer_patch.errors import PlanError
from infer_patch.keep_schedule import QUERIES, Schedule, ScheduledPruning, is_rate
from infer_patch.method import option, register

_PLACES = (-3.0, 4.0)  # between which the middle of the curve is looked for, in shares of the depth
_STEPS = 100


@register("p_sigmoid")
@dataclass(frozen=True, kw_only=True)
class PSigmoid(ScheduledPruning):
    """The share of visual tokens falls from layer to layer along a sigmoid whose mean over the layers is the budget.

    The curve has three free parameters: its top, its bottom and how steep it is. Where it falls follows from the
    budget. `infer-patch calibrate p-sigmoid` tunes the three for one model; without a file they are given here. What
    stays is chosen and dropped as in `g_search`.

    Parameters
    ----------
    budget : float, optional
        Mean share of the visual tokens over all layers, above `first` / layers.
    top, bottom : float
        Plateaus a and b of the curve; bottom is at most the budget.
    steepness : float
        kappa, above 0: 2 falls over the whole depth, 40 within a layer or two (as FastV does).
    first : int
        First layer that may hold less than everything; its judge is layer first - 1.
    schedule_file : str
        JSON file made by `infer-patch calibrate p-sigmoid`, in place of the options above. A bare name that is no
        file here is looked for among those that ship with the package.
    query : {"instruction", "last", "random"}, optional
        Whose attention ranks: the mean over all text behind the last picture, or the last token as in FastV. "random"
        draws instead: the control.
    pool : {"global", "per_image"}
        Rates of all visual tokens of a sample together, or of each picture.

    References
    ----------
    Zhao et al., "Accelerating Multimodal Large Language Models by Searching Optimal Vision Token Reduction",
    arXiv 2412.00556, CVPR 2025. Their parametrisation was not readable; this one is ours.
    """

    budget: float | None = option(None, "mean share of visual tokens over all layers, instead of a file")
    top: float = option(1.0, "a: share at the top of the curve")
    bottom: float = option(0.0, "b: share at its bottom, at most the budget")
    steepness: float = option(10.0, "kappa: how steeply it falls, above 0")
    first: int = option(2, "first layer that may hold less than everything")

    paper = "arXiv 2412.00556"
    summary = "a fixed budget of visual tokens, spread over the layers along a sigmoid"
    given = "budget, with top, bottom, steepness and first as wanted"

    def validate(self) -> None:
        super().validate()
        budget = self.budget
        self.require(
            budget is None or (is_rate(budget) and 0 < budget < 1), f"budget must be between 0 and 1, got {budget!r}"
        )
        ends = is_rate(self.top) and is_rate(self.bottom) and self.bottom <= self.top
        self.require(ends, f"top and bottom must be shares, bottom not above top, got {self.top!r} and {self.bottom!r}")
        kappa = self.steepness
        self.require(
            isinstance(kappa, (int, float)) and math.isfinite(kappa) and kappa > 0,
            f"steepness must be a number above 0, got {kappa!r}",
        )
        whole = isinstance(self.first, int) and not isinstance(self.first, bool) and self.first >= 1
        self.require(whole, f"first must be a layer number from 1 up, got {self.first!r}")

    def gives_rates(self) -> bool:
        return self.budget is not None

    def given_rates(self, layers: int) -> Schedule:
        budget = self.budget or 0.0
        rates = sigmoid_rates(self.top, self.bottom, self.steepness, budget, layers, self.first)
        if rates is None:
            low, high = reachable(self.top, self.bottom, self.steepness, layers, self.first)
            raise PlanError(
                f"{self.name}: a budget of {budget} cannot be kept by {layers} layers of which the first {self.first} "
                f"hold everything, with shares from {self.top} to {self.bottom} after them: between {low:.3f} and "
                f"{high:.3f} can. Change budget, top, bottom or first."
            )
        return Schedule(rates, QUERIES[0])


def sigmoid(top: float, bottom: float, steepness: float, middle: float, layers: int, first: int) -> tuple[float, ...]:
    """r_l = b + (a - b) / (1 + exp(kappa (l / (L - 1) - mu))) for l >= first, 1 before."""

    def rate(layer: int) -> float:
        x = steepness * (layer / max(layers - 1, 1) - middle)
        share = 1 / (1 + math.exp(x)) if x < 0 else math.exp(-x) / (1 + math.exp(-x))
        return min(bottom + (top - bottom) * share, 1.0)

    return tuple(1.0 if layer < first else rate(layer) for layer in range(layers))


def reachable(top: float, bottom: float, steepness: float, layers: int, first: int) -> tuple[float, float]:
    """The least and the largest mean rate over the places of the middle that are looked at."""
    least, most = (sum(sigmoid(top, bottom, steepness, mu, layers, first)) / layers for mu in _PLACES)
    return least, most


def sigmoid_rates(
    top: float, bottom: float, steepness: float, budget: float, layers: int, first: int = 2
) -> tuple[float, ...] | None:
    """Rates whose mean over the layers is the budget, by bisection on the middle mu of the curve; None where no mu
    in [-3, 4] gives it."""
    low, high = _PLACES
    least, most = reachable(top, bottom, steepness, layers, first)
    if not least <= budget <= most:
        return None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if sum(sigmoid(top, bottom, steepness, middle, layers, first)) / layers < budget:
            low = middle
        else:
            high = middle
    return sigmoid(top, bottom, steepness, (low + high) / 2, layers, first)
