"""Sinks planted in the demo vision-language model: VAR finds them, and does to the attention what it says."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infer_patch.demo_vlm import load_demo_vlm
from infer_patch.evals.pope_scenes import PopeScenes
from infer_patch.evals.prompts import encode

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(FOLDER))
    try:
        import planted_sinks
    finally:
        sys.path.remove(str(FOLDER))
    yield planted_sinks
    for name in ("planted_sinks", "planted"):
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def made(script):
    demo, processor = load_demo_vlm()
    item = PopeScenes(scenes=1).items(processor, demo)[0]
    return demo, processor, script.build(processor, demo), encode(item.prompt, processor, demo)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*never took effect")
def test_the_widened_model_is_the_demo_model(script, made):
    demo, _, twins, inputs = made
    wide, expected = twins["widened"], demo(**inputs).logits
    torch.testing.assert_close(wide(**inputs).logits, expected, atol=1e-4, rtol=0)
    said = script.words(demo, inputs, replace(script.OFFICIAL, dims=tuple(range(256))))
    assert "NEVER FIRED" in said and "no token can be a sink: tau 20 is not below sqrt(256)" in said
    said = script.words(wide, inputs, script.OFFICIAL)
    assert "NEVER FIRED" in said and "(no visual token is a sink)" in said
    for name in ("planted", "pulling"):  # without the values in the tokens it is still the same model
        twin = twins[name]
        assert (twin(**inputs).logits - expected).abs().max() > 0.01
        hook = twin.model.multi_modal_projector._forward_hooks
        kept, row = dict(hook), twin.model.language_model.embed_tokens.weight[1].clone()
        hook.clear()
        twin.model.language_model.embed_tokens.weight[1, list(script.DIMS)] = 0
        torch.testing.assert_close(twin(**inputs).logits, expected, atol=1e-4, rtol=0)
        hook.update(kept)
        twin.model.language_model.embed_tokens.weight[1] = row


@pytest.mark.parametrize("name, layer", [("planted", 3), ("pulling", 5)])
def test_attention_moves_by_the_formula_from_the_planted_tokens(script, made, name, layer):
    demo, _, twins, inputs = made
    found, before, after, edited = script.look(twins[name], inputs, layer)
    places = (inputs["input_ids"][0] == demo.config.image_token_id).nonzero()[list(script.PLACES), 0].tolist()
    assert found["sinks"] == [0, *places] and found["keys_that_lost_attention_are_the_planted"]
    assert found["reported"]["visual_sinks"] == 4 and found["reported"]["text_sinks"] == 1
    assert found["reported"]["rows"] == sum(found["rows_by_head"]) > 0
    assert found["reported"]["rows_asked"] > found["reported"]["rows"]
    assert found["error_to_formula"] < 2e-5 and found["error_of_row_sums"] < 2e-6
    assert 0 < found["content_left_in_sinks"] < 0.1 and found["least_phi_of_sinks"] > 20
    assert found["other_rows_bit_equal"] and found["text_keys_bit_equal"]
    moved = found["mass_before"]["sinks"] - found["mass_after"]["sinks"]
    assert moved == pytest.approx(0.4 * found["mass_before"]["sinks"], abs=1e-5) and moved > 0
    gained = found["mass_after"]["other_visual"] - found["mass_before"]["other_visual"]
    assert gained == pytest.approx(moved, abs=1e-5)
    if name == "pulling":
        assert found["asked_rows_mass_on_sinks"] > 0.05 and (after - before)[edited].abs().max() > 0.01


@pytest.mark.slow
def test_a_try_of_the_whole_script(script, made, tmp_path, monkeypatch):
    demo, processor, twins, _ = made
    monkeypatch.setattr(script, "load_demo_vlm", lambda: (demo, processor))
    monkeypatch.setattr(script, "build", lambda *given: twins)
    script.main(["--few", "--looked-at", "1", "--scenes", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "result.json").read_text())
    calibrated = found["calibrate"]
    assert calibrated["planted"]["dims"] == calibrated["pulling"]["dims"] == list(script.DIMS)
    assert calibrated["demo-vlm"]["dims"] == calibrated["widened"]["dims"] == []
    assert found["questions"]["widened_answers_equal"] and found["questions"]["items"] == 4
    assert set(found["questions"]["sides"]) >= {"demo", "planted, var", "pulling, var moving 0.6", "pulling hard, var"}
    assert (tmp_path / "planted-sinks.png").read_bytes()[1:4] == b"PNG"
