"""G-Search: the fewest visual tokens per layer that keep the quality, searched once per model (arXiv 2412.00556)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from infer_patch.keep_schedule import QUERIES, Schedule, ScheduledPruning
from infer_patch.method import option, register

FIRST = 1  # the earliest layer that inline rates may shorten: layer 0 has no judge


@register("g_search")
@dataclass(frozen=True, kw_only=True)
class GSearch(ScheduledPruning):
    """Each layer gets its own number of visual tokens; attention of the layer before ranks them, dropped ones stay out.

    Layers rank visual tokens almost alike, and deep ones need fewer than shallow ones. So only the numbers must be
    found, from shallow to deep, each as small as the quality allows: `infer-patch calibrate g-search` does, and writes
    them as rates, which hold for any number of visual tokens. Real dropping, in prefill; positions of the survivors
    stay; text is never touched. Tokens dropped in one turn are gone in the next.

    Parameters
    ----------
    schedule_file : str
        JSON file with `keep_rate`, made for a model with as many layers by `infer-patch calibrate g-search`. A bare
        name that is no file here is looked for among those that ship with the package.
    keep_rate : tuple of float
        The rates themselves, one per layer, from 1 down, in place of a file.
    query : {"instruction", "last", "random"}, optional
        Whose attention ranks: the mean over all text behind the last picture, or the last token as in FastV. Default:
        what the file was made with; "instruction" for inline rates. "random" draws instead: the control.
    pool : {"global", "per_image"}
        Rates of all visual tokens of a sample together, or of each picture.

    References
    ----------
    Zhao et al., "Accelerating Multimodal Large Language Models by Searching Optimal Vision Token Reduction",
    arXiv 2412.00556, CVPR 2025.
    """

    keep_rate: tuple[float, ...] = option((), "share of the visual tokens that enters each layer, instead of a file")

    paper = "arXiv 2412.00556"
    summary = "a number of visual tokens for each layer, searched once per model for equal quality"
    artifact = "a schedule file (infer-patch calibrate g-search)"
    given = "keep_rate, one share for each layer"

    def validate(self) -> None:
        super().validate()
        if self.keep_rate:
            Schedule.of(self.keep_rate, QUERIES[0], FIRST, self.name)

    def gives_rates(self) -> bool:
        return len(self.keep_rate) > 0

    def given_rates(self, layers: int) -> Schedule:
        return Schedule(tuple(float(r) for r in self.keep_rate), QUERIES[0])


def search(
    quality: Callable[[tuple[int, ...]], float],
    layers: int,
    tokens: int,
    least_quality: float,
    first: int = 2,
    grid: int = 1,
    group: int = 1,
    least: int = 0,
    confirm: int = 0,
) -> tuple[int, ...]:
    """Greedy search of m_0 >= ... >= m_{L-1}, from shallow to deep: each the least that keeps the quality.

    A trial gives all deeper layers the number under test, because tokens that are gone stay gone. Where quality only
    falls with fewer tokens, the result is the least in every layer at once, so for every cost that grows with them.

    Parameters
    ----------
    quality : callable
        Takes a number of tokens for each layer; that of all `tokens` everywhere is taken as good enough.
    least_quality : float
        What a trial must reach.
    first : int
        First layer that may hold less than everything.
    grid : int
        Numbers are `least`, then multiples of this, then `tokens`.
    group : int
        So many layers in a row share a number.
    confirm : int
        So many further, smaller numbers are tried where one is rejected: real measures are noisy.
    """
    candidates = sorted({least, *range(grid * (least // grid + 1), tokens, grid), tokens})
    found = [tokens] * first
    for layer in range(first, layers, group):

        def good(index: int, found: Sequence[int] = found, layer: int = layer) -> bool:
            return quality((*found, *[candidates[index]] * (layers - layer))) >= least_quality

        low, high = 0, candidates.index(found[-1]) if found else len(candidates) - 1
        while low < high:  # candidates[high] is good
            middle = (low + high) // 2
            if good(middle):
                high = middle
                continue
            below = range(middle - 1, max(middle - 1 - confirm, low - 1), -1)
            rescued = next((index for index in below if good(index)), None)
            if rescued is None:
                low = middle + 1
            else:
                high = rescued
        found = [*found, *[candidates[high]] * min(group, layers - layer)]
    return tuple(found)
