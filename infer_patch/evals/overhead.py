"""What patches cost in time: unpatched against patched, interleaved, prefill and decode apart.

Twins of the model share its weights: one is left alone, the control is left alone too, and each plan patches one. Every
round times a prefill and then every decode step on all of them, one after the other, in an order that changes from
round to round (with one plan through all six permutations). Each prefill and each step gives one ratio to unpatched; a
slow spell of the machine hits all and cancels. The control's ratios should be 1: what they differ from it is the noise
floor, and a verdict finer than that is not given.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from infer_patch.api import patch
from infer_patch.errors import PatchError
from infer_patch.evals.cost import turned
from infer_patch.plan import Plan

GOAL = 0.02  # the identity plan may cost this share of the time at most
UNPATCHED, CONTROL = "unpatched", "control"
PHASES = ("prefill", "decode")

Times = dict[str, list[float]]  # side -> seconds of each measurement


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Parameters
    ----------
    lengths : tuple of int
        Prompt lengths in tokens, batch size 1.
    new_tokens : int
        Decode steps after each prefill.
    rounds : int
        Rounds per length, after one for warming up; with one plan, multiples of six balance the order.
    clock : {"wall", "cpu"}
        "cpu" counts the processor time of this process: on a busy CPU it leaves out the wait for a free core.
    seed : int
        Of the tokens. All runs of a length read and decode the same ones.
    """

    lengths: tuple[int, ...] = (512, 2048)
    new_tokens: int = 16
    rounds: int = 12
    clock: str = "wall"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise PatchError(f"lengths must be one or more prompt lengths in tokens, got {self.lengths}")
        if self.new_tokens < 1 or self.rounds < 1:
            raise PatchError(f"need 1 or more new tokens and rounds, got {self.new_tokens} and {self.rounds}")

        if self.clock not in ("wall", "cpu"):
            raise PatchError(f"clock must be wall or cpu, got {self.clock!r}")

    @property
    def all_rounds(self) -> int:
        """Rounds over all lengths, warm-up included."""
        return len(self.lengths) * (self.rounds + 1)


def measure(
    model: nn.Module,
    plans: Sequence[Plan],
    settings: Settings,
    on_round: Callable[[int, int], None] | None = None,
    tokens: Tensor | None = None,
) -> list[dict[str, Any]]:
    """One entry per length, phase and plan: times, ratios of the plan and of the control, a verdict, what the plan did.

    Parameters
    ----------
    model : PreTrainedModel
        Unpatched; it is not changed.
    on_round : callable, optional
        Called before each round with the number of rounds done and of all.
    tokens : int64 Tensor [n], optional
        The text to read and then decode from its start, instead of random token ids.

    Raises
    ------
    PatchError
        Before anything is timed: for plans of one name, for lengths beyond the context of the model or the text, and
        for a clock that cannot see the device.
    """
    needed = max(settings.lengths) + settings.new_tokens
    _check_context(model, needed)
    if settings.clock == "cpu" and next(model.parameters()).device.type != "cpu":
        raise PatchError("the cpu clock does not see the work of a GPU; measure with clock wall.")
    if tokens is not None and tokens.numel() < needed:
        raise PatchError(f"the text has {tokens.numel()} tokens, {needed} are needed.")
    names = [plan.name for plan in plans]
    if not names or len({UNPATCHED, CONTROL, *names}) < len(names) + 2:
        raise PatchError(f"give plans of different names, none {UNPATCHED!r} or {CONTROL!r}; got {', '.join(names)}")
    twins = {side: twin(model) for side in (UNPATCHED, *names, CONTROL)}
    done = itertools.count()

    def tick() -> None:
        if on_round is not None:
            on_round(next(done), settings.all_rounds)

    results = []
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore", UserWarning)  # a method that never fired is in the result
        handles = {plan.name: stack.enter_context(patch(twins[plan.name], plan)) for plan in plans}
        for length in settings.lengths:
            times = _rounds(twins, length, settings, tokens, tick)
            reports = {name: handle.report(reset=True) for name, handle in handles.items()}
            for phase, plan in itertools.product(PHASES, plans):
                goal = None if plan.methods else GOAL
                result = {"length": length, "phase": phase, "plan": plan.name}
                result |= summarise(times[phase], plan.name, goal)
                report = reports[plan.name]
                results.append({**result, "never_fired": report.silent, "effect": report.methods})
    return results


def twin(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same weights."""
    weights = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in weights})


@torch.no_grad()
def _rounds(
    twins: dict[str, nn.Module], length: int, settings: Settings, tokens: Tensor | None, tick: Callable[[], None]
) -> dict[str, Times]:
    """Seconds per phase and side; calls `tick` before each round."""
    ids = _random_ids(twins[UNPATCHED], length + settings.new_tokens, settings.seed)
    if tokens is not None:
        ids = tokens[None, : ids.shape[1]].to(ids)
    now = _clock(settings.clock, ids.device)
    times: dict[str, Times] = {phase: {side: [] for side in twins} for phase in PHASES}
    for number in range(settings.rounds + 1):
        tick()
        caches: dict[str, Any] = dict.fromkeys(twins)
        for position in [0, *range(length, length + settings.new_tokens)]:
            phase, stop = ("decode", position + 1) if position else ("prefill", length)
            for side in turned(list(twins), number):
                begin = now()
                output = twins[side](
                    input_ids=ids[:, position:stop], past_key_values=caches[side], use_cache=True, logits_to_keep=1
                )
                seconds = now() - begin
                caches[side] = output.past_key_values
                if number > 0:  # the first round warms up
                    times[phase][side].append(seconds)
    return times


def summarise(seconds: Times, plan: str, goal: float | None) -> dict[str, Any]:
    """Milliseconds of one plan, unpatched and the control, and ratios to unpatched, measurement by measurement."""
    sides = {UNPATCHED: seconds[UNPATCHED], "patched": seconds[plan], CONTROL: seconds[CONTROL]}
    ratios = {side: [t / u for t, u in zip(sides[side], sides[UNPATCHED])] for side in ("patched", CONTROL)}
    milliseconds = {side: [1000 * t for t in values] for side, values in sides.items()}
    return {
        "measurements": len(sides[UNPATCHED]),
        "milliseconds": {side: spread(values, 3) for side, values in milliseconds.items()},
        "ratio": {side: spread(values, 4) for side, values in ratios.items()},
        "ratio_of_sums": {side: round(sum(sides[side]) / sum(sides[UNPATCHED]), 4) for side in ratios},
        "verdict": verdict(ratios["patched"], ratios[CONTROL], goal),
        "raw_milliseconds": {side: [round(t, 3) for t in values] for side, values in milliseconds.items()},
    }


def spread(values: list[float], digits: int) -> dict[str, float]:
    """Median, 20th and 80th percentile, and the range that holds the true median with 95 % confidence."""
    ordered = sorted(values)
    low, high = median_interval(ordered)
    found = {"p20": quantile(ordered, 0.2), "median": quantile(ordered, 0.5), "p80": quantile(ordered, 0.8)}
    return {key: round(value, digits) for key, value in {**found, "median_low": low, "median_high": high}.items()}


def quantile(ordered: list[float], share: float) -> float:
    """Linear interpolation between the order statistics."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def median_interval(ordered: list[float]) -> tuple[float, float]:
    """95 % confidence interval of the median from order statistics (no assumption on the shape of the noise).

    Below six values no interval reaches 95 %: the ends are given.
    """
    n, tail, skip = len(ordered), 0.0, 0
    while skip < n // 2:
        tail += math.comb(n, skip) / 2**n  # chance that at most `skip` values lie below the true median
        if tail > 0.025:
            break
        skip += 1
    skip = max(skip - 1, 0)
    return ordered[skip], ordered[n - 1 - skip]


def verdict(patched: list[float], control: list[float], goal: float | None) -> str:
    """What these ratios can tell: goal met or missed (no goal: faster or slower), or undecided and why."""
    if len(patched) < 6:
        return "undecided: fewer than 6 measurements"
    control_low, control_high = median_interval(sorted(control))
    if not control_low <= 1 <= control_high:
        return f"undecided: unpatched differs from itself by {statistics.median(control) - 1:+.1%}"
    low, high = median_interval(sorted(patched))
    limit = 1 + (goal or 0)
    if high <= limit:
        return "faster" if goal is None else "met"
    if low > limit:
        return "slower" if goal is None else "missed"
    return f"undecided: the median lies between {low - 1:+.1%} and {high - 1:+.1%}; take more rounds"


def tiny_model() -> Any:
    """A miniature with random weights, to try the command in a second."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    return model.eval()


def _clock(name: str, device: torch.device) -> Callable[[], float]:
    """Seconds, once all work so far is done."""
    if device.type != "cuda":
        return time.process_time if name == "cpu" else time.perf_counter

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised


def _random_ids(model: Any, count: int, seed: int) -> Tensor:
    config = model.config.get_text_config()
    placeholders = [getattr(model.config, name, None) for name in ("image_token_id", "video_token_id")]
    ids = torch.randint(0, config.vocab_size, (1, count), generator=torch.Generator().manual_seed(seed))
    for placeholder in placeholders:  # a text-only call must not name pictures
        if placeholder is not None:
            ids[ids == placeholder] = 0 if placeholder else 1
    return ids.to(model.get_input_embeddings().weight.device)


def _check_context(model: Any, tokens: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise PatchError(f"{tokens} tokens are more than the {limit} this model takes; give shorter --lengths.")
