"""What fewer bits in the KV cache cost: needles found, drift and bytes, for all widths and transformers' own caches.

    python benchmarks/kv_quality.py                                     # the demo language model
    python benchmarks/kv_quality.py --model MODEL --plan kv-policy.yaml # and a plan of yours, from `calibrate kv`

Every prompt is a text with a number hidden in it. The text is read first; the question comes afterwards, so that its
answer depends on what the cache kept. Drift: the question and then the unpatched answer are fed token by token, and the
next-token distributions compared with the unpatched ones (KL in nats). Sides run side by side on the same prompts.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, QuantizedCache
from transformers.cache_utils import QuantizedLayer

from infer_patch import Plan, patch
from infer_patch.errors import PatchError
from infer_patch.evals.drift import Distances, distances, pool
from infer_patch.evals.haystack import score
from infer_patch.evals.loading import load
from infer_patch.evals.needle import NeedleGrid
from infer_patch.evals.transformers_caches import BACKENDS, held_bytes, installed, layer_settings
from infer_patch.files import replace_file
from infer_patch.machine import machine
from infer_patch.patches import KVQuant

UNPATCHED = "unpatched"


@dataclass
class Side:
    """One row of the table: how to read prompts, and what came out."""

    name: str
    cache: Callable[[], Any]
    patched: Callable[[], AbstractContextManager[Any]] = nullcontext
    found: list[bool] = field(default_factory=list)
    drift: list[Distances] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def sides(model: Any, plans: list[str]) -> tuple[list[Side], dict[str, str]]:
    """All rows, and those that cannot run here with the reason."""
    own = {f"kv_quant, {bits} bits": Plan.of(KVQuant(bits=bits)) for bits in (16, 8, 4, 2)}
    own["kv_quant, keys 4, values 2"] = Plan.of(KVQuant(bits=4, value_bits=2))
    own["kv_quant, 4/2 at 42 %"] = Plan.of(KVQuant(bits=4, other_bits=2, important=0.42))
    own |= {name: Plan.of(name) for name in plans}

    def fresh() -> DynamicCache:
        return DynamicCache(config=model.config)

    rows = [Side(UNPATCHED, fresh), *(Side(name, fresh, lambda p=p: patch(model, p)) for name, p in own.items())]  # type: ignore[misc]
    skipped = {}
    for backend, package in BACKENDS.items():
        for bits in (4, 2):
            name = f"transformers {backend}, {bits} bits"
            if not installed(package):
                skipped[name] = f"the package {package} is not installed"
                continue
            settings = layer_settings(bits)
            rows.append(Side(name, lambda b=backend, s=settings: QuantizedCache(b, model.config, **s)))  # type: ignore[misc]
    return rows, skipped


def read(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits [V] after the tokens [n], which join the cache."""
    return model(input_ids=ids[None], past_key_values=cache, logits_to_keep=1).logits[0, -1]


@dataclass(frozen=True)
class Run:
    """What a side says by itself, its logits after the tokens fed [n, V], bytes of the context's cache, seconds."""

    answer: list[int]
    logits: Tensor
    size: int
    seconds: float


@torch.no_grad()
def run(model: Any, side: Side, context: Tensor, question: Tensor, forced: list[int] | None, tokens: int) -> Run:
    """Read the context, then the question, then tokens one by one: the forced ones, or else the likeliest.

    Where the side would say something else than the forced tokens, its own answer goes on from a copy of the cache.
    """
    cache, begin, apart = side.cache(), time.perf_counter(), None
    with side.patched():
        read(model, context, cache)
        size = sum(held_bytes(layer) for layer in cache.layers)
        logits, answer = [read(model, question, cache)], []
        fed = answer if forced is None else forced
        while len(logits) < tokens:
            if apart is None:
                answer.append(int(logits[-1].argmax()))
                if answer[-1] != fed[len(answer) - 1]:
                    paused, apart = time.perf_counter(), twin(cache)
                    begin += time.perf_counter() - paused
            logits.append(read(model, torch.tensor(fed[len(logits) - 1 :][:1], device=question.device), cache))
        seconds, last = time.perf_counter() - begin, logits[-1]
        while len(answer) < tokens:
            if apart is not None:
                last = read(model, torch.tensor(answer[-1:], device=question.device), apart)
            answer.append(int(last.argmax()))
    return Run(answer, torch.stack(logits).float().cpu(), size, seconds)


def twin(cache: Any) -> Any:
    """A copy of a cache that grows by itself."""
    copied = copy.copy(cache)
    copied.layers = [_twin_layer(layer) for layer in cache.layers]
    return copied


def _twin_layer(layer: Any) -> Any:
    """Layers of transformers' quantised caches hold tensors that cannot be copied, and never write into one. Ours name
    the method that made them, which is not copied."""
    if isinstance(layer, QuantizedLayer):
        return copy.copy(layer)
    maker = getattr(layer, "made_by", None)
    return copy.deepcopy(layer, {} if maker is None else {id(maker): maker})


def measure(model: Any, tokenizer: Any, rows: list[Side], task: NeedleGrid, say: Callable[[str], None]) -> None:
    """Fill the rows: every prompt on every side before the next prompt."""
    items = task.items(tokenizer, model)
    for number, item in enumerate(items):
        ids = torch.tensor(item.prompt.input_ids, device=model.device)
        asked = item.prompt.question_tokens
        if asked is None:
            raise PatchError(f"the question of {item.name} has no tokens of its own in this model's template.")
        context, question = ids[:-asked], ids[-asked:]
        reference: Run | None = None
        for side in rows:
            say(f"{number + 1} of {len(items)}: {item.name}, {side.name}")
            forced = None if reference is None else reference.answer
            found = run(model, side, context, question, forced, task.max_new_tokens)
            reference = found if reference is None else reference
            side.drift.append(distances(reference.logits, found.logits))
            side.found.append(score(tokenizer.decode(found.answer), item.reference))
            side.held.append(found.size)
            side.seconds.append(found.seconds)


def results(rows: list[Side]) -> list[dict[str, Any]]:
    """One entry for each row."""
    whole = sum(rows[0].held)
    return [
        {
            "side": side.name,
            "needles": [sum(side.found), len(side.found)],
            "drift": pool(side.drift),
            "cache_bytes": side.held,
            "times_smaller": round(whole / sum(side.held), 3),
            "seconds_mean": round(fmean(side.seconds), 3),
        }
        for side in rows
    ]


def show(found: list[dict[str, Any]], skipped: dict[str, str], console: Console) -> None:
    table = Table("cache", *(("needles", "KL mean", "KL p99", "top-1", "MB", "smaller")), box=None)
    for row in found:
        drift, (good, asked) = row["drift"], row["needles"]
        mega = fmean(row["cache_bytes"]) / 1e6
        cells = f"{good} / {asked}", f"{drift['kl_mean']:.5f}", f"{drift['kl_p99']:.4f}", f"{drift['top1']:.1%}"
        table.add_row(row["side"], *cells, f"{mega:.2f}", f"{row['times_smaller']:.2f} x")
    console.print(table)
    for name, reason in skipped.items():
        console.print(f"Not run: {name} ({reason}).", highlight=False)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--plan", action="append", default=[], help="one more row; may be given again")
    parser.add_argument("--lengths", default="1000,2000,3000")
    parser.add_argument("--depths", default="0,0.25,0.5,0.75,1")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="file for the result")
    given = parser.parse_args(arguments)
    console = Console()
    model, tokenizer = load(given.model, given.device, given.dtype)
    lengths = tuple(int(x) for x in given.lengths.split(","))
    depths = tuple(float(x) for x in given.depths.split(","))
    task = NeedleGrid(lengths=lengths, depths=depths, repeats=given.repeats)
    rows, skipped = sides(model, given.plan)
    measure(
        model, tokenizer, rows, task, lambda text: console.print(text, style="dim") if sys.stdout.isatty() else None
    )
    found = results(rows)
    show(found, skipped, console)
    if given.json:
        settings = {name: str(value) for name, value in vars(given).items() if name != "json"}
        document = {"benchmark": "kv_quality", "schema": 1, "settings": settings, "results": found, "skipped": skipped}
        replace_file(given.json, (json.dumps({**document, "machine": machine()}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
