"""The schema of an evaluation's result files, as typed dictionaries."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

from infer_patch.evals.schema import Count, Effect, Interval


class EvalSample(TypedDict):
    """One row of an evaluation's `samples.jsonl`: one item answered by one run.

    `batch` numbers the batch that it ran in; times and `cache_bytes` are those of the whole batch. `fired`: every
    method of the plan took effect in it (None: there is no method). `effect` stands in the first row of a batch only.
    `left_at` stands in the rows of a few examples, for plans that drop visual tokens: for each picture, and each of its
    tokens in order, the layer that was the first to run without it, or None where it stayed to the end.
    """

    plan: str
    item: str
    batch: int
    group: str
    reference: Any
    facts: dict[str, Any]
    prompt_hash: str
    prompt_tokens: int
    output: str
    output_tokens: int
    score: dict[str, Any]
    first_token_s: float
    per_token_s: float | None
    cache_bytes: int
    fired: bool | None
    effect: dict[str, Any] | None
    left_at: list[list[int | None]] | None


class PairedDifference(TypedDict):
    """See `infer_patch.evals.statistics.Paired`."""

    difference: float
    low: float
    high: float
    lost: int
    won: int
    p_value: float | None
    groups: int


class EvalCost(TypedDict):
    """Over batches; ratios are to the unpatched run of the same batch. `prompt_tokens` are the shortest and the longest
    prompt, `cache_bytes` is a mean over batches, `output_tokens` one over items."""

    prompt_tokens: list[int]
    batches: int
    first_token_s: Interval
    first_token_ratio: Interval | None
    per_token_s: Interval | None
    per_token_ratio: Interval | None
    cache_bytes: float
    output_tokens: float


class EvalRow(TypedDict):
    """One row of an evaluation's summary. `items` may be fewer for the control than for the rest.

    `identical` counts the items with the same output and the same score as unpatched. `status`: "worse" where the
    paired difference speaks for a loss; "failed" for a plan of which a method never took effect.
    """

    name: str
    what: str
    role: Literal["unpatched", "plan", "control"]
    status: Literal["ok", "worse", "failed", "reference"]
    verdict: str
    items: int
    metrics: dict[str, float]
    paired: PairedDifference | None
    identical: Count | None
    cost: EvalCost
    effect: list[Effect]


class KeptTokens(TypedDict):
    """What a plan kept of an example's `tokens` visual tokens, and how many left at which layer. `pictures` are files
    with the dropped ones darkened, None where the tokens of a picture form no single grid."""

    kept: int
    tokens: int
    left: dict[str, int]
    pictures: list[str | None]


class Example(TypedDict):
    """An item of which the page shows what plans kept of its pictures; files are named relative to the folder."""

    item: str
    group: str
    question: str
    pictures: list[str]
    not_shown: int
    plans: dict[str, KeptTokens]


class EvalSummary(TypedDict):
    """`summary.json` of an evaluation.

    `question_last`: runs read the question after all before it was in the cache. `grids` are mean scores per cell by
    run, for tasks that are read as heat maps.
    """

    schema: int
    task: str
    title: str
    headline: str
    unit: Literal["share", "nats"]
    items: int
    groups: int
    tokens: Interval
    cache_exercised: bool
    question_last: bool
    rows: list[EvalRow]
    grids: dict[str, list[list[float | None]]] | None
    grid_axes: dict[str, list[Any]] | None
    examples: list[Example]
