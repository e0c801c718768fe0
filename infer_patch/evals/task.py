"""What an evaluation is made of: items to answer, a rule that scores an answer, and metrics over scored rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypedDict

from infer_patch.evals.generation import BatchTrace, collate, generate_batch
from infer_patch.evals.prompts import Prompt


@dataclass(frozen=True)
class Item:
    """One thing to answer.

    Parameters
    ----------
    name : str
        Stable and unique inside a task: an interrupted run goes on by these names.
    prompt : Prompt
    reference : JSON value
        What the answer is scored against.
    group : str
        Items of one group are not independent (they share a picture, or a text): intervals are clustered by it.
    facts : mapping of JSON values
        What tables are split by: the splits of a question, the depth and length of a needle.
    """

    name: str
    prompt: Prompt
    reference: Any
    group: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


class Scored(TypedDict):
    """One answered item, as metrics see it."""

    item: str
    group: str
    reference: Any
    facts: Mapping[str, Any]
    output: str
    score: Mapping[str, Any]


class Task(ABC):
    """An evaluation: `items` are answered greedily by every plan, `score` judges one answer, `metrics` all of them.

    A task is a dataclass of plain values (its settings go into the manifest) and draws everything from its seed. Runs
    are compared by `value` of their scores: a share of right ("share"), or a loss in nats per token ("nats").
    """

    name: ClassVar[str]
    title: ClassVar[str]
    headline: ClassVar[str]  # the metric a table shows first; one of `metrics`
    unit: ClassVar[Literal["share", "nats"]] = "share"
    through_cache: ClassVar[bool] = True  # False: answers are read off the prefill, so a cache method shows no loss
    max_new_tokens: int
    chat: bool | None = None  # None: the chat template where there is one

    @abstractmethod
    def items(self, processor: Any, model: Any) -> list[Item]:
        """All items, in the same order for equal settings. Raises `PatchError` where this model cannot take them."""

    @abstractmethod
    def score(self, item: Item, output: str) -> dict[str, Any]:
        """Plain values that judge one output; `value` reads "correct" (bool, or a share from 0 to 1) by default."""

    def answer(self, model: Any, inputs: list[dict[str, Any]], pad_token_id: int, max_new_tokens: int) -> BatchTrace:
        """Answer one batch: greedy, unless a task reads something else off the model."""
        return generate_batch(model, collate(inputs, pad_token_id), max_new_tokens)

    def value(self, score: Mapping[str, Any]) -> float:
        """The number that runs are compared by, item by item."""
        return float(score["correct"])

    def weight(self, facts: Mapping[str, Any]) -> float:
        """How many rows of the benchmark an item stands for, so that paired differences match the headline."""
        return 1.0

    @abstractmethod
    def metrics(self, rows: Sequence[Scored]) -> dict[str, float]:
        """Metrics by name, headline included; shares are from 0 to 1."""

    def grid(self, rows: Sequence[Scored]) -> tuple[dict[str, list[Any]], list[list[float | None]]] | None:
        """Axes ("y" and "x", with labels) and mean score per cell, for tasks that are read as a heat map."""
        return None
