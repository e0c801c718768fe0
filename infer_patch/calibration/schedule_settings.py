"""What the calibrations of schedules are asked for, checked before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from infer_patch.calibration.visual_questions import Source
from infer_patch.errors import PatchError
from infer_patch.keep_schedule import QUERIES


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """What both calibrations take.

    Parameters
    ----------
    source : Source
        The questions.
    metric : {"agreement", "accuracy"}
    query : {"instruction", "last"}
        Whose attention ranks tokens.
    first : int
        First layer that may hold less than everything.
    """

    source: Source = field(default_factory=Source)
    metric: str = "agreement"
    query: str = "instruction"
    first: int = 2

    def __post_init__(self) -> None:
        if self.query not in QUERIES:
            raise PatchError(f"query must be one of {', '.join(QUERIES)}, got {self.query!r}.")
        if self.first < 1:
            raise PatchError(f"first must be a layer number from 1 up, got {self.first}.")


@dataclass(frozen=True, kw_only=True)
class SearchSettings(ScheduleSettings):
    """Of `calibrate_g_search`.

    Parameters
    ----------
    eps : float
        How much quality may be lost, as a difference of shares.
    grid : int, optional
        Numbers of tokens are multiples of this; a 36th of the visual tokens if not given.
    group : int
        So many layers in a row share a number.
    least : int
        The least number of tokens in a layer.
    confirm : int
        So many smaller numbers are tried where one is rejected.
    """

    eps: float = 0.01
    grid: int | None = None
    group: int = 1
    least: int = 0
    confirm: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eps <= 1:
            raise PatchError(f"eps is a share from 0 to 1, got {self.eps}.")
        if (self.grid is not None and self.grid < 1) or self.group < 1 or self.least < 0 or self.confirm < 0:
            raise PatchError(
                "grid and group must be 1 or more, least and confirm 0 or more, got "
                f"{self.grid}, {self.group}, {self.least}, {self.confirm}."
            )


@dataclass(frozen=True, kw_only=True)
class SigmoidSettings(ScheduleSettings):
    """Of `calibrate_p_sigmoid`.

    Parameters
    ----------
    budget : float
        Mean share of visual tokens over all layers.
    starts, iterations : int
        Curves tried before, and chosen by, Bayesian optimisation.
    near : path, optional
        A G-Search schedule file; the curve nearest to it is tried too.
    seed : int
        Of the optimisation.
    """

    budget: float = 0.5
    starts: int = 10
    iterations: int = 30
    near: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.budget < 1:
            raise PatchError(f"the budget is a share between 0 and 1, got {self.budget}.")
        if self.starts < 1 or self.iterations < 0:
            raise PatchError(
                f"starts must be 1 or more and iterations 0 or more, got {self.starts}, {self.iterations}."
            )
