"""The schema of result files, as typed dictionaries. `infer_patch.evals.results` says which file holds what."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

SCHEMA = 1


class ModelFacts(TypedDict):
    """The model of a run. `id` is what the user called it; a folder counts by its name only."""

    id: str
    type: str
    dtype: str
    device: str
    attention: str
    layers: int
    parameters: int
    weights_bytes: int


class Manifest(TypedDict):
    """`manifest.json`. `error` says why a run failed; `seconds` and the final `status` are filled in at its end."""

    schema: int
    kind: str
    status: Literal["running", "done", "failed"]
    error: str | None
    started: str
    seconds: float | None
    command: str
    git: str | None
    seed: int
    settings: dict[str, Any]
    model: ModelFacts
    machine: dict[str, Any]
    plans: list[dict[str, Any]]


class TokenDrift(TypedDict):
    """Teacher-forced on the unpatched greedy output; KL(unpatched || this run) in nats per token.

    `top1` is the share of tokens where both runs rank the same token first, `max_logit_gap` the largest difference of
    any logit. `tokens` counts what the figures were taken over.
    """

    tokens: int
    kl_mean: float
    kl_p99: float
    top1: float
    max_logit_gap: float


class Flags(TypedDict):
    """Facts about one output.

    `finished`: the model ended it itself. `found`: the answer is in it (None: there is none to look for). `identical`:
    its tokens are those of the unpatched run. `fired`: every method took effect (None: there is no method).
    """

    finished: bool
    found: bool | None
    identical: bool
    fired: bool | None


class Sample(TypedDict):
    """One row of `samples.jsonl`. `first_difference` is the first output token (from 0) that is not the unpatched
    one, `same_text` the number of characters before it, `effect` a `Report.to_dict()`."""

    plan: str
    prompt: str
    prompt_hash: str
    prompt_text: str
    prompt_tokens: int
    answer: str | None
    output: str
    output_ids: list[int]
    first_difference: int | None
    same_text: int
    flags: Flags
    drift: TokenDrift | None
    effect: dict[str, Any] | None


class Interval(TypedDict):
    """Median, 20th and 80th percentile and range of `n` measurements."""

    median: float
    p20: float
    p80: float
    low: float
    high: float
    n: int


class Cost(TypedDict):
    """Cost over prompts of nearly one length; `prompt_tokens` is the median. Seconds and bytes.

    `peak_bytes` is memory above what was there before the run: exact on a GPU, on a CPU the growth of the process
    (`peak_is_rough`). `cache_bytes` is counted from the tensors of the cache after the run. Ratios are to unpatched.
    """

    prompt_tokens: int
    output_tokens: int
    first_token_s: Interval
    per_token_s: Interval | None
    first_token_ratio: float | None
    per_token_ratio: float | None
    peak_bytes: Interval | None
    peak_is_rough: bool
    cache_bytes: int


class Count(TypedDict):
    """`of` prompts, and on how many of them something held."""

    count: int
    of: int


class Effect(TypedDict):
    """What one method did: on how many prompts it fired, and its figures on the longest of those."""

    method: str
    fired: Count
    words: str
    figures: dict[str, Any]


class Row(TypedDict):
    """One row of `summary.json`.

    `status`: "ok"; "dense" for a plan that was allowed to leave every layer as it is, and did; "failed" for a plan of
    which a method never took effect; "reference" for the unpatched run and its controls. `what` is the plan in a line.
    """

    name: str
    what: str
    role: Literal["unpatched", "plan", "control"]
    status: Literal["ok", "dense", "failed", "reference"]
    verdict: str
    note: str
    found: Count | None
    identical: Count | None
    earliest_difference: int | None
    drift: TokenDrift | None
    cost: list[Cost]
    effect: list[Effect]


class AttentionChange(TypedDict):
    """A token's share of the attention of the prompt's last token."""

    token: int
    text: str
    before: float
    after: float


class AttentionView(TypedDict):
    """One head on the first prompt, before and after a plan. `problem`: why there is none, else None.

    `moved` and `moved_last` are the shares of attention that went elsewhere: the mean over all rows, and of the last.
    """

    plan: str
    prompt: str
    layer: int
    head: int
    file: str | None
    moved: float | None
    moved_last: float | None
    changes: list[AttentionChange]
    problem: str | None


class _Attention(TypedDict, total=False):
    attention: list[AttentionView]  # where a head was asked for


class Summary(_Attention):
    """`summary.json`: the unpatched run, the plans, and the controls, in this order."""

    schema: int
    title: str
    prompts: int
    rounds: int
    drift_prompts: int
    rows: list[Row]


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
