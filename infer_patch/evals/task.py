"""What an evaluation is made of: items to answer, a rule that scores an answer, and metrics over scored rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict

from infer_patch.evals.generation import BatchTrace, collate, generate_batch
from infer_patch.evals.prompts import Prompt

if TYPE_CHECKING:
    from infer_patch.evals.eval_schema import EvalRow


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


@dataclass(frozen=True)
class Batch:
    """What a run answers at once.

    Parameters
    ----------
    inputs : list of mappings
        What `generate` takes, for each prompt alone.
    pad_token_id : int
    max_new_tokens : int
    question_tokens : int
        So many tokens at the end are fed after everything before them is in the cache; 0 feeds the prompt whole.
    reference : anything
        What `Task.reference` found.
    """

    inputs: list[dict[str, Any]]
    pad_token_id: int
    max_new_tokens: int
    question_tokens: int = 0
    reference: Any = None


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
    tolerance: ClassVar[float] = 0.0  # a loss of value up to here is reported, and not called worse
    answers_prompts: ClassVar[bool] = True  # False: a task of this kind measures something else than answers
    other_backend: ClassVar[bool] = False  # is the unpatched model on another SDPA backend a control worth having?
    max_new_tokens: int
    chat: bool | None = None  # None: the chat template where there is one

    @abstractmethod
    def items(self, processor: Any, model: Any) -> list[Item]:
        """All items, in the same order for equal settings. Raises `PatchError` where this model cannot take them."""

    @abstractmethod
    def score(self, item: Item, output: str) -> dict[str, Any]:
        """Plain values that judge one output; `value` reads "correct" (bool, or a share from 0 to 1) by default."""

    def reference(self, model: Any, batch: Batch) -> Any:
        """What `answer` is to know of the unpatched model's answers; asked once per batch, before all runs."""
        return None

    def answer(self, model: Any, batch: Batch) -> BatchTrace:
        """Answer one batch: greedy, unless a task reads something else off the model."""
        inputs = collate(batch.inputs, batch.pad_token_id)
        return generate_batch(model, inputs, batch.max_new_tokens, batch.question_tokens)

    def value(self, score: Mapping[str, Any]) -> float:
        """The number that runs are compared by, item by item."""
        return float(score["correct"])

    def right(self, score: Mapping[str, Any]) -> bool | None:
        """Whether an answer counts as right, for flips; None where it can be neither."""
        return self.value(score) >= 0.5 if self.unit == "share" else None

    def quality(self, row: EvalRow, unpatched: EvalRow) -> str | None:
        """Words on quality for a verdict, where the usual ones do not fit."""
        return None

    def weight(self, facts: Mapping[str, Any]) -> float:
        """How many rows of the benchmark an item stands for, so that paired differences match the headline."""
        return 1.0

    @abstractmethod
    def metrics(self, rows: Sequence[Scored]) -> dict[str, float]:
        """Metrics by name, headline included; shares are from 0 to 1."""

    def grid(self, rows: Sequence[Scored]) -> tuple[dict[str, list[Any]], list[list[float | None]]] | None:
        """Axes ("y" and "x", with labels) and mean score per cell, for tasks that are read as a heat map."""
        return None
