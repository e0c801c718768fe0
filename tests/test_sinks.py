"""Received attention against the whole matrix, and the page that shows it."""

import json

import numpy as np
import pytest
import torch
from miniatures import IMAGE, MINIATURES, text_inputs, vision_inputs
from typer.testing import CliRunner

import infer_patch
from infer_patch.cli import app
from infer_patch.errors import PatchError, UnsupportedCallError, UnsupportedModelError
from infer_patch.evals.sinks import MIN_QUERIES, Sinks, find_sinks
from infer_patch.kernels.received_attention import received_attention, reference
from infer_patch.report import sinks_page
from infer_patch.report.token_pictures import heated
from infer_patch.visual_grid import Grid


@pytest.mark.parametrize("window", [None, 1, 7, 200])
@pytest.mark.parametrize("queries, rows", [(50, 128), (50, 16), (50, 50), (13, 4), (1, 128)])
def test_received_attention_block_by_block(queries, rows, window):
    rng = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, queries, 8, generator=rng), torch.randn(2, 2, 50, 8, generator=rng)
    found, seen_by = received_attention(q, k, 0.5, window, rows)
    expected, expected_by = reference(q, k, 0.5, window)
    torch.testing.assert_close(found, expected)
    assert torch.equal(seen_by, expected_by)
    torch.testing.assert_close((found * seen_by).sum(-1), torch.full((2, 4), float(queries)))  # rows sum to 1


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "llava", "qwen2_vl"])
def test_what_is_measured_is_the_models_own_attention(family):
    mini = MINIATURES[family]
    inputs = vision_inputs(mini, images=(1,)) if mini.kind == "vision" else text_inputs(mini, lengths=(40,))
    model = mini.build()
    found = find_sinks(model, inputs)
    assert not infer_patch.is_patched(model)
    tokens = inputs["input_ids"].shape[1]
    out = mini.build(attn_implementation="eager")(**inputs, output_attentions=True, use_cache=False)
    for layer, attention in enumerate(out.attentions):
        seen_by = (attention[0, 0] > 0).sum(0)
        torch.testing.assert_close(found.received[layer], attention[0].sum(1) / seen_by, atol=1e-5, rtol=1e-4)
        assert torch.equal(found.seen_by[layer], seen_by)
    assert found.received.shape == (4, 4, tokens)
    assert torch.equal(found.image >= 0, inputs["input_ids"][0] == IMAGE)


def made(**places):
    """One layer of two heads over 40 tokens; received attention by place."""
    received = torch.zeros(1, 2, 40)
    for name, value in places.items():
        head, token = map(int, name[1:].split("_"))
        received[0, head, token] = value
    seen_by = torch.arange(40, 0, -1)[None]
    return Sinks(received, seen_by, torch.arange(40), torch.full((40,), -1), 0.1)


def test_sinks_are_above_the_threshold_and_seen_often_enough():
    sinks = made(h0_0=0.5, h1_0=0.3, h1_5=0.11, h0_6=0.1, h0_39=1.0, h0_24=0.2, h0_25=0.2)
    assert MIN_QUERIES == 40 - 24
    assert sinks.to_list() == [[0, 0, 0, 0.5], [0, 0, 24, 0.2], [0, 1, 0, 0.3], [0, 1, 5, 0.11]]
    assert sinks.heads_per_token()[[0, 5, 6, 24, 25, 39]].tolist() == [2, 1, 0, 1, 0, 0]
    assert sinks.mean_received(0, 1)[0] == pytest.approx(0.3) and sinks.mean_received()[39] == 0


@torch.no_grad()
def test_a_planted_sink_is_found_where_it_was_planted():
    """One token whose key points where all queries of one key head point."""
    mini = MINIATURES["llama"]
    model, inputs = mini.build(), text_inputs(mini, lengths=(60,))
    inputs["input_ids"][inputs["input_ids"] == 7] = 8
    inputs["input_ids"][0, 20] = 7
    hidden = model.model.embed_tokens.weight
    hidden[:, :4] = 0
    hidden[7, 0] = 60.0  # read by the keys of one head; a constant in another place is read by its queries
    hidden[:, 1] = 3.0
    attention, width = model.model.layers[1].self_attn, 16
    model.model.layers[0].self_attn.o_proj.weight[:4] = 0
    model.model.layers[0].mlp.down_proj.weight[:4] = 0
    slow = width // 2 - 1  # the slowest rotary pair hardly turns
    for projection, rows, column in ((attention.q_proj, (2, 3), 1), (attention.k_proj, (1,), 0)):
        for head in rows:
            projection.weight[head * width : (head + 1) * width] = 0
            projection.weight[head * width + slow, column] = 30.0
    sinks = find_sinks(model, inputs, threshold=0.5)
    assert sinks.is_sink[1, :, 20].tolist() == [False, False, True, True]
    assert sinks.heads_per_token()[20] >= 2


def test_what_cannot_be_measured_is_refused():
    llama = MINIATURES["llama"]
    model, inputs = llama.build(), text_inputs(llama, lengths=(40,))
    for wrong, words in (
        ((text_inputs(llama, lengths=(40, 20)), 0.1), "one prompt without padding"),
        ((text_inputs(llama, lengths=(16,)), 0.1), "more than 16 are needed"),
        ((inputs, 1.5), "above 0 and below 1"),
    ):
        with pytest.raises(PatchError, match=words):
            find_sinks(model, *wrong)
    gemma2 = MINIATURES["gemma2"]
    with pytest.raises(UnsupportedModelError, match="soft-caps"):
        find_sinks(gemma2.build(), text_inputs(gemma2, lengths=(40,)))
    gemma3 = MINIATURES["gemma3"]
    model = gemma3.build()
    with pytest.raises(UnsupportedCallError, match="look forward"):
        find_sinks(model, vision_inputs(gemma3, images=(1,)))
    assert not infer_patch.is_patched(model)


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command_writes_page_and_numbers(folder, tmp_path):
    out = tmp_path / "sinks.html"
    ran = invoke("report", "sinks", folder, "--prompt", "<b>Who & what?</b> " * 4, "--threshold", 0.05, "--out", out)
    assert ran.exit_code == 0, ran.output
    page, numbers = out.read_text("utf-8"), json.loads((tmp_path / "sinks.json").read_text())
    assert "heads have a sink" in ran.output and out.resolve().as_uri() in ran.output
    assert "<b>" not in page and "&lt;" in page and "<script" not in page
    assert len(numbers["tokens"]) == len(numbers["mean_received"]) == len(numbers["heads_per_token"])
    assert sum(numbers["heads_per_token"]) == len(numbers["sinks"]) > 0
    assert numbers["layers"] == numbers["heads"] == 4


@pytest.mark.parametrize(
    "options, words",
    [
        (["--out", "page.txt"], "must be a .html file"),
        (["--layer", 9], "--layer must be 0 to 3"),
        (["--head", -1], "--head must be 0 to 3"),
        (["--threshold", 0], "above 0 and below 1"),
        (["--prompt", "x" * 40, "--prompt-file", "y"], "either --prompt or --prompt-file"),
        (["--prompt", "short"], "more than 16 are needed"),
    ],
)
def test_what_the_command_refuses(folder, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    ran = invoke("report", "sinks", folder, *(["--prompt", "x" * 40] if "--prompt" not in options else []), *options)
    assert ran.exit_code == 2 and words in ran.output and not list(tmp_path.iterdir())


def test_long_prompts_leave_out_the_middle_of_the_map():
    count = 2 * sinks_page.TEXT + 50
    received = torch.zeros(1, 1, count)
    received[0, 0, 0] = 0.9
    sinks = Sinks(received, torch.arange(count, 0, -1)[None], torch.zeros(count).long(), torch.full((count,), -1), 0.1)
    page = sinks_page.render(sinks, ["word "] * count, [], "Long")
    assert "50 tokens left out" in page and page.count("<span") == 2 * sinks_page.TEXT


def test_sinks_in_a_picture_are_framed():
    from PIL import Image

    picture, grid = Image.new("RGB", (30, 20), "black"), Grid(2, 3, leading=1)
    plain = heated(picture, grid, [0.0] * 7)
    framed = heated(picture, grid, [0.0] * 7, [True] + [False] * 4 + [True, False])
    differs = torch.from_numpy(np.asarray(plain) != np.asarray(framed)).any(-1)
    rows, columns = differs.nonzero().T
    cell = plain.width // 3
    assert rows.min() == cell and columns.min() == cell and columns.max() == 2 * cell - 1
    assert framed.getpixel((cell, cell)) == (255, 255, 255)
