"""`infer-patch bench decode`: attention of new tokens, one by one, dense against sparse."""

from __future__ import annotations

from typing import Annotated

import typer

from infer_patch.cli.bench import attention_options as option
from infer_patch.cli.bench.attention_run import run
from infer_patch.cli.common import Device


def decode(
    plan: option.Plans = None,
    lengths: option.Lengths = "2048,8192,32768",
    heads: option.Heads = 9,
    kv_heads: option.KvHeads = 3,
    head_dim: option.HeadDim = 64,
    batch: option.Batch = 1,
    dtype: option.Dtype = "auto",
    device: Device = "auto",
    rounds: option.Rounds = 9,
    steps: Annotated[int, typer.Option(help="Consecutive steps timed together, after a first one that is apart.")] = 16,
    with_cache: Annotated[
        bool,
        typer.Option(
            "--with-cache",
            help="Time the cache's update too, dense attention with transformers' growing cache. Its quantised caches "
            "join where quanto or hqq is installed.",
        ),
    ] = False,
    budget: option.Budget = None,
    keep: option.Keep = None,
    force: option.Force = False,
    layers: option.Layers = 32,
    layer: option.Layer = None,
    threads: option.Threads = None,
    clock: option.Clock = "wall",
    seed: option.Seed = 0,
    out: option.Json = None,
) -> None:
    """Time the attention of one new token at a time against many keys: plans, choice of blocks included, and dense.

    What a method builds in its first step (bounds of all blocks, say) and refreshes later is part of it: the first step
    is shown apart, the others are averaged.
    """
    run("decode", locals())
