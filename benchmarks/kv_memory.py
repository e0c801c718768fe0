"""What a cache in few bits saves in memory: bytes of the cache and peak memory of the process, a fresh one per side.

    python benchmarks/kv_memory.py --length 8000

A long text is read in chunks, then tokens are generated. Cache: bytes in use at the end, and the most that its tensors
had allocated after any call. Process (Linux only): resident memory before the text, and its peak from there on, weights
and activations included; a peak lies within a call, so it holds what attention dequantises for one layer, too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from kv_quality import UNPATCHED, Side, read, sides
from rich.console import Console
from rich.table import Table
from torch import Tensor

from infer_patch.errors import PatchError
from infer_patch.evals.loading import load
from infer_patch.evals.needle import NeedleGrid
from infer_patch.evals.transformers_caches import held_bytes, tensors_in
from infer_patch.files import replace_file
from infer_patch.machine import machine

_OWN = ("infer_patch.packed_", "infer_patch.kernels.")  # modules whose objects hold tensors of a cache
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def allocated_bytes(cache: Any) -> int:
    """Bytes of all memory behind the tensors of a cache, places allocated ahead included; shared memory once."""
    found = {}
    for layer in cache.layers:
        for x in tensors_in(vars(layer), _OWN):
            storage = x.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def resident(field: str) -> int | None:
    """`VmRSS` (now) or `VmHWM` (peak) of this process in bytes; None where the system does not tell."""
    if not _STATUS.exists():
        return None
    rows = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(rows[field].split()[0]) * 1024


def reset_peak() -> bool:
    """Let the peak of this process start anew; False where that cannot be done."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


@torch.no_grad()
def long_run(model: Any, side: Side, ids: Tensor, chunk: int, tokens: int) -> dict[str, int | None]:
    """Read ids [n] in chunks, generate, and tell what memory that took."""
    before = resident("VmRSS") if reset_peak() else None
    cache, most = side.cache(), 0
    with side.patched():
        for part in ids.split(chunk):
            last = read(model, part, cache)
            most = max(most, allocated_bytes(cache))
        for _ in range(tokens):
            last = read(model, last.argmax()[None], cache)
            most = max(most, allocated_bytes(cache))
        held = sum(held_bytes(layer) for layer in cache.layers)
    peak = None if before is None else resident("VmHWM")
    return {"cache_bytes": held, "allocated_bytes": most, "rss_before": before, "rss_peak": peak}


def one_side(given: argparse.Namespace) -> dict[str, int | None]:
    """Measure the side named in the arguments, in this process."""
    model, tokenizer = load(given.model, "cpu", given.dtype)
    rows, _ = sides(model, given.plan)
    side = next((row for row in rows if row.name == given.side), None)
    if side is None:
        raise PatchError(f"no side is called {given.side!r}; there are: {', '.join(row.name for row in rows)}")
    item = NeedleGrid(lengths=(given.length,), depths=(0.5,)).items(tokenizer, model)[0]
    return long_run(model, side, torch.tensor(item.prompt.input_ids), given.chunk, given.tokens)


def show(found: dict[str, dict[str, int | None]], console: Console) -> None:
    table = Table("cache", *(("MB in use", "allocated", "process before", "peak", "growth")), box=None)
    for name, row in found.items():
        before, peak = row["rss_before"], row["rss_peak"]
        growth = None if before is None or peak is None else peak - before
        shown = row["cache_bytes"], row["allocated_bytes"], before, peak, growth
        table.add_row(name, *("not told" if x is None else f"{x / 1e6:.1f}" for x in shown))
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--plan", action="append", default=[], help="one more row; may be given again")
    parser.add_argument("--length", type=int, default=7800, help="tokens of the text")
    parser.add_argument("--chunk", type=int, default=512, help="tokens read at a time")
    parser.add_argument("--tokens", type=int, default=200, help="tokens generated")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--only", action="append", default=[], help="these rows only; may be given again")
    parser.add_argument("--side", help="measure this row only, here, and print it as JSON")
    given = parser.parse_args(arguments)
    if given.side is not None:
        sys.stdout.write(json.dumps(one_side(given)) + "\n")
        return
    passed = [f"--{name}={getattr(given, name)}" for name in ("model", "length", "chunk", "tokens", "dtype")]
    passed += [f"--plan={plan}" for plan in given.plan]
    model, _ = load(given.model, "cpu", given.dtype)
    names = [side.name for side in sides(model, given.plan)[0] if not given.only or side.name in given.only]
    if len(names) < len(given.only):
        raise PatchError(f"no row is called {', '.join(sorted(set(given.only) - set(names)))}.")
    del model
    found = {}
    for name in names:
        done = subprocess.run(
            [sys.executable, __file__, f"--side={name}", *passed], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise PatchError(f"{name} failed: {done.stderr.strip().splitlines()[-1:]}")
        found[name] = json.loads(done.stdout.splitlines()[-1])
    show(found, Console())
    if given.json:
        settings = {name: str(value) for name, value in vars(given).items() if name not in ("json", "side")}
        document = {"benchmark": "kv_memory", "schema": 1, "settings": settings, "baseline": UNPATCHED}
        document |= {"results": found, "machine": machine()}
        replace_file(given.json, (json.dumps(document, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
