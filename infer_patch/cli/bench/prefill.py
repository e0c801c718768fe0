"""`infer-patch bench prefill`: attention of a whole prompt, dense against sparse."""

from __future__ import annotations

from typing import Annotated

import typer

from infer_patch.cli.bench import attention_options as option
from infer_patch.cli.bench.attention_run import run
from infer_patch.cli.common import Device


def prefill(
    plan: option.Plans = None,
    lengths: option.Lengths = "2048,8192,32768",
    heads: option.Heads = 9,
    kv_heads: option.KvHeads = 3,
    head_dim: option.HeadDim = 64,
    batch: option.Batch = 1,
    dtype: option.Dtype = "auto",
    device: Device = "auto",
    rounds: option.Rounds = 9,
    budget: option.Budget = None,
    keep: option.Keep = None,
    force: option.Force = False,
    flex: Annotated[bool, typer.Option("--flex", help="Time flex_attention over the same lists; it compiles.")] = False,
    layers: option.Layers = 32,
    layer: option.Layer = None,
    threads: option.Threads = None,
    clock: option.Clock = "wall",
    seed: option.Seed = 0,
    out: option.Json = None,
) -> None:
    """Time the attention of a whole prompt alone: plans, choice of blocks included, against dense SDPA.

    Queries, keys and values are random: right for time, meaningless for quality (see `bench recall`).
    """
    run("prefill", locals())
