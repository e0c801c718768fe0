"""Kept tokens over the picture, from the engine's record to the pixels on the page; and shares per layer."""

import json
import re
import shutil
from dataclasses import dataclass
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from miniatures import MINIATURES, vision_inputs
from PIL import Image

from infer_patch import Plan, patch
from infer_patch.evals.evaluate import evaluate
from infer_patch.evals.kept_tokens import example_items
from infer_patch.evals.prompts import Prompt
from infer_patch.evals.shards import Shard
from infer_patch.evals.task import Item, Task
from infer_patch.patches import FastV, RandomPruning, SinkWindow
from infer_patch.report import kept_page
from infer_patch.report.eval_page import read_eval, render_eval, render_runs
from infer_patch.report.layer_shares import Strip, in_words, layer_strips, svg
from infer_patch.report.token_pictures import SIDE, darkened, encoded, fitted, layer_colours
from infer_patch.visual_grid import Grid

EVIL = "<script>alert('x')</script>"
HALF = Plan((RandomPruning(layer=1, drop_ratio=0.5, seed=3),), "half")
TWICE = Plan((RandomPruning(layer=1, drop_ratio=0.5, seed=3), FastV(layer=3, drop_ratio=0.75)), "twice")
PLANS = [HALF, TWICE, Plan((SinkWindow(window=64, dense_below=0),), "window")]
COLOURS = ((200, 80, 60), (90, 200, 70), (80, 120, 210), (220, 200, 90))


@dataclass(frozen=True)
class Look(Task):
    """Two questions about each of four pictures of one colour."""

    name: ClassVar[str] = "look"
    title: ClassVar[str] = "Look"
    headline: ClassVar[str] = "accuracy"
    max_new_tokens: int = 2
    family: str = "llava"

    def items(self, processor, model):
        return [self.item(picture, question) for picture in range(4) for question in range(2)]

    def item(self, picture, question):
        inputs = vision_inputs(MINIATURES[self.family], images=(1,), seed=picture)
        colour = torch.tensor(COLOURS[picture]) / 255
        inputs["pixel_values"] = (2 * colour - 1).view(-1, 1, 1).expand(inputs["pixel_values"].shape).contiguous()
        shown = Image.new("RGB", (40, 30), COLOURS[picture])
        prompt = Prompt(f"{EVIL} {picture}.{question} ?", images=(shown,), inputs=inputs)
        return Item(f"item {picture}.{question}", prompt, "w9", f"picture {picture}", {})

    def score(self, item, output):
        return {"correct": output.startswith(item.reference)}

    def metrics(self, rows):
        return {"accuracy": sum(row["score"]["correct"] for row in rows) / len(rows)}


class Processor:
    pad_token_id, eos_token_id = 0, None
    image_processor = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3)

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(f"w{i}" for i in ids)


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def named(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


def run(out=None, task=None, plans=PLANS, **settings):
    model = MINIATURES[(task or Look()).family].build()
    return evaluate(model, Processor(), task or Look(), plans, control_batches=0, out=out, **settings)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run(tmp_path_factory.mktemp("kept") / "r", batch_size=2)


def dropped_at_random(length, pictures=1):
    """Tokens that `HALF` drops, by its formula: the lower half of the draw in each picture of 16 tokens."""
    draw = torch.rand(length, generator=torch.Generator().manual_seed(3))[: 16 * pictures].view(pictures, 16)
    return [set(row.argsort()[:8].tolist()) for row in draw]


# --- what the engine records ---------------------------------------------------------------------------------


def test_which_tokens_left_is_recorded_exactly_and_on_request_only():
    mini = MINIATURES["llava"]
    inputs = vision_inputs(mini, images=(1, 2, 0))
    with patch(mini.build(), TWICE) as handle:
        handle.model(**inputs)
        assert handle.visual_tokens() == []
        handle.record_visual_tokens()
        handle.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        handle.record_visual_tokens(False)
        handle.model(**inputs)
        (call,) = handle.visual_tokens()
        report = handle.report()
    assert [len(call.left_at(i)) for i in range(3)] == [1, 2, 0]
    for sample in (0, 1):
        for picture, gone in zip(call.left_at(sample), dropped_at_random(inputs["input_ids"].shape[1], sample + 1)):
            assert {i for i, layer in enumerate(picture) if layer == 1} == gone
            assert sum(layer == 3 for layer in picture) == 4 and sum(layer is None for layer in picture) == 4
    assert report.visual_tokens == 3 * 48 == report.to_dict()["visual_tokens"]


def test_a_plan_that_drops_nothing_is_recorded_as_keeping_all():
    mini = MINIATURES["llava"]
    with (
        patch(mini.build(), RandomPruning(layer=1, drop_ratio=0.0)) as handle,
        pytest.warns(UserWarning, match="never"),
    ):
        handle.record_visual_tokens()
        handle.model(**vision_inputs(mini, images=(1,)))
        (call,) = handle.visual_tokens()
        handle.remove()
    assert call.left_at(0) == [[None] * 16]


# --- the examples of an evaluation ---------------------------------------------------------------------------


def cells(folder, name):
    """Mean brightness of each of the 4 x 4 cells of a picture in the folder."""
    pixels = np.asarray(Image.open(folder / name).convert("L"), dtype=float)
    assert pixels.shape == (SIDE, SIDE)
    return pixels.reshape(4, SIDE // 4, 4, SIDE // 4).mean((1, 3)).flatten()


def test_exactly_the_dropped_cells_are_darkened(found):
    examples = found.summary["examples"]
    assert [e["item"] for e in examples] == ["item 0.0", "item 1.0", "item 2.0"]
    length = found.samples[0]["prompt_tokens"]
    (gone,) = dropped_at_random(length)
    for example, colour in zip(examples, COLOURS):
        assert list(example["plans"]) == ["half", "twice"]  # the third plan drops no tokens
        assert example["plans"]["half"] | {"pictures": 0} == {"kept": 8, "tokens": 16, "left": {"1": 8}, "pictures": 0}
        assert example["plans"]["twice"]["left"] == {"1": 8, "3": 4}
        plain, half = example["pictures"][0], example["plans"]["half"]["pictures"][0]
        assert np.abs(np.asarray(Image.open(found.folder / plain))[100, 100] - np.array(colour)).max() <= 1
        before, after = cells(found.folder, plain), cells(found.folder, half)
        assert {i for i in range(16) if after[i] < 0.7 * before[i]} == gone
        assert {i for i in range(16) if after[i] == before[i]} == set(range(16)) - gone


def test_rows_hold_the_record_of_examples_only(found):
    recorded = {(s["plan"], s["item"]) for s in found.samples if s["left_at"] is not None}
    assert recorded == {(plan, f"item {i}.0") for plan in ("half", "twice") for i in range(3)}


def test_the_page_shows_pictures_with_words(found):
    text = found.page.read_text("utf-8")
    images = Tags(text).named("img")
    assert len(images) == 9 and all(image["src"].startswith("data:image/") and image["alt"] for image in images)
    assert images[1]["alt"] == "half: kept 8 of 16 visual tokens, 8 left at layer 1"
    assert "the picture as the model sees it" in text and "drops at several layers; a patch left at layer" in text
    assert "<script" not in text and "&lt;script&gt;alert" in text
    assert not re.search(r'(src|href)="?(https?:|//)', text) and len(text) < 3_000_000


def test_interrupted_and_shared_runs_give_the_same(found, tmp_path, monkeypatch):
    def stop(done, total, what):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", batch_size=2, on_progress=stop)
    again = run(tmp_path / "cut", batch_size=2)

    waits = []

    def wait(shard):  # process 0 waits for process 1, which runs meanwhile
        if shard.first and shard.count == 2:
            waits.append(1)
            if len(waits) == 2:
                monkeypatch.setenv("RANK", "1")
                assert run(tmp_path / "two", batch_size=2).summary is None

    monkeypatch.setattr(Shard, "wait", wait)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    two = run(tmp_path / "two", batch_size=2)
    for other in (again, two):
        assert other.summary["examples"] == found.summary["examples"]
        for file in (found.folder / "kept").iterdir():
            assert (other.folder / "kept" / file.name).read_bytes() == file.read_bytes()


def test_rendered_again_it_is_the_same_and_older_results_render_without(found, tmp_path):
    assert render_eval(*read_eval(found.folder)) == found.page.read_text("utf-8")
    old = tmp_path / "old"
    shutil.copytree(found.folder, old)
    shutil.rmtree(old / "kept")
    assert "Not on this page: kept/1-1.png" in render_runs([read_eval(old)])
    summary = json.loads((old / "summary.json").read_text())
    del summary["examples"]
    (old / "summary.json").write_text(json.dumps(summary))
    rows = [json.loads(line) for line in (old / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        del row["left_at"]
        for figures in (row["effect"] or {"methods": {}})["methods"].values():
            figures.pop("blocks", None)
    (old / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = render_runs([read_eval(old), read_eval(found.folder)])
    assert text.count("What was kept of the picture") == 1 and text.count("Layer by layer") == 2
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids)) and set(re.findall(r'aria-labelledby="([^"]+)"', text)) <= set(ids)


def test_a_page_embeds_only_so_much(found, monkeypatch):
    monkeypatch.setattr(kept_page.Pictures, "__init__", lambda self: setattr(self, "left", 2000))
    text = render_eval(*read_eval(found.folder))
    assert 0 < text.count("<img") < 9 and text.count("Not on this page") == 9 - text.count("<img")


def test_where_tokens_form_no_grid_it_is_said_and_none_is_drawn(tmp_path):
    found = run(tmp_path / "r", Look(family="llava_next"), [HALF])
    for example in found.summary["examples"]:
        assert example["plans"]["half"]["pictures"] == [None] and example["plans"]["half"]["kept"] == 7
        with Image.open(found.folder / example["pictures"][0]) as shown:
            assert shown.size == (40, 30)  # as given
    text = found.page.read_text("utf-8")
    assert "kept 7 of 14 visual tokens" in text and "form no single grid" in text and text.count("<img") == 3


def test_examples_are_the_first_items_on_different_pictures():
    items = Look().items(None, None)
    assert [item.name for item in example_items(items, 2)] == ["item 0.0", "item 1.0"]
    assert example_items([Item("text", Prompt("no picture"), None)]) == []


# --- drawing -------------------------------------------------------------------------------------------------


def test_each_layer_has_a_colour_and_kept_pixels_stay():
    grid, left = Grid(2, 3, leading=1), [2, None, 2, 5, None, 9, None]  # the first is a CLS token
    colours = layer_colours(layer for layer in left if layer is not None)
    assert list(colours) == [2, 5, 9] and len(set(colours.values())) == 3
    brightness = [sum(colour) for colour in colours.values()]
    assert brightness == sorted(brightness)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (150, 220, 3), dtype=np.uint8))
    before, after = np.asarray(fitted(noise, grid)), np.asarray(darkened(noise, grid, left, colours))
    side = SIDE // 3
    assert after.shape == (2 * side, 3 * side, 3)
    for cell, layer in enumerate(left[1:]):
        at = np.s_[cell // 3 * side : (cell // 3 + 1) * side, cell % 3 * side : (cell % 3 + 1) * side]
        if layer is None:
            assert (after[at] == before[at]).all()
        else:
            painted = 0.75 * np.array(colours[layer]) + 0.25 * (before[at] @ np.array([[0.299], [0.587], [0.114]]))
            assert np.abs(after[at] - painted).max() <= 1


def test_pictures_are_small_files():
    flat = Image.new("RGB", (640, 480), (10, 20, 30))
    assert fitted(flat, None).size == (224, 168) and fitted(flat, Grid(24, 24)).size == (216, 216)
    assert fitted(flat, Grid(300, 400)).size == (224, 168) and fitted(flat.resize((20, 10)), None).size == (20, 10)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))
    assert encoded(flat)[1] == "png" and encoded(noise)[1] == "jpg" and len(encoded(noise)[0]) < 50_000


def test_a_legend_of_many_layers_is_a_gradient():
    kept = {"kept": 0, "tokens": 20, "left": {str(i): 1 for i in range(20)}, "pictures": []}
    summary = {"examples": [{"plans": {"one": {**kept, "left": {"3": 4}}, "many": kept}}]}
    (legend,) = kept_page.legends(summary)
    assert legend["plan"] == "many" and list(legend["colours"]) == list(range(20))
    assert legend["gradient"].startswith("linear-gradient")


# --- shares per layer ----------------------------------------------------------------------------------------


def row(methods, visual_tokens=0, prompt_tokens=100):
    return {"effect": {"methods": methods, "visual_tokens": visual_tokens}, "prompt_tokens": prompt_tokens}


def test_tokens_that_enter_are_summed_over_batches_and_methods():
    one = {"visual_tokens": {"1": 40}, "visual_tokens_kept": {"1": 20}}
    two = {"visual_tokens": {"3": 40}, "visual_tokens_kept": {"3": 10}}
    none = {"fired": False}  # a batch in which nothing was dropped
    rows = [row({"a": one, "b": two}, 40), row({"a": none, "b": none}, 60), {"effect": None, "prompt_tokens": 50}]
    visual, prompt = layer_strips(rows, 4)
    assert visual.shares == {0: 1.0, 1: 0.8, 2: 0.8, 3: 0.7}
    assert prompt.shares == {0: 1.0, 1: 1 - 20 / 250, 2: 1 - 20 / 250, 3: 1 - 30 / 250} and not prompt.drawn


def test_tokens_that_attend_are_averaged_over_batches():
    rows = [
        row({"m": {"tokens_attending": {"0": 1.0, "2": 0.2}}}),
        row({"m": {"tokens_attending": {"0": 0.5, "2": 0.4}}}),
    ]
    (strip,) = layer_strips(rows, 3)
    assert strip.shares == {0: 0.75, 2: pytest.approx(0.3)}
    assert strip.title == "prompt tokens that take part in attention, mean of the batches"


def test_key_blocks_are_summed_by_phase():
    first = {"blocks": {"prefill": {"0": [10, 20], "2": [5, 20]}, "decode": {"0": [1, 4]}}, "share_read": {}}
    second = {"blocks": {"prefill": {"0": [60, 60]}}, "share_read": {}}
    prefill, decode = layer_strips([row({"m": first}), row({"m": second})], 3)
    assert prefill.title == "causal key blocks read, prefill" and prefill.shares == {0: 70 / 80, 2: 0.25}
    assert decode.title == "causal key blocks read, decode" and decode.shares == {0: 0.25}


def test_older_rows_have_shares_over_both_phases():
    calls = {"prefill": 4, "decode": 8}
    rows = [
        row({"m": {"share_read": {"0": 0.5, "1": 0.1}, "blocks_causal": 20, "sparse_calls": calls}}),
        row({"m": {"share_read": {"0": 1.0, "1": 0.1}, "blocks_causal": 60, "sparse_calls": calls}}),
    ]
    (strip,) = layer_strips(rows, 2)
    assert strip.title == "causal key blocks read, prefill and decode"
    assert strip.shares == {0: pytest.approx(0.875), 1: pytest.approx(0.1)}


def test_phases_of_a_real_run_are_apart():
    mini = MINIATURES["llama"]
    from miniatures import GREEDY, text_inputs

    with patch(mini.build(), SinkWindow(window=64, dense_below=0, layers=(0, 2))) as handle:
        handle.model.generate(**text_inputs(mini, lengths=(300,)), **GREEDY)
        figures = handle.report().methods["sink_window"]
    assert list(figures["blocks"]) == ["prefill", "decode"] and list(figures["blocks"]["decode"]) == [0, 2]
    read, causal = (sum(p[k] for c in figures["blocks"].values() for p in c.values()) for k in (0, 1))
    assert (read, causal) == (figures["blocks_read"], figures["blocks_causal"])
    prefill, decode = layer_strips([row({"m": figures})], 4)
    assert decode.shares[0] < prefill.shares[0] < 1


def test_strips_in_words_and_bars():
    strip = Strip("x", {0: 1.0, 1: 1.0, 3: 0.5, 4: 0.501, 6: 0.0})
    assert in_words(strip) == "100 % in layers 0 to 1, 50 % in layers 3 to 4, 0 % in layer 6"
    many = Strip("x", {i: i / 20 for i in range(20)})
    assert in_words(many) == "between 0 % and 95 % in 20 layers"
    (drawn,) = Tags(svg(strip, 8, EVIL)).named("svg")
    assert drawn["aria-label"].startswith(f"{EVIL}, x: 100 %") and drawn["viewbox"] == "0 0 8 1"
    assert "<script" not in svg(strip, 8, EVIL)
