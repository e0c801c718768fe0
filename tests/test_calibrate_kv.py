"""Calibrating the cache: the integer program, what is measured, and the policy that comes out."""

import json

import numpy as np
import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

import infer_patch
from infer_patch.calibration.kv import Settings, calibrate, cheapest, policy_plan
from infer_patch.cli import app
from infer_patch.errors import PatchError
from infer_patch.evals.drift import distances
from infer_patch.evals.needle import NeedleGrid
from infer_patch.patches import KVQuant

QUICK = dict(lengths=(600,), items=1, answer_tokens=4)


@pytest.fixture(scope="module")
def found(tiny):
    return calibrate(*tiny, Settings(**QUICK, max_drift=0.01))


def test_the_cheapest_choice_under_a_limit():
    costs = np.array([[8.0, 4.0, 2.0]] * 3)
    drift = np.array([[0.0, 1.0, 5.0], [0.0, 0.1, 0.2], [0.0, 2.0, 2.1]])
    assert cheapest(costs, drift, 0.0) == [0, 0, 0]
    assert cheapest(costs, drift, 0.2) == [0, 2, 0]
    assert cheapest(costs, drift, 1.3) == [1, 2, 0]
    assert cheapest(costs, drift, 2.3) == [0, 2, 2]
    assert cheapest(costs, drift, 100.0) == [2, 2, 2]
    assert cheapest(drift, costs, 14.0) == [0, 2, 1] or drift[[0, 1, 2], cheapest(drift, costs, 14.0)].sum() <= 1.2
    with pytest.raises(PatchError, match=r"no policy keeps the limit of 5: the least there is amounts to 6"):
        cheapest(drift, costs, 5.0)


def test_what_is_measured(found):
    _, document = found
    drift = {width: np.array(list(row.values())) for width, row in document["drift"].items()}
    assert list(drift) == ["8", "4", "4v2", "4/2", "2"] and all(len(row) == 4 for row in drift.values())
    assert (drift["8"] > 0).all()
    assert drift["8"].sum() * 10 < drift["4"].sum() and drift["4"].sum() * 3 < drift["2"].sum()
    held = document["bytes_per_token"]
    assert held["16"] == 2 * 2 * 16 * 4 and held["16"] > held["8"] > held["4"] > held["4v2"] > held["2"]
    assert held["4"] > held["4/2"] > held["2"]


def test_one_layer_is_measured_as_if_it_alone_were_packed(found, tiny):
    """The layers come from a run in which all are packed; a run that packs only this one says the same."""
    model, tokenizer = tiny
    item = NeedleGrid((600,), (0.5,), seed=0, max_new_tokens=4).items(tokenizer, model)[0]
    ids, asked = torch.tensor([item.prompt.input_ids]), item.prompt.question_tokens
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids[:, :-asked], past_key_values=cache)
        out = model(ids[:, -asked:], past_key_values=cache).logits[0]
        rest, expected = ids[:, -asked:], out
        for _ in range(4):
            rest = torch.cat([rest, expected[None, -1:].argmax(-1)], 1)
            expected = torch.cat([expected, model(rest[:, -1:], past_key_values=cache).logits[0]])
        with infer_patch.patch(model, KVQuant(bits=2, layers=(1,))):
            cache = DynamicCache(config=model.config)
            model(ids[:, :-asked], past_key_values=cache)
            kl = distances(expected, model(rest, past_key_values=cache).logits[0]).kl
    assert found[1]["drift"]["2"]["1"] == pytest.approx(sum(kl) / len(kl), rel=1e-3)


def test_the_policy_keeps_its_limit(found, tiny):
    plan, document = found
    assert document["kept"] and document["measured_drift"] <= 0.01
    assert document["times_smaller"] > 1.5
    widths = {width: [] for width in ("16", "8", "4", "4v2", "4/2", "2")}
    for layer, width in document["policy"].items():
        widths[width].append(int(layer))
    assert [list(m.layers) for m in plan] == [layers for width, layers in widths.items() if layers and width != "16"]
    assert infer_patch.Plan.from_yaml(plan.to_yaml()) == plan
    with infer_patch.patch(tiny[0], plan) as handle:
        tiny[0].generate(torch.randint(10, 200, (1, 400)), max_new_tokens=2, do_sample=False)
        assert handle.report().methods["kv_quant"]["fired"]


def test_a_limit_on_bytes(tiny):
    _, document = calibrate(*tiny, Settings(**QUICK, max_drift=None, times_smaller=5.0))
    assert document["times_smaller"] >= 5.0 and document["kept"]
    total = sum(document["drift"][width][layer] for layer, width in document["policy"].items() if width != "16")
    assert total == pytest.approx(document["expected_drift"])


def test_layers_in_their_own_precision_are_left_out():
    settings = Settings(**QUICK)
    plan = policy_plan(settings, {0: "16", 1: "2", 2: "4/2", 3: "2"})
    assert plan.methods == (
        KVQuant(bits=4, other_bits=2, important=0.4, layers=(2,)),
        KVQuant(bits=2, layers=(1, 3)),
    )
    assert policy_plan(settings, {0: "16"}).methods == ()


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"lengths": (100,)}, "need texts of 300 tokens or more"),
        ({"max_drift": 0.0}, "must be above 0 nats"),
        ({"max_drift": 0.1, "times_smaller": 2.0}, "one of the two"),
        ({"max_drift": None}, "one of the two"),
    ],
)
def test_settings_are_checked(settings, complaint):
    with pytest.raises(PatchError, match=complaint):
        Settings(**{**QUICK, **settings})


def test_a_patched_model_is_refused(tiny):
    with infer_patch.patch(tiny[0], "identity"), pytest.raises(PatchError, match="this model is patched"):
        calibrate(*tiny, Settings(**QUICK))


def test_the_command(folder, tmp_path):
    out = tmp_path / "policy.yaml"
    arguments = ["calibrate", "kv", str(folder), "--out", str(out), "--lengths", "600", "--items", "1"]
    result = CliRunner().invoke(app, [*arguments, "--answer-tokens", "2", "--smaller", "4"])
    assert result.exit_code == 0, result.output
    document = json.loads(out.with_suffix(".json").read_text())
    assert document["calibration"] == "kv" and document["times_smaller"] >= 4
    assert infer_patch.Plan.load(out).name == "policy"
    assert "times smaller" in result.output
    bad = CliRunner().invoke(app, [*arguments[:3], "--out", str(tmp_path / "x.json")])
    assert bad.exit_code == 2 and "must be a .yaml file" in " ".join(bad.output.split())
