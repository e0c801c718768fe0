"""VAR at work where there are sinks: the demo vision-language model, widened, with sinks planted in it.

    python benchmarks/planted_sinks.py --out benchmarks/results/planted-sinks

The demo model has none, and at a width of 256 could have none. Its decoder is widened to 1,024 hidden dimensions, of
which nothing reads or writes the new ones (the logits stay the same), and the first token and four visual tokens get a
huge value in two of them. That is `planted`. The rest of such a token shrinks, for RMSNorm divides by the whole vector,
as in real models; but what is left of it draws next to no attention. `pulling` goes on to what real sinks do: keys
from layer 2 on read one planted dimension, so that sinks draw attention; values do not. In `pulling hard` they draw so
much that answers suffer, and there is something to win back. A width above 800 lets two dimensions be above tau = 20 at
once, since their squares add up to the width at most.

Looked at: which tokens are sinks in which layer; rows asked and rows edited by layer and head; where their attention
lies before and after, measured (`infer_patch.evals.attention_view`) and held against the formula, written out here on
eager attention; POPE-style questions with and without; what `calibrate var` finds, in the demo language model, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from planted import plant, pull, sizes, widened
from torch import Tensor

from infer_patch import Plan, patch
from infer_patch.calibration.var import calibrate
from infer_patch.demo_vlm import load_demo_vlm
from infer_patch.errors import PatchError
from infer_patch.evals.attention_view import head_attention
from infer_patch.evals.generation import generate
from infer_patch.evals.loading import load
from infer_patch.evals.pope_scenes import PopeScenes
from infer_patch.evals.prompts import encode
from infer_patch.evals.results import git_commit
from infer_patch.evals.scenes import PATCH, SIZE
from infer_patch.evals.statistics import paired
from infer_patch.files import replace_file
from infer_patch.machine import machine
from infer_patch.patches import VAR

WIDTH, DIMS = 1024, (700, 900)
SIDE = SIZE // PATCH
CELLS = ((0, 5), (4, 15), (11, 0), (15, 9))  # row and column of the planted tokens, at the edge: mostly background
PLACES = tuple(SIDE * row + column for row, column in CELLS)
# that sinks would draw of a row with the mean query; rows differ, and what they draw of all rows is far more
SHARES = {"pulling": 0.02, "pulling hard": 0.9}
OFFICIAL = VAR(dims=DIMS)
MORE = replace(OFFICIAL, move_fraction=0.6)  # as two readers of the paper have it


def build(processor: Any, model: Any) -> dict[str, Any]:
    """Twins of the demo model: widened without sinks, with planted ones, and with sinks that draw attention."""
    first = processor.tokenizer.bos_token_id
    twins = {name: widened(model, WIDTH) for name in ("widened", "planted", *SHARES)}
    others = PopeScenes(scenes=4, seed=99).items(processor, model)  # not the scenes that are asked about
    prompts = [encode(item.prompt, processor, model) for item in others[::4]]
    for name in ("planted", *SHARES):
        plant(twins[name], DIMS, PLACES, first)
        if name in SHARES:
            pull(twins[name], DIMS, 1 + len(PLACES), prompts, SHARES[name])
    return twins


def token_kinds(model: Any, inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of one prompt: which tokens are visual, which were planted, and which rows VAR is asked about; bool [T] each."""
    visual = inputs["input_ids"][0] == model.config.image_token_id
    planted = torch.zeros_like(visual)
    planted[[0, *(int(visual.nonzero()[place]) for place in PLACES)]] = True
    return visual, planted, torch.arange(len(visual)) > visual.nonzero().max()


def formula(a: Tensor, sinks: Tensor, visual: Tensor, asked: Tensor, method: VAR) -> tuple[Tensor, Tensor]:
    """A' [H, T, T] from A and the edited rows [H, T], row by row as the method's page writes it."""
    new, edited = a.double().clone(), torch.zeros(a.shape[:2], dtype=torch.bool)
    if not (sinks & visual).any():
        return new, edited
    for head, row in ((h, int(i)) for h in range(len(a)) for i in asked.nonzero()):
        p = new[head, row]  # a view
        mass, on_sinks = p[visual].sum(), p[visual & sinks].sum()
        if on_sinks / (mass + 1e-6 * visual.sum()) > 1 - method.nonsink_ratio_min or mass < method.vision_mass_min:
            continue
        edited[head, row] = True
        budget = method.move_fraction * p[sinks].sum()
        p[sinks] *= 1 - method.move_fraction
        p[visual & ~sinks] *= 1 + budget / p[visual & ~sinks].sum()
    return new, edited


@torch.no_grad()
def look(model: Any, inputs: Any, layer: int, method: VAR = OFFICIAL) -> tuple[dict[str, Any], Tensor, Tensor, Tensor]:
    """One layer under VAR on it alone: what was reported, what was measured, how far that is from the formula; and the
    measured attention before and after [H, T, T] with the edited rows [H, T]."""
    visual, planted, asked = token_kinds(model, inputs)
    plan = Plan((replace(method, layers=(layer,)),))
    phi, content = sizes(model, inputs, layer, DIMS)
    model.set_attn_implementation("eager")
    eager = model(**inputs, output_attentions=True).attentions[layer][0]
    model.set_attn_implementation("sdpa")
    with patch(model, plan) as handle:
        model(**inputs)
        counts = handle.report().methods["var"]["corrected"][layer]
    heads = range(len(eager))
    before, after = (torch.stack([head_attention(model, p, inputs, layer, h) for h in heads]) for p in (None, plan))
    sinks = phi > method.tau
    expected, edited = formula(eager, sinks, visual, asked, method)
    kinds = {"sinks": sinks, "other_visual": visual & ~sinks, "other_text": ~(visual | sinks)}
    fell, text = ((after < before) & edited[..., None]).any(0).any(0), kinds["other_text"]
    found = {
        "layer": layer,
        "sinks": sinks.nonzero().squeeze(1).tolist(),
        "sinks_are_the_planted": torch.equal(sinks, planted),
        "keys_that_lost_attention_are_the_planted": torch.equal(fell, planted),
        "reported": {name: int(counts[name]) for name in ("visual_sinks", "text_sinks", "rows_asked", "rows")},
        "least_phi_of_sinks": round(float(phi[planted].min()), 2),
        "largest_phi_of_others": float(phi[~planted].max()),
        "content_left_in_sinks": _mean(content[planted]),
        "asked_rows_mass_on_sinks": _mean(before[:, asked][..., sinks].sum(-1)),
        "rows_by_head": edited.sum(1).tolist(),
        "heads_editing_the_last_row": int(edited[:, -1].sum()),
        "mass_before": {name: _mean(before[edited][:, kind].sum(1)) for name, kind in kinds.items()},
        "mass_after": {name: _mean(after[edited][:, kind].sum(1)) for name, kind in kinds.items()},
        "error_to_formula": float((after - expected).abs().max()),
        "error_of_row_sums": float((after.sum(-1) - 1).abs().max()),
        "other_rows_bit_equal": torch.equal(after[~edited], before[~edited]),
        "text_keys_bit_equal": torch.equal(after[edited][:, text], before[edited][:, text]),
    }
    return found, before, after, edited


def _mean(values: Tensor) -> float:
    return round(float(values.mean()), 6)


@torch.no_grad()
def words(model: Any, inputs: Any, method: VAR) -> str:
    """What the report says after one prompt."""
    with patch(model, method) as handle:
        model(**inputs)
        return str(handle.report())


def answers(model: Any, processor: Any, task: PopeScenes, items: Sequence[Any], method: VAR | None) -> dict[str, Any]:
    """Of every question the text, whether it is right, and the logit of yes minus that of no."""
    yes, no = processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
    texts, margins = [], []
    with nullcontext() if method is None else patch(model, method):
        for item in items:
            trace = generate(model, encode(item.prompt, processor, model), task.max_new_tokens)
            texts.append(processor.decode(trace.ids, skip_special_tokens=True).strip())
            margins.append(round(float(trace.recorded()[0, yes] - trace.recorded()[0, no]), 4))
    right = [float(task.score(item, text)["correct"]) for item, text in zip(items, texts)]
    return {"accuracy": round(statistics.fmean(right), 4), "right": right, "margins": margins, "texts": texts}


def questions(demo: Any, twins: dict[str, Any], processor: Any, scenes: int, limit: int | None) -> dict[str, Any]:
    """Answers of all models, and pairs of them compared."""
    task = PopeScenes(scenes=scenes)
    items = task.items(processor, demo)[:limit]
    sides = {"demo": (demo, None), "widened": (twins["widened"], None)}
    for name in ("planted", *SHARES):
        sides |= {name: (twins[name], None), f"{name}, var": (twins[name], OFFICIAL)}
    sides["pulling, var moving 0.6"] = (twins["pulling"], MORE)
    found = {}
    for name, (model, method) in sides.items():
        print(f"{len(items)} questions: {name}", flush=True)
        found[name] = answers(model, processor, task, items, method)
    groups, compared = [item.group for item in items], []
    pairs = [pair for name in ("planted", *SHARES) for pair in (("demo", name), (name, f"{name}, var"))]
    for one, other in [*pairs, ("pulling", "pulling, var moving 0.6")]:
        changes = [abs(a - b) for a, b in zip(found[one]["margins"], found[other]["margins"])]
        statistic = paired(found[one]["right"], found[other]["right"], groups).to_dict()
        margin = {"mean": round(statistics.fmean(changes), 4), "max": round(max(changes), 4)}
        compared.append({"reference": one, "other": other, **statistic, "change_of_margin": margin})
    same = found["demo"]["texts"] == found["widened"]["texts"]
    brief = {
        name: {"accuracy": side["accuracy"], "right": "".join(str(int(x)) for x in side["right"])}
        for name, side in found.items()
    }
    return {"items": len(items), "scenes": scenes, "widened_answers_equal": same, "sides": brief, "compared": compared}


def dimensions(model: Any, processor: Any) -> dict[str, Any]:
    """What `calibrate var` finds, or says."""
    try:
        document = calibrate(model, processor)
    except PatchError as error:
        return {"dims": [], "said": str(error)}
    return {name: document[name] for name in ("dims", "tau", "largest", "layers", "texts")}


def draw(file: Path, picture: Any, question: str, pieces: list[str], seen: Sequence[Any], kinds: Any) -> dict[str, Any]:
    """The scene, and what one row reads of it before and after: of all edited rows the one that moves most."""
    from matplotlib.colors import PowerNorm, SymLogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    visual, planted, _ = kinds
    moved = [(after - before).abs().sum(-1) for _, before, after, _ in seen]
    best = max(range(len(seen)), key=lambda i: float(moved[i].max()))
    head, row = divmod(int(moved[best].argmax()), moved[best].shape[1])
    layer = seen[best][0]["layer"]
    rows = [matrix[head, row] for matrix in seen[best][1:3]]
    grids = [x[visual].view(SIDE, SIDE) for x in rows]
    difference = grids[1] - grids[0]
    figure = Figure(figsize=(11.2, 3.5), layout="constrained")
    panels = figure.subplots(1, 4)
    panels[0].imshow(picture, extent=(-0.5, SIDE - 0.5, SIDE - 0.5, -0.5))
    panels[0].set_title("the scene\n(squares: planted sinks)", fontsize=9)
    scale = PowerNorm(0.5, 0, max(float(x.max()) for x in grids))
    for panel, grid, when, x in zip(panels[1:], grids, ("before", "with var"), rows):
        image = panel.imshow(grid, cmap="cividis", norm=scale)
        on, text = (float(x[kind].sum()) for kind in (visual & planted, planted & ~visual))
        rest = float(x[visual & ~planted].sum())
        panel.set_title(
            f"{when}: rest of the picture {rest:.2f},\nsquares {on:.2f}, first token {text:.2f}", fontsize=9
        )
    figure.colorbar(image, ax=panels[1:3], shrink=0.8, label="share of the row's attention")
    most = float(difference.abs().max())
    image = panels[3].imshow(difference, cmap="RdBu", norm=SymLogNorm(most / 50, vmin=-most, vmax=most))
    panels[3].set_title("difference\n(blue: more, red: less)", fontsize=9)
    figure.colorbar(image, ax=panels[3], shrink=0.8)
    for panel in panels:
        edge = "black" if panel is panels[3] else "#ff4d4d"
        for y, x in CELLS:
            panel.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=edge, linewidth=1.2))
        panel.set(xticks=[], yticks=[])
    figure.suptitle(f'What "{pieces[row]}" of "{question}" reads: layer {layer}, head {head}', fontsize=10)
    figure.savefig(file, dpi=95)
    return {"layer": layer, "head": head, "row": row, "token": pieces[row]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of result.json and planted-sinks.png")
    parser.add_argument("--scenes", type=int, default=12, help="that are asked about, about 11 questions each")
    parser.add_argument("--looked-at", type=int, default=2, help="scenes whose attention is looked at")
    parser.add_argument("--few", action="store_true", help="one layer, four questions, no language model: a try")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    demo, processor = load_demo_vlm()
    twins = build(processor, demo)
    drawn = {item.group: item for item in PopeScenes(scenes=given.looked_at).items(processor, demo)}
    prompts = {name: (item.prompt, encode(item.prompt, processor, demo)) for name, item in drawn.items()}
    first, inputs = next(iter(prompts.values()))
    wide = twins["widened"]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", UserWarning)  # what never fires is in the result
        result: dict[str, Any] = {
            "widened_logits_differ_by": float((wide(**inputs).logits - demo(**inputs).logits).abs().max()),
            "demo_model_says": words(demo, inputs, replace(OFFICIAL, dims=tuple(range(256)))),
            "widened_says": words(wide, inputs, OFFICIAL),
            "calibrate": {name: dimensions(m, processor) for name, m in {"demo-vlm": demo, **twins}.items()},
        }
        layers = [2] if given.few else range(2, 7)
        for name in ("planted", "pulling"):
            result[name] = []
            for scene, (_, x) in prompts.items():
                print(f"{name}: {scene}", flush=True)
                seen = [look(twins[name], x, layer) for layer in layers]
                result[name] += [{"scene": scene, **found} for found, *_ in seen]
                if name == "pulling" and x is inputs:
                    file = given.out / "planted-sinks.png"
                    pieces = processor.tokenizer.convert_ids_to_tokens(x["input_ids"][0])
                    picture, kinds = first.images[0], token_kinds(demo, x)
                    result["picture"] = draw(file, picture, first.text, pieces, seen, kinds)
        result["questions"] = questions(demo, twins, processor, given.scenes, 4 if given.few else None)
    if not given.few:
        result["calibrate"]["demo language model"] = dimensions(*load("demo"))
    settings = {"width": WIDTH, "dims": DIMS, "cells": CELLS, "shares": SHARES, "method": OFFICIAL.to_dict()}
    document = {
        "benchmark": "planted_sinks",
        "schema": 1,
        "command": "python benchmarks/planted_sinks.py --out benchmarks/results/planted-sinks",
        "git": git_commit(),
        "settings": settings,
        **result,
        "machine": machine(),
    }
    replace_file(given.out / "result.json", (json.dumps(document, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
