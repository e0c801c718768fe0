"""Calibrating DyVTE: features and labels against what gates see and against masked runs; fitting; the command."""

import dataclasses

import pytest
import torch
from typer.testing import CliRunner

import infer_patch
from infer_patch.artifacts import save_artifact
from infer_patch.calibration import dyvte as calibration
from infer_patch.calibration.dyvte import (
    GateSettings,
    answer_tokens,
    calibrate_dyvte,
    class_accuracy,
    fit_gate,
    sample_batch,
)
from infer_patch.calibration.visual_questions import Source, questions
from infer_patch.cli import app
from infer_patch.demo_vlm import load_demo_vlm
from infer_patch.errors import PatchError
from infer_patch.families import describe
from infer_patch.patches import DyVTE, dyvte
from infer_patch.patches.dyvte import exit_labels, gate_features, gate_logits

QUICK = GateSettings(source=Source(pictures=1, held_out=1, batch_size=12), hidden=4, steps=20)


@pytest.fixture(scope="module")
def demo():
    return load_demo_vlm()


@pytest.fixture(scope="module")
def asked(demo):
    return questions(QUICK.source, *demo)[0]


@pytest.fixture(scope="module")
def sampled(demo, asked):
    """The first five questions, with answers of different lengths."""
    model, processor = demo
    answers = [answer_tokens(processor, text) for text in ("yes", "no red star", "no", "yes", "a b no")]
    return answers, sample_batch(model, describe(model), asked.encoded[:5], answers, asked.pad_token_id)


def test_references_end_with_the_end_token(demo):
    _, processor = demo
    ids = answer_tokens(processor, "yes")
    assert processor.decode(ids[:-1]).strip() == "yes" and ids[-1] == processor.tokenizer.eos_token_id


def test_features_are_those_that_gates_see_at_the_prompt(demo, asked, sampled, tmp_path, monkeypatch):
    model, _ = demo
    seen = []
    monkeypatch.setattr(dyvte, "gate_features", lambda *a: seen.append(gate_features(*a)) or seen[-1])
    tensors = {f"gates.{i}.{n}": torch.zeros(s) for i in range(7) for n, s in (("w1", (1, 512)), ("w2", (2, 1)))}
    gates = save_artifact(tmp_path / "gates", "dyvte", tensors, {"features": "text_mean+last"}, model)
    for row in (0, 1, 4):
        seen.clear()
        with infer_patch.patch(model, DyVTE(gates=str(gates), threshold=0.9)), pytest.warns(UserWarning):
            with torch.no_grad():
                model(**asked.encoded[row])
            infer_patch.unpatch(model)
        expected = torch.cat(seen)
        torch.testing.assert_close(sampled[1]["features"][row].float(), expected, atol=2e-2, rtol=1e-2)


@torch.no_grad()
def test_labels_are_those_of_runs_whose_visual_columns_are_masked(demo, asked, sampled):
    model, _ = demo
    text, answers = model.model.language_model, sampled[0]
    for row in (0, 1, 4):
        prompt, answer = asked.encoded[row], torch.tensor([answers[row]])
        ids = torch.cat([prompt["input_ids"], answer], 1)
        n, length = ids.shape[1], answer.shape[1]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": prompt["pixel_values"]}
        full = model(**inputs).logits[:, -length - 1 : -1]
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        masked = (causal & (ids[0] != model.config.image_token_id)) | torch.eye(n, dtype=torch.bool)
        for layer in range(7):
            hooks = [
                module.register_forward_pre_hook(
                    lambda m, a, kw, masked=masked: (a, {**kw, "attention_mask": masked[None, None]}),
                    with_kwargs=True,
                )
                for module in text.layers[layer + 1 :]
            ]
            cut = model(**inputs).logits[:, -length - 1 : -1]
            for hook in hooks:
                hook.remove()
            assert exit_labels(full, cut, answer).tolist() == [bool(sampled[1]["labels"][row, layer])]
    found = sampled[1]["labels"]
    assert found.any() and not found.all()


def test_a_gate_learns_what_can_be_told_apart():
    torch.manual_seed(0)
    labels = torch.arange(80) % 4 == 0
    features = torch.randn(80, 20) * 50
    features[:, 3] += labels * 400.0
    w1, w2 = fit_gate(features, labels, dataclasses.replace(QUICK, hidden=16, steps=200, learning_rate=1e-3))
    assert w1.shape == (16, 20) and w2.shape == (2, 16)
    assert class_accuracy(features, labels, w1, w2) == {
        "stay": {"samples": 60, "right": 1.0},
        "leave": {"samples": 20, "right": 1.0},
    }
    again = fit_gate(features, labels, dataclasses.replace(QUICK, hidden=16, steps=200, learning_rate=1e-3))
    assert torch.equal(w1, again[0]) and torch.equal(w2, again[1])
    one_class = class_accuracy(features, torch.ones(80, dtype=torch.bool), w1, -w2)
    assert one_class["stay"] == {"samples": 0, "right": None} and one_class["leave"]["right"] == 0.75
    assert gate_logits(features, w1, w2).shape == (80, 2)


def test_an_interrupted_calibration_goes_on(demo, tmp_path, monkeypatch):
    model, processor = demo
    runs, original = [], calibration.sample_batch

    def interrupted(*args):
        if len(runs) == 1:
            raise KeyboardInterrupt
        runs.append(args)
        return original(*args)

    monkeypatch.setattr(calibration, "sample_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate_dyvte(model, processor, QUICK, tmp_path)
    monkeypatch.setattr(calibration, "sample_batch", lambda *args: runs.append(args) or original(*args))
    steps = []
    tensors, meta = calibrate_dyvte(model, processor, QUICK, tmp_path, "demo-vlm", lambda *step: steps.append(step))
    batches = steps[-1][1]
    assert len(runs) == batches and steps[-1] == (batches, batches, "done")
    runs.clear()
    wider, _ = calibrate_dyvte(model, processor, dataclasses.replace(QUICK, hidden=5), tmp_path, "demo-vlm")
    assert runs == [] and wider["gates.6.w1"].shape == (5, 512) and tensors["gates.6.w2"].shape == (2, 4)
    assert meta["model"] == "demo-vlm" and list(meta["class_accuracy"]) == [str(i) for i in range(7)]
    held_out = meta["class_accuracy"]["3"]["held_out"]
    assert held_out["stay"]["samples"] + held_out["leave"]["samples"] > 5
    folder = save_artifact(tmp_path / "gates", "dyvte", tensors, meta, model)
    with infer_patch.patch(model, DyVTE(gates=str(folder), threshold=0, min_layer=6)) as handle:
        assert handle._engine.first_reduced == 7
    with pytest.raises(PatchError, match=r"other values of batch_size, questions\. Name another work folder"):
        other = dataclasses.replace(QUICK, source=Source(pictures=1, held_out=1, batch_size=11, seed=1))
        calibrate_dyvte(model, processor, other, tmp_path)


def test_what_makes_no_sense_is_refused(demo, tmp_path):
    for wrong in ({"hidden": 0}, {"steps": 0}, {"learning_rate": 0}, {"source": Source(held_out=0)}):
        with pytest.raises(PatchError, match=r"hidden width and steps|held-out pictures"):
            GateSettings(**wrong)
    with infer_patch.patch(demo[0], "fastv"), pytest.raises(PatchError, match="this model is patched"):
        calibrate_dyvte(*demo, QUICK, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_the_command(tmp_path, monkeypatch):
    tensors = {"gates.0.w1": torch.zeros(1, 512), "gates.0.w2": torch.zeros(2, 1)}
    rows = {"stay": {"samples": 3, "right": 0.5}, "leave": {"samples": 0, "right": None}}
    monkeypatch.setattr(
        calibration,
        "calibrate_dyvte",
        lambda *args: (tensors, {"class_accuracy": {"0": {"fit": rows, "held_out": rows}}}),
    )
    result = CliRunner().invoke(app, ["calibrate", "dyvte", "demo-vlm", "--out", str(tmp_path / "gates")])
    assert result.exit_code == 0, result.output
    assert "50.0%" in result.output and "gates: " in result.output
    assert (tmp_path / "gates" / "artifact.safetensors").exists()
    wrong = str(tmp_path / "none" / "gates")
    assert CliRunner().invoke(app, ["calibrate", "dyvte", "demo-vlm", "--out", wrong]).exit_code == 2
