"""How many visual tokens enter each decoder layer: schedules of keep rates, their files, and the dropping itself.

A schedule belongs to a model and never to a prompt: it holds rates r_l = m_l / N, so that it serves any number N of
visual tokens. Which tokens stay is read off the attention of the layer just run. Both are shared by `g_search` and
`p_sigmoid`, which differ in how the rates are found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from infer_patch.errors import PlanError, UnsupportedModelError
from infer_patch.families import ModelParts
from infer_patch.files import read_json
from infer_patch.method import Method, Runtime, option
from infer_patch.pruning import keep_counts, random_scores
from infer_patch.visual_scores import blank_scores, scores_of, text_after_pictures

QUERIES = ("instruction", "last")
RANDOM = "random"  # in place of a query: the control, a draw instead of a ranking


def counts_of(rates: Sequence[float], tokens: Tensor) -> Tensor:
    """Tokens in each layer: int64 [L, *tokens.shape] = round-half-up(r_l N), running minimum, within [0, N]."""
    exact = torch.tensor(rates, dtype=torch.float64, device=tokens.device).view(-1, *[1] * tokens.ndim) * tokens
    # 1e-9: a product that is a half up to its rounding error counts as a half
    counts = torch.floor(exact + 0.5 + 1e-9).long().cummin(0).values
    return torch.minimum(counts.clamp(min=0), tokens)


@dataclass(frozen=True)
class Schedule:
    """Keep rates of all layers, from 1 to 0, none above the one before it.

    `query` says whose attention ranks the tokens: all text behind the pictures ("instruction") or the last token.
    """

    rates: tuple[float, ...]
    query: str = "instruction"

    def drops(self) -> list[int]:
        """Layers that fewer tokens enter than the layer before."""
        return [layer for layer in range(1, len(self.rates)) if self.rates[layer] < self.rates[layer - 1]]

    @classmethod
    def of(cls, rates: Any, query: Any, first: Any, where: str, wrong: type[PlanError] = PlanError) -> Schedule:
        """Checked: `first` is the first layer that may hold less than everything; `where` begins messages."""
        if not isinstance(rates, (list, tuple)) or not rates or not all(is_rate(r) for r in rates):
            raise wrong(f"{where}: keep_rate must be a list of shares from 0 to 1, one for each layer, got {rates!r}")
        rises = [layer for layer in range(1, len(rates)) if rates[layer] > rates[layer - 1]]
        if rises:
            raise wrong(
                f"{where}: keep_rate must not rise, as dropped tokens do not return; it does at layer {rises[0]} "
                f"({rates[rises[0] - 1]} to {rates[rises[0]]})"
            )
        if not isinstance(first, int) or isinstance(first, bool) or first < 1:
            raise wrong(f"{where}: first must be a layer number from 1 up, got {first!r}")
        if any(rate != 1 for rate in rates[:first]):
            raise wrong(f"{where}: keep_rate must be 1 below layer {first}, got {list(rates[:first])}")
        if query not in QUERIES:
            raise wrong(f"{where}: query must be one of {', '.join(QUERIES)}, got {query!r}")
        return cls(tuple(float(r) for r in rates), query)


def is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value <= 1


def read_schedule(path: str | Path, method: str) -> Schedule:
    """Read a schedule file; a bare name that is no file here is looked for in `infer_patch/configs`.

    Raises
    ------
    PlanError
        Naming the file, what it holds and what was expected.
    """
    remedy = f"Make one with `infer-patch calibrate {method.replace('_', '-')}`."
    where = f"{method}: the schedule file {path}"
    values = read_json(path, "schedule file", PlanError, remedy, method)
    if not isinstance(values, dict) or not {"method", "num_layers", "first", "query", "keep_rate"} <= set(values):
        raise PlanError(
            f"{where} must hold an object with method, num_layers, first, query and keep_rate, got {str(values)[:80]}. "
            f"{remedy}"
        )
    if values["method"] != method:
        raise PlanError(f"{where} was made for {values['method']!r}, not for {method!r}. {remedy}")
    schedule = Schedule.of(values["keep_rate"], values["query"], values["first"], where)
    if values["num_layers"] != len(schedule.rates):
        raise PlanError(f"{where} holds {len(schedule.rates)} rates for {values['num_layers']!r} layers. {remedy}")
    return schedule


@dataclass(frozen=True, kw_only=True)
class ScheduledPruning(Method):
    """Options of methods that let a given number of visual tokens into each layer."""

    schedule_file: str = option("", "JSON file with the keep rates, made by `infer-patch calibrate`")
    query: str | None = option(
        None, "whose attention ranks: instruction, last; or random, the control (default: the file's)"
    )
    pool: str = option("global", "rates of all pictures together, or of each: global, per_image")

    ports = ("reduce",)
    modality = "vision"
    given: ClassVar[str] = ""  # what may be given in place of a file, in words

    def validate(self) -> None:
        self.require(self.layers is None, "the schedule says where tokens leave; leave `layers` out")
        self.require(isinstance(self.schedule_file, str), f"schedule_file must name a file, got {self.schedule_file!r}")
        queries = (*QUERIES, RANDOM)
        known = self.query is None or self.query in queries
        self.require(known, f"query must be one of {', '.join(queries)}, got {self.query!r}")
        self.require(self.pool in ("per_image", "global"), f"pool must be per_image or global, got {self.pool!r}")
        command = f"`infer-patch calibrate {self.name.replace('_', '-')}`"
        one = bool(self.schedule_file) != self.gives_rates()
        self.require(one, f"give either schedule_file (made by {command}) or {self.given}")

    def gives_rates(self) -> bool:
        """Whether the options hold the rates, so that no file is needed."""
        raise TypeError(f"{type(self).__name__} defines no gives_rates")

    def given_rates(self, layers: int) -> Schedule:
        """The schedule that the options give for a model of so many layers."""
        raise TypeError(f"{type(self).__name__} defines no given_rates")

    def schedule(self, parts: ModelParts) -> Schedule:
        """The schedule for this model."""
        named = bool(self.schedule_file)
        found = read_schedule(self.schedule_file, self.name) if named else self.given_rates(parts.num_layers)
        source = f"the schedule file {self.schedule_file}" if named else "keep_rate"
        self.require(
            len(found.rates) == parts.num_layers,
            f"{source} is for {len(found.rates)} layers, and this model has {parts.num_layers}",
        )
        return Schedule(found.rates, self.query or found.query)

    def applicable_layers(self, parts: ModelParts) -> tuple[int, ...]:
        if not parts.image_token_ids:
            raise UnsupportedModelError(
                f"{self.name} prunes visual tokens, and {parts.model_type} has none (no vision configuration with an "
                "image token id was found)."
            )
        return tuple(self.schedule(parts).drops())

    def runtime(self, parts: ModelParts, layers: tuple[int, ...]) -> Runtime:
        return _Scheduled(self, parts, layers)


class _Scheduled(Runtime):
    config: ScheduledPruning

    def __init__(self, config: ScheduledPruning, parts: ModelParts, layers: tuple[int, ...]):
        super().__init__(config, parts, layers)
        self.schedule = config.schedule(parts)
        # a judge with a window of its own may not see the pictures: take the nearest earlier layer that does
        self.judges = {
            layer: max((i for i in parts.full_attention_layers if i < layer), default=layer - 1) for layer in layers
        }
        self.observes = frozenset(() if self.schedule.query == RANDOM else self.judges.values())

    def observe(self, layer: int, call: Any) -> None:
        tokens, key = call.tokens, (self, layer)
        if key not in tokens.shared:
            tokens.shared[key] = blank_scores(tokens)
        after = text_after_pictures(tokens)
        by_instruction = self.schedule.query == "instruction"
        scores_of(call, [after[i] if by_instruction else 1 for i in call.samples], tokens.shared[key])

    def reduce(self, layer: int, tokens: Any) -> Tensor | None:
        chance = self.schedule.query == RANDOM
        scores = random_scores(tokens, seed=0) if chance else tokens.shared[self, self.judges[layer]]
        rates = self.schedule.rates[: layer + 1]
        return keep_counts(scores, tokens, lambda n: counts_of(rates, n)[-1], self.config.pool)
