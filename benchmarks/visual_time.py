"""Does time fall with visual tokens? Prefill of every method that drops some, against the work it leaves to be done.

    python benchmarks/visual_time.py --json benchmarks/results/visual-time-cpu.json

A LLaVA with random weights and a small CLIP tower, its decoder large enough that attention and MLP take the time, reads
a prompt with 576 visual tokens (one picture) and with 2,880 (five). Random weights choose tokens as good as at random,
which changes nothing about time. Every round times every side once, in an order that turns from round to round, and
gives each one ratio to the unpatched model of the same round; the unpatched model runs again as the control.

`work` is the cost model F1 of FastV's paper, over decoder layers, and `time_over_work` the time ratio over it. Goal: at
most 1.15. F1 has two matrices in the MLP and attention to all tokens; this decoder has three and is causal, so that
attention, which falls with the square of the tokens, is a smaller part of it. `macs` counts what it really does:
`time_over_macs` is free of that difference, which alone is 1.23 at a quarter of 2,880 tokens in so narrow a model. Time
counts the whole forward call, with vision tower, choice of tokens and language head, all of them neither in `work` nor
in `macs`; `tower_share` is the tower's part of the unpatched time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from infer_patch import Method, Plan, patch
from infer_patch.errors import PatchError
from infer_patch.evals.cost import rotated
from infer_patch.evals.overhead import spread, verdict
from infer_patch.evals.results import git_commit
from infer_patch.evals.stopwatch import Stopwatch
from infer_patch.evals.visual_cost import causal_ratio, cost_ratio
from infer_patch.files import replace_file
from infer_patch.keep_schedule import counts_of
from infer_patch.machine import machine
from infer_patch.patches import VTCCLS, DyVTE, FastV, GSearch, PSigmoid, RandomPruning

GOAL = 0.15  # time may exceed work by this share
LAYER = 2  # where methods inside the decoder drop first
UNPATCHED, CONTROL = "unpatched", "unpatched again"
IMAGE, FIRST_TEXT = 3, 8  # token ids


@dataclass(frozen=True)
class Sizes:
    """The model and its prompts. A picture has (image / 14)^2 visual tokens; `text` tokens stand around pictures."""

    hidden: int = 768
    intermediate: int = 2048
    heads: int = 12
    layers: int = 8
    image: int = 336
    tower_hidden: int = 64
    tower_layers: int = 2
    text: int = 60
    vocab: int = 1024
    pictures: tuple[int, ...] = (1, 5)

    @property
    def per_picture(self) -> int:
        return (self.image // 14) ** 2


@dataclass
class Side:
    """One row of the table: a method (None: unpatched), the visual tokens it leaves in each layer, and seconds."""

    name: str
    method: Method | None
    counts: list[float]
    seconds: list[float] = field(default_factory=list)


def build(sizes: Sizes, seed: int = 0) -> Any:
    """A LLaVA with random weights, float32 on the CPU, in eval mode."""
    vision = CLIPVisionConfig(
        hidden_size=sizes.tower_hidden,
        intermediate_size=2 * sizes.tower_hidden,
        num_hidden_layers=sizes.tower_layers,
        num_attention_heads=max(sizes.tower_hidden // 32, 1),
        image_size=sizes.image,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        vocab_size=sizes.vocab,
        max_position_embeddings=8192,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        image_seq_length=sizes.per_picture,
        vision_feature_layer=-2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config).eval()


def prompt(sizes: Sizes, pictures: int, seed: int = 0) -> dict[str, Any]:
    """Text, the pictures, and text: ids [1, n] and pixels [pictures, 3, side, side]."""
    draw = torch.Generator().manual_seed(seed)
    text = torch.randint(FIRST_TEXT, sizes.vocab, (1, sizes.text), generator=draw)
    before = sizes.text // 2
    ids = torch.cat([text[:, :before], torch.full((1, pictures * sizes.per_picture), IMAGE), text[:, before:]], 1)
    return {"input_ids": ids, "pixel_values": torch.randn(pictures, 3, sizes.image, sizes.image, generator=draw)}


def all_sides(sizes: Sizes, visual: int, shares: Sequence[float]) -> list[Side]:
    """Every side at `visual` tokens, with how many of them each layer will hold."""
    layers = sizes.layers
    whole = [float(visual)] * layers
    rows = [Side(UNPATCHED, None, whole), Side(CONTROL, None, whole)]
    for share in shares:
        kept = round(visual * share)
        once = [float(visual)] * LAYER + [float(kept)] * (layers - LAYER)
        budget = (LAYER + share * (layers - LAYER)) / layers
        drop: dict[str, Any] = {"layer": LAYER, "drop_ratio": 1 - share}
        rows += [
            Side(f"fastv {share:g}", FastV(**drop), once),
            Side(f"random {share:g}", RandomPruning(**drop), once),
            Side(f"vtc_cls {share:g}", VTCCLS(drop_ratio=1 - share), [float(kept)] * layers),
        ]
        evenly = tuple(max(1 - (1 - share) * max(i - LAYER + 1, 0) / (layers - LAYER), 0.0) for i in range(layers))
        curve = PSigmoid(budget=round(budget, 6), bottom=0.0, first=LAYER)
        for name, method, rates in (
            (f"g_search to {share:g}", GSearch(keep_rate=evenly), evenly),
            (f"p_sigmoid {share:g}", curve, curve.given_rates(layers).rates),
        ):
            rows.append(Side(name, method, [float(c) for c in counts_of(rates, torch.tensor(visual))]))
    for last in (layers // 4, layers // 2):
        counts = [float(visual) if i <= last else 0.0 for i in range(layers)]
        rows.append(Side(f"dyvte, exit after {last}", DyVTE(policy="fixed", exit_layer=last), counts))
    return rows


@torch.no_grad()
def measure(
    model: Any, sizes: Sizes, pictures: int, given: argparse.Namespace, say: Callable[[str], None]
) -> tuple[list[Side], float]:
    """All sides with their seconds, and the tower's share of the unpatched time."""
    rows = all_sides(sizes, pictures * sizes.per_picture, given.shares)
    inputs = prompt(sizes, pictures)
    watch = Stopwatch(torch.device("cpu"), given.clock)
    tower: list[float] = []
    for turn in range(given.rounds + 1):
        say(f"{pictures} pictures, round {turn} of {given.rounds}")
        order = rotated(rows, turn)
        for side in order[::-1] if turn % 2 else order:
            with nullcontext() if side.method is None else patch(model, Plan((side.method,), side.name)) as handle:
                begin = watch.mark()
                model(**inputs, use_cache=True, logits_to_keep=1)
                seconds = watch.seconds(begin, watch.mark())
                if turn:  # the first round warms up
                    side.seconds.append(seconds)
                elif handle is not None:
                    check(side, handle.report())
        begin = watch.mark()
        model.get_image_features(inputs["pixel_values"])
        tower.append(watch.seconds(begin, watch.mark()))
    return rows, statistics.median(tower[1:]) / statistics.median(rows[0].seconds)


def check(side: Side, report: Any) -> None:
    """Refuse to time a side that leaves other numbers of tokens than its work is counted with."""
    if report.silent:
        raise PatchError(f"{side.name} did nothing; there is no point in timing it.")
    (figures,) = report.methods.values()
    there, held = report.visual_tokens, []
    for layer in range(len(side.counts)):
        there = figures["visual_tokens_kept"].get(layer, there)
        held.append(there)
    if held != side.counts:
        raise PatchError(f"{side.name} should leave {side.counts} visual tokens in the layers, and left {held}.")


def results(rows: Sequence[Side], sizes: Sizes, visual: int, tower_share: float) -> list[dict[str, Any]]:
    """One entry for each side."""
    unpatched = rows[0].seconds
    control = [s / u for s, u in zip(rows[1].seconds, unpatched)]
    found = []
    for side in rows:
        work = cost_ratio(side.counts, sizes.text, visual, sizes.hidden, sizes.intermediate)
        macs = causal_ratio(side.counts, sizes.text, visual, sizes.hidden, sizes.intermediate)
        ratios = [s / u for s, u in zip(side.seconds, unpatched)]
        over, over_macs = ([ratio / share for ratio in ratios] for share in (work, macs))
        found.append(
            {
                "side": side.name,
                "method": None if side.method is None else side.method.to_dict(),
                "visual_tokens": visual,
                "counts": side.counts,
                "milliseconds": spread([1000 * s for s in side.seconds], 2),
                "ratio": spread(ratios, 4),
                "work": round(work, 4),
                "macs": round(macs, 4),
                "time_over_work": spread(over, 4),
                "time_over_macs": spread(over_macs, 4),
                "goal": None if side.method is None else verdict(over, control, GOAL),
                "goal_macs": None if side.method is None else verdict(over_macs, control, GOAL),
                "tower_share": round(tower_share, 4),
                "raw_milliseconds": [round(1000 * s, 3) for s in side.seconds],
            }
        )
    return found


def as_text(found: Sequence[dict[str, Any]]) -> str:
    """A Markdown table."""
    head = (
        "visual tokens",
        "side",
        "ms",
        "time",
        "work (F1)",
        "time / work",
        "goal 1.15",
        "macs",
        "time / macs",
        "goal",
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in found:
        cells = [f"{row['visual_tokens']:,}", row["side"], f"{row['milliseconds']['median']:.0f}"]
        cells.append(f"{row['ratio']['median']:.3f}")
        for name, goal in (("work", "goal"), ("macs", "goal_macs")):
            cells += [f"{row[name]:.3f}", f"{row['time_over_' + name]['median']:.3f}", row[goal] or "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=(0.5, 0.25, 0.125), help="of the visual tokens")
    parser.add_argument("--rounds", type=int, default=12, help="after one for warming up")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, --threads 1")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--pictures", type=int, nargs="+", help="in the prompt, 576 tokens each [1 5]")
    parser.add_argument("--tiny", action="store_true", help="a model of nothing, to try the script")
    parser.add_argument("--json", type=Path, help="file for the result")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    sizes = Sizes(hidden=64, intermediate=96, heads=2, image=56, tower_layers=2, text=9) if given.tiny else Sizes()
    model, found = build(sizes), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for pictures in given.pictures or sizes.pictures:
            rows, share = measure(model, sizes, pictures, given, lambda text: print(text, flush=True))
            found += results(rows, sizes, pictures * sizes.per_picture, share)
            print(as_text(found[-len(rows) :]), flush=True)
    if given.json:
        settings = {name: value for name, value in vars(given).items() if name != "json"}
        document = {
            "benchmark": "visual_time",
            "schema": 1,
            "command": "python benchmarks/visual_time.py",
            "git": git_commit(),
            "settings": {**settings, "sizes": vars(sizes)},
            "results": found,
            "machine": machine(),
        }
        replace_file(given.json, (json.dumps(document, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
