"""Which rule each head gets: binary programs solved by columns, one column for each way to set up a layer.

x[h, r] = 1 gives head h rule r. A plan minimises the sum of the losses of its rules, under upper limits on its mean
density at several lengths and on its losses at the other profiled lengths, with at most two distinct rules in a layer.

Written out head by head, that limit makes the program hard (not solved in a minute at 256 heads). Layer by layer it is
easy: with prices on the limits, the best rules of a layer are found by trying every pair. Columns are added at the
prices of the linear relaxation until none is missing (that value is a lower bound on any plan's loss); an integer
program then picks one column for each layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infer_patch.availability import require
from infer_patch.errors import PatchError

_ENUMERATE = 3000  # columns that are simply all written down
_BEST_PAIRS = 4  # columns added for each layer in each round
_ROUNDS = 200
_GAP = 2e-3  # share by which an integer program may miss the best choice of columns
_SLACK = 0.02  # share by which a plan may miss the relaxation: no column in it is worse than that by itself
_SECONDS = 10.0  # for one integer program; most take a tenth of one


@dataclass(frozen=True)
class Problem:
    """What can be chosen and what it costs.

    Parameters
    ----------
    losses : float Tensor [P, L, H, R]
        Of every rule, for each profiled length, layer and key head.
    densities : float [C, R]
        Share of all keys that a head with a rule holds, for each length with a limit.
    limits : float [C]
        On the mean density over all heads.
    max_rules : int, optional
        Distinct rules in a layer: 1, 2, or None for any number.
    """

    losses: NDArray[np.float64]
    densities: NDArray[np.float64]
    limits: NDArray[np.float64]
    max_rules: int | None = 2


@dataclass(frozen=True)
class Solution:
    """A rule for each layer and head, with the losses [P] and mean densities [C] that follow; `bound` is a proven lower
    bound on the objective that was minimised."""

    rules: NDArray[np.int64]
    losses: NDArray[np.float64]
    densities: NDArray[np.float64]
    bound: float = -np.inf


class Solver:
    """Solves one problem under changing limits; columns found once serve all of them.

    Raises
    ------
    MissingDependencyError
        Without SciPy.
    """

    def __init__(self, problem: Problem, enumerate_up_to: int = _ENUMERATE):
        require("scipy", "Calibrating MoA")
        self.problem = problem
        losses = problem.losses
        if problem.max_rules is None:  # every head is a unit of its own
            losses = losses.reshape(losses.shape[0], -1, 1, losses.shape[3])
        self._losses = losses  # [P, U, heads of a unit, R]
        self._scale = np.maximum(losses.max(3).sum((1, 2)), 1e-30)  # of each objective, for the solvers' tolerances
        self._units, self._heads, rules = losses.shape[1:]
        self._distinct = min(problem.max_rules or 1, self._heads, rules)
        self._columns: dict[tuple[int, tuple[int, ...]], int] = {}
        self._values: list[NDArray[np.float64]] = []  # of each column: scaled losses [P], densities [C]
        few = rules**self._heads <= 1e5
        every = [
            column
            for column in (itertools.product(range(rules), repeat=self._heads) if few else ())
            if len(set(column)) <= self._distinct
        ]
        self._complete = bool(every) and len(every) * self._units <= enumerate_up_to
        start = every if self._complete else [(r,) * self._heads for r in range(rules)]
        for unit in range(self._units):
            for column in start:
                self._add(unit, column)

    def minimise(self, objective: int, loss_limits: NDArray[np.float64] | None = None) -> Solution | None:
        """The plan of least loss at one profiled length, or None when no plan keeps the limits.

        Parameters
        ----------
        objective : int
            Number of the profiled length.
        loss_limits : float [P], optional
            Upper limits on the loss at the other lengths (inf for none).
        """
        limits = np.full(len(self._scale), np.inf) if loss_limits is None else loss_limits / self._scale
        limits = np.where(np.arange(len(limits)) == objective, np.inf, limits)
        bound = -np.inf
        for _ in range(_ROUNDS):
            value, prices, duals = self._relaxed(objective, limits)
            if self._complete or not self._price(objective, prices, duals):
                bound = value * self._scale[objective]
                break
        chosen = self._integer(objective, limits, value, self._reduced(objective, prices, duals))
        return None if chosen is None else self._solution(chosen, bound)

    # Columns

    def _add(self, unit: int, column: tuple[int, ...]) -> bool:
        if (unit, column) in self._columns:
            return False
        heads, picked = np.arange(self._heads), list(column)
        losses = self._losses[:, unit, heads, picked].sum(1) / self._scale
        densities = self.problem.densities[:, picked].sum(1) / (self._units * self._heads)
        self._columns[unit, column] = len(self._values)
        self._values.append(np.concatenate([losses, densities]))
        return True

    def _price(self, objective: int, prices: NDArray[np.float64], duals: NDArray[np.float64]) -> bool:
        """Add the columns that would improve the relaxation at these prices; whether there were any.

        prices [P + C]: of a unit of each limited sum; duals [U]: what a unit's choice is worth at present.
        """
        weights = prices[: len(self._scale)].copy()
        weights[objective] += 1
        cost = np.einsum("p,puhr->uhr", weights / self._scale, self._losses)
        cost += prices[len(self._scale) :] @ self.problem.densities / (self._units * self._heads)
        added = False
        for unit in range(self._units):
            for value, column in self._best(cost[unit]):
                if value < duals[unit] - 1e-9:
                    added |= self._add(unit, column)
        return added

    def _best(self, cost: NDArray[np.float64]) -> list[tuple[float, tuple[int, ...]]]:
        """The cheapest columns of a unit for the cost [heads, R] of each rule."""
        if self._distinct == 1:
            sums = cost.sum(0)
            return [(float(sums[r]), (int(r),) * len(cost)) for r in np.argsort(sums)[:_BEST_PAIRS]]
        sums = np.minimum(cost[:, :, None], cost[:, None, :]).sum(0)
        order = np.argsort(np.where(np.tri(len(sums), dtype=bool), sums, np.inf), axis=None)[:_BEST_PAIRS]
        found = []
        for first, second in zip(*np.unravel_index(order, sums.shape)):
            picked = np.where(cost[:, first] <= cost[:, second], first, second)
            found.append((float(sums[first, second]), tuple(int(r) for r in picked)))
        return found

    def _reduced(self, objective: int, prices: NDArray[np.float64], duals: NDArray[np.float64]) -> NDArray[np.float64]:
        """What a plan costs more than the relaxation at least, for each column that it might hold."""
        weights = prices.copy()
        weights[objective] += 1
        return np.array(self._values) @ weights - duals[[unit for unit, _ in self._columns]]

    # Programs

    def _rows(self, limits: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """Limited sums of the columns [rows, K], their limits, and which of the P + C sums they are."""
        bounds = np.concatenate([limits, self.problem.limits])
        limited = np.isfinite(bounds)
        return np.array(self._values).T[limited], bounds[limited], limited

    def _membership(self) -> Any:
        from scipy.sparse import csr_array

        units = np.array([unit for unit, _ in self._columns])
        return csr_array((np.ones(len(units)), (units, np.arange(len(units)))), shape=(self._units, len(units)))

    def _relaxed(
        self, objective: int, limits: NDArray[np.float64]
    ) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
        """Value of the linear relaxation, prices of the P + C sums (>= 0), and the worth of each unit's choice.

        Limits may be exceeded at a price no plan would pay, so that there always is a solution to take prices from.
        """
        from scipy.optimize import linprog
        from scipy.sparse import csr_array, hstack

        rows, bounds, limited = self._rows(limits)
        excess = csr_array(-np.eye(len(rows)))
        result = linprog(
            np.concatenate([np.array(self._values)[:, objective], np.full(len(rows), 1e3)]),
            A_ub=hstack([csr_array(rows), excess]),
            b_ub=bounds,
            A_eq=hstack([self._membership(), csr_array((self._units, len(rows)))]),
            b_eq=np.ones(self._units),
            method="highs",
        )
        if result.x is None:
            raise PatchError(f"SciPy's linear solver gave up: {result.message}")
        prices = np.zeros(len(limited))
        prices[limited] = -result.ineqlin.marginals
        return float(result.fun), prices, result.eqlin.marginals

    def _integer(
        self, objective: int, limits: NDArray[np.float64], relaxed: float, reduced: NDArray[np.float64]
    ) -> list[tuple[int, ...]] | None:
        """One column for each unit, of those that a plan within a small distance of the relaxation can hold; and of
        more where the best plan turns out to be farther away."""
        slack = _SLACK * abs(relaxed)
        value, chosen = self._choose(objective, limits, reduced <= slack)
        if value - relaxed > slack:
            value, chosen = self._choose(objective, limits, reduced <= value - relaxed)
        return chosen

    def _choose(
        self, objective: int, limits: NDArray[np.float64], allowed: NDArray[np.bool_]
    ) -> tuple[float, list[tuple[int, ...]] | None]:
        """The least loss over the allowed columns, and one of them for each unit; inf and None where none will do."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        rows, bounds, _ = self._rows(limits)
        result = milp(
            np.array(self._values)[allowed, objective],
            constraints=[
                LinearConstraint(rows[:, allowed], -np.inf, bounds + 1e-9),
                LinearConstraint(self._membership()[:, allowed], 1, 1),
            ],
            integrality=np.ones(int(allowed.sum())),
            bounds=Bounds(0, 1),
            options={"time_limit": _SECONDS, "mip_rel_gap": _GAP},
        )
        if result.x is None:
            return np.inf, None
        keys = itertools.compress(self._columns, allowed)
        return float(result.fun), [column for (_, column), x in sorted(zip(keys, result.x)) if x > 0.5]

    def _solution(self, chosen: list[tuple[int, ...]], bound: float) -> Solution:
        layers, heads = self.problem.losses.shape[1:3]
        rules = np.array(chosen, dtype=np.int64).reshape(layers, heads)
        index = np.arange(layers)[:, None], np.arange(heads), rules
        losses = self.problem.losses[:, index[0], index[1], index[2]].sum((1, 2))
        return Solution(rules, losses, self.problem.densities[:, rules].mean((1, 2)), bound)


def pareto_plans(solver: Solver, intervals: int = 5, on_step: Callable[[], None] = lambda: None) -> list[Solution]:
    """Plans of which none is worse than another at every profiled length, by interval constraints.

    First each length's loss is minimised alone, which gives the range of every loss. Then each is minimised again
    under every combination of upper limits on the others, taken from `intervals` even steps of their ranges. (The
    published search bounds them from below too; a plan that falls below is a better plan, found or dominated anyway.)
    """
    count = solver.problem.losses.shape[0]
    alone = []
    for objective in range(count):
        on_step()
        found = solver.minimise(objective)
        if found is None:
            raise PatchError("no plan keeps the limits on the density; raise them, or allow more rules in a layer.")
        alone.append(found)
    plans = list(alone)
    values = np.array([plan.losses for plan in alone])
    low, high = values.min(0), values.max(0)
    for objective in range(count if count > 1 else 0):
        others = [p for p in range(count) if p != objective]
        for steps in itertools.product(range(1, intervals + 1), repeat=len(others)):
            limits = np.full(count, np.inf)
            limits[others] = low[others] + (high - low)[others] * np.array(steps) / intervals
            on_step()
            found = solver.minimise(objective, limits)
            plans += [found] if found is not None else []
    return not_dominated(plans)


def not_dominated(plans: list[Solution]) -> list[Solution]:
    """Without plans that another is at least as good as at every length; of equal ones the first."""
    kept: list[Solution] = []
    for i, plan in enumerate(plans):
        better = [
            other
            for j, other in enumerate(plans)
            if (other.losses <= plan.losses).all() and ((other.losses < plan.losses).any() or j < i)
        ]
        if not better:
            kept.append(plan)
    return sorted(kept, key=lambda plan: tuple(plan.losses))
