"""The schema of result files, as typed dictionaries. `infer_patch.evals.results` says which file holds what.

Samples and summaries of evaluations are in `eval_schema`.
"""

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
