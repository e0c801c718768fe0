"""What methods that correct attention cost: prefill and decode steps of VAR, PAINT, ACT and retrieval heads, and DAMRO.

    python benchmarks/calibration_time.py --json benchmarks/results/calibration-time-cpu.json

The LLaVA of `visual_time.py`, with random weights, reads 576 visual tokens (one picture) and 2,880 (five) and decodes
given tokens. It has no sinks, so that VAR would do nothing: the first token and four visual tokens of each picture get
a huge value in two hidden dimensions, which nothing reads or writes (`planted.py`), and with nearly even attention all
rows are edited, the most work there can be. ACT corrects a quarter of the heads at a threshold relative to 1 / T, where
the first few keys count as sinks; retrieval heads masks one head of every layer; PAINT has its defaults. `effect` says
what each did in one prefill with its steps; a side that did nothing is not timed.

DAMRO is no patch: beside every forward a second stream runs. Its prefill encodes the pictures once more and reads the
short prompt, its steps run both streams.

Twins of the model share its weights, one for each side and two unpatched. Every round times a prefill and then every
step on all of them, in an order that turns, and gives each one ratio to unpatched; the first round warms up.
"""

from __future__ import annotations

import argparse
import itertools
import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from planted import plant
from visual_time import CONTROL, FIRST_TEXT, UNPATCHED, Sizes, build, prompt

from infer_patch import Method, patch
from infer_patch.damro import Damro
from infer_patch.errors import PatchError
from infer_patch.evals.cost import turned
from infer_patch.evals.overhead import PHASES, spread, twin, verdict
from infer_patch.evals.results import git_commit
from infer_patch.evals.stopwatch import Stopwatch
from infer_patch.files import replace_file
from infer_patch.machine import machine
from infer_patch.patches import ACT, VAR, Paint, RetrievalHeads

DIMS, PLACES = (5, 60), (1, 4, 9, 15)  # planted: hidden dimensions, and visual tokens of each picture
VALUES = 9000.0, -900.0  # equally large ones would both stay below tau = 20 at this width
DAMRO = "damro"
SHORT = Sizes(hidden=64, intermediate=96, heads=4, image=56, tower_layers=2, text=9, layers=4)


def sides(sizes: Sizes) -> dict[str, Method | None]:
    """Every side and its method; None where nothing is patched."""
    heads = list(itertools.product(range(sizes.layers), range(sizes.heads)))
    tiny = sizes.hidden < 400  # phi is at most sqrt(hidden), and received attention falls with the logarithm of T
    return {
        UNPATCHED: None,
        CONTROL: None,
        "var": VAR(dims=DIMS, tau=7.0 if tiny else 20.0),
        "paint": Paint(),
        "act, 1/4 of the heads": ACT(
            heads=tuple(heads[::4]), threshold_mode="relative", threshold=2.0 if tiny else 5.0
        ),
        f"retrieval_heads, 1/{sizes.heads}": RetrievalHeads(heads=tuple(f"{i}-0" for i in range(sizes.layers))),
        DAMRO: None,
    }


@torch.no_grad()
def measure(
    model: Any, sizes: Sizes, pictures: int, given: argparse.Namespace, say: Callable[[str], None]
) -> tuple[dict[str, dict[str, list[float]]], dict[str, Any]]:
    """Seconds by phase and side, and what every method did in the round that warms up."""
    methods, inputs = sides(sizes), prompt(sizes, pictures)
    following = torch.randint(FIRST_TEXT, sizes.vocab, (1, given.steps), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([inputs["input_ids"], following], 1)
    length, watch = inputs["input_ids"].shape[1], Stopwatch(torch.device("cpu"), given.clock)
    twins = {side: twin(model) for side in methods}
    times: dict[str, dict[str, list[float]]] = {phase: {side: [] for side in methods} for phase in PHASES}
    effects = {}
    with ExitStack() as stack:
        handles = {s: stack.enter_context(patch(twins[s], method)) for s, method in methods.items() if method}
        for turn in range(given.rounds + 1):
            say(f"{pictures} pictures, round {turn} of {given.rounds}")
            caches: dict[str, Any] = {}
            for position in [0, *range(length, length + given.steps)]:
                for side in turned(list(methods), turn):
                    begin = watch.mark()
                    if position:
                        call = {"input_ids": ids[:, position : position + 1], "past_key_values": caches[side]}
                        output = twins[side](**call, use_cache=True, logits_to_keep=1)
                    else:
                        output = twins[side](**inputs, use_cache=True, logits_to_keep=1)
                    if side == DAMRO:
                        contrast = caches["contrast"] if position else Damro(twins[side], inputs)
                        contrast(ids[:, : max(position + 1, length)], output.logits[:, -1])
                        caches["contrast"] = contrast
                    seconds = watch.seconds(begin, watch.mark())
                    caches[side] = output.past_key_values
                    if turn:
                        times["decode" if position else "prefill"][side].append(seconds)
            if not turn:
                effects = {side: effect(side, handle.report(reset=True)) for side, handle in handles.items()}
    return times, effects


def effect(side: str, report: Any) -> dict[str, Any]:
    """What a method reports; refuses to time one that did nothing."""
    if report.silent:
        raise PatchError(f"{side} did nothing; there is no point in timing it.")
    (figures,) = report.methods.values()
    return dict(figures)


def results(
    times: dict[str, dict[str, list[float]]], effects: dict[str, Any], sizes: Sizes, visual: int
) -> list[dict[str, Any]]:
    """One entry for each phase and side."""
    found = []
    for phase, side in itertools.product(PHASES, times[PHASES[0]]):
        unpatched = times[phase][UNPATCHED]
        ratios, control = ([s / u for s, u in zip(times[phase][x], unpatched)] for x in (side, CONTROL))
        method = sides(sizes)[side]
        milliseconds = [1000 * s for s in times[phase][side]]
        found.append(
            {
                "visual_tokens": visual,
                "phase": phase,
                "side": side,
                "method": None if method is None else method.to_dict(),
                "milliseconds": spread(milliseconds, 2),
                "ratio": spread(ratios, 4),
                "verdict": None if side in (UNPATCHED, CONTROL) else verdict(ratios, control, None),
                "effect": effects.get(side),
                "raw_milliseconds": [round(x, 3) for x in milliseconds],
            }
        )
    return found


def as_text(found: Sequence[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = ["| visual tokens | phase | side | ms | time | 95 % of the median | |", "|---" * 7 + "|"]
    for row in found:
        ratio = row["ratio"]
        cells = [f"{row['visual_tokens']:,}", row["phase"], row["side"], f"{row['milliseconds']['median']:.1f}"]
        cells += [f"{ratio['median']:.3f}", f"{ratio['median_low']:.3f} to {ratio['median_high']:.3f}"]
        lines.append("| " + " | ".join([*cells, row["verdict"] or "-"]) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="after one for warming up")
    parser.add_argument("--steps", type=int, default=8, help="tokens that are decoded after each prefill")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, --threads 1")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--pictures", type=int, nargs="+", help="in the prompt, 576 tokens each [1 5]")
    parser.add_argument("--tiny", action="store_true", help="a model of nothing, to try the script")
    parser.add_argument("--json", type=Path, help="file for the result")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    sizes = SHORT if given.tiny else Sizes()
    model, found = build(sizes), []
    plant(model, DIMS, PLACES, int(prompt(sizes, 1)["input_ids"][0, 0]), VALUES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for pictures in given.pictures or sizes.pictures:
            times, effects = measure(model, sizes, pictures, given, lambda text: print(text, flush=True))
            here = results(times, effects, sizes, pictures * sizes.per_picture)
            print(as_text(here), flush=True)
            found += here
    if given.json:
        settings = {name: value for name, value in vars(given).items() if name != "json"}
        document = {
            "benchmark": "calibration_time",
            "schema": 1,
            "command": "python benchmarks/calibration_time.py",
            "git": git_commit(),
            "settings": {**settings, "sizes": vars(sizes)},
            "results": found,
            "machine": machine(),
        }
        replace_file(given.json, (json.dumps(document, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
