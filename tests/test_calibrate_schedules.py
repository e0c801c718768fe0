"""Calibrating G-Search and P-Sigmoid: questions, quality, the trace, the optimiser, and both commands."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from miniatures import MINIATURES
from typer.testing import CliRunner

import infer_patch
from infer_patch.calibration import keep_schedules, visual_quality
from infer_patch.calibration.bayes import expected_improvement, maximise
from infer_patch.calibration.keep_schedules import Curves, calibrate_g_search, calibrate_p_sigmoid
from infer_patch.calibration.schedule_settings import SearchSettings, SigmoidSettings
from infer_patch.calibration.visual_quality import Quality, Trace
from infer_patch.calibration.visual_questions import Source, questions
from infer_patch.cli import app
from infer_patch.demo_vlm import load_demo_vlm
from infer_patch.errors import PatchError
from infer_patch.evals.generation import forced_choices, generate_batch
from infer_patch.evals.pope_scenes import PopeScenes
from infer_patch.evals.visual_cost import cost_ratio
from infer_patch.keep_schedule import Schedule, read_schedule
from infer_patch.patches import GSearch, PSigmoid
from infer_patch.patches.g_search import search

SMALL = Source(pictures=1, held_out=1, batch_size=6)


@pytest.fixture(scope="module")
def demo():
    return load_demo_vlm()


@pytest.fixture(scope="module")
def asked(demo):
    return questions(SMALL, *demo)[0]


# --- questions and quality -------------------------------------------------------------------------------


def test_pictures_to_search_with_are_neither_held_out_nor_those_of_evaluations(demo):
    found, held_out = questions(SMALL, *demo)
    pictures = [{item.group for item in q.items} for q in (found, held_out)]
    assert [len(p) for p in pictures] == [1, 1] and not pictures[0] & pictures[1]
    evaluated = {item.group for seed in range(3) for item in PopeScenes(scenes=20, seed=seed).items(demo[1], demo[0])}
    many = PopeScenes(scenes=20, seed=Source().task().seed).items(demo[1], demo[0])
    assert not evaluated & {item.group for item in many}
    assert questions(SMALL, *demo)[0].digest == found.digest != held_out.digest
    assert found.tokens(infer_patch.families.describe(demo[0])) == (256, pytest.approx(14, abs=6))


def test_forced_choices_follow_the_given_tokens(demo, asked):
    model, _ = demo
    inputs = asked.batches()[0][1]
    answers = generate_batch(model, inputs, 4).ids
    assert forced_choices(model, inputs, answers) == answers
    wrong = [[7, *answer] for answer in answers]
    chosen = forced_choices(model, inputs, wrong)
    for row in range(2):
        ids = torch.cat([inputs["input_ids"][row : row + 1], torch.tensor([wrong[row]])], 1)
        mask = torch.cat([inputs["attention_mask"][row : row + 1], torch.ones(1, len(wrong[row]), dtype=torch.long)], 1)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, pixel_values=inputs["pixel_values"][row : row + 1]).logits
        assert chosen[row] == logits[0, -len(wrong[row]) - 1 : -1].argmax(-1).tolist()


def test_agreement_and_accuracy(demo, asked):
    model, processor = demo
    agreement = Quality(model, processor, asked, "agreement", "instruction")
    none, everything = (256, 256, 0, 0, 0, 0, 0, 0), (256,) * 8
    assert agreement(everything) == 1.0
    with infer_patch.patch(model, GSearch(keep_rate=(1, 1, 0, 0, 0, 0, 0, 0))):
        blind = [row[0] for _, inputs in asked.batches() for row in generate_batch(model, inputs, 1).ids]
    plain = [row[0] for _, inputs in asked.batches() for row in generate_batch(model, inputs, 1).ids]
    share = np.mean([a == b for a, b in zip(blind, plain)])
    assert share < 1 and agreement(none) == pytest.approx(share)
    accuracy = Quality(model, processor, asked, "accuracy", "last")
    right = [
        (processor.decode([token]).strip() == item.reference, sum(item.facts["splits"].values()))
        for token, item in zip(plain, asked.items)
    ]
    assert accuracy(everything) == pytest.approx(sum(r * n for r, n in right) / sum(n for _, n in right))


def test_what_cannot_be_measured_is_refused(demo, asked):
    model, processor = demo
    with pytest.raises(PatchError, match="metric must be one of agreement, accuracy"):
        Quality(model, processor, asked, "bleu", "last")
    with infer_patch.patch(model, "fastv"), pytest.raises(PatchError, match="this model is patched"):
        Quality(model, processor, asked, "agreement", "last")
    with pytest.raises(PatchError, match="llama has none"):
        Quality(MINIATURES["llama"].build(), processor, asked, "agreement", "last")
    for wrong in ({"pictures": 0}, {"held_out": -1}, {"files": ("x",)}):
        with pytest.raises(PatchError, match="pictures"):
            Source(**wrong)
    for wrong in ({"eps": 2}, {"grid": 0}, {"first": 0}, {"query": "x"}, {"least": -1}):
        with pytest.raises(PatchError, match=next(iter(wrong))):
            SearchSettings(**wrong)
    for wrong in ({"budget": 1.0}, {"starts": 0}):
        with pytest.raises(PatchError, match=next(iter(wrong))):
            SigmoidSettings(**wrong)


# --- the trace -------------------------------------------------------------------------------------------


def oracle(model, asked, essential):
    """Stands in for `Quality`: 1 where every layer has what it needs."""

    class Oracle(SimpleNamespace):
        def __call__(self, counts):
            self.calls.append(counts)
            return float(all(m >= e for m, e in zip(counts, essential)))

    parts = SimpleNamespace(num_layers=len(essential))
    return Oracle(calls=[], model=model, asked=asked, metric="agreement", query="last", visual=16, parts=parts)


def test_a_search_goes_on_from_its_trace_to_the_same_schedule(demo, asked, tmp_path):
    essential = (16, 16, 11, 6, 6, 1)
    file = tmp_path / "trace.jsonl"

    def found(trace):
        return search(trace, 6, 16, trace.full)

    first = Trace(oracle(demo[0], asked, essential), file)
    assert found(first) == essential and first.measured == len(first.asked) == len(first.quality.calls)
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:5]) + "\n" + lines[5][:9])  # stopped while it wrote
    resumed = Trace(oracle(demo[0], asked, essential), file)
    assert found(resumed) == essential
    assert resumed.measured == first.measured - 4 and resumed.asked == first.asked
    assert [json.loads(line) for line in file.read_text().splitlines()] == [json.loads(line) for line in lines]
    again = Trace(oracle(demo[0], asked, (0,) * 6), file)
    assert found(again) == essential and again.quality.calls == []


def test_traces_of_something_else_are_refused(demo, asked, tmp_path):
    file = tmp_path / "trace.jsonl"
    Trace(oracle(demo[0], asked, (16, 16, 3)), file)
    other = oracle(demo[0], asked, (16, 16, 3))
    other.query, other.metric = "instruction", "accuracy"
    with pytest.raises(PatchError, match=r"other values of metric, query\. Name another trace"):
        Trace(other, file)
    file.write_text("no trace\n")
    with pytest.raises(PatchError, match="is no trace of a calibration"):
        Trace(other, file)


# --- Bayesian optimisation -------------------------------------------------------------------------------


def test_expected_improvement_is_the_expectation():
    draws = np.random.default_rng(0).normal(size=400_000)
    for mean, deviation, best in ((0.3, 0.2, 0.5), (1.0, 0.1, 0.2), (-1.0, 0.5, 0.0)):
        expected = np.maximum(mean + deviation * draws - best, 0).mean()
        assert expected_improvement(np.array(mean), np.array(deviation), best) == pytest.approx(expected, abs=2e-3)
    assert expected_improvement(np.array(0.2), np.array(0.0), 0.5) == 0


def test_the_optimiser_beats_random_points_and_keeps_to_what_is_feasible():
    pytest.importorskip("sklearn")

    def objective(point):
        asked.append(point)
        return -((point[0] - 0.3) ** 2) - 2 * (point[1] - 0.6) ** 2

    def feasible(point):
        return point[0] + point[1] <= 1

    asked = []
    tried = maximise(objective, feasible, 2, given=[(0.1, 0.1), (0.9, 0.9)], starts=5, iterations=8)
    assert len(tried) == 13 == len(asked) and tried[0][0] == (0.1, 0.1)
    assert all(feasible(point) for point in asked)
    drawn = np.random.default_rng(1).random((13 * 50, 2))
    at_random = np.mean([max(map(objective, block[block.sum(1) <= 1])) for block in drawn.reshape(50, 13, 2)])
    assert max(value for _, value in tried) > at_random / 4  # both are below 0
    assert maximise(objective, feasible, 2, [(0.1, 0.1)], 5, 3) == maximise(objective, feasible, 2, [(0.1, 0.1)], 5, 3)
    assert maximise(objective, lambda point: False, 2) == []


def test_without_scikit_learn_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(infer_patch.availability, "installed_version", lambda name: None)
    with pytest.raises(ImportError, match=r"Bayesian optimisation needs .*scikit-learn.*infer_patch\[calibrate\]"):
        maximise(lambda point: 0.0, lambda point: True, 1)


def test_curves_as_points_of_the_cube():
    curves = Curves(0.4, 8, 2)
    for parameters in ((1.0, 0.0, 40.0), (0.7, 0.3, 5.0), (0.5, 0.0, 2.0)):
        assert curves.parameters(curves.point(*parameters)) == pytest.approx(parameters)
    point = (0.8, 0.2, 0.6)
    near = curves.nearest(Schedule(curves.rates(point)))
    distance = sum((a - b) ** 2 for a, b in zip(curves.rates(near), curves.rates(point)))
    assert distance < 0.005
    with pytest.raises(PatchError, match="has 3 layers, and this model 8"):
        curves.nearest(Schedule((1.0, 1.0, 0.5)))


# --- all of it -------------------------------------------------------------------------------------------

QUICK = SearchSettings(source=SMALL, eps=0.2, grid=128, group=3, confirm=0)


def test_a_search_on_the_demo_model(demo, tmp_path, monkeypatch):
    model, processor = demo
    measured, original, steps = [], visual_quality.Quality.__call__, []

    def interrupted(self, counts):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(counts)
        return original(self, counts)

    monkeypatch.setattr(visual_quality.Quality, "__call__", interrupted)
    file = tmp_path / "trace.jsonl"
    with pytest.raises(KeyboardInterrupt):
        calibrate_g_search(model, processor, QUICK, file, "demo-vlm")
    assert not infer_patch.api.is_patched(model)
    monkeypatch.setattr(visual_quality.Quality, "__call__", original)
    document = calibrate_g_search(model, processor, QUICK, file, "demo-vlm", lambda *step: steps.append(step))
    assert steps[-1][0] == steps[-1][1] and steps[-1][2] == "done"
    assert document["counts"][:2] == [256, 256] and len(set(document["counts"][2:5])) == 1
    assert document["q"] >= document["q_full"] - 0.2 and document["q_full"] == 1.0
    assert document["held_out"]["questions"] > 5 and 0 <= document["held_out"]["q"] <= 1
    assert document["model"] == "demo-vlm" and document["cost"] < 1 and document["metric"] == "agreement"
    schedule = tmp_path / "schedule.json"
    schedule.write_text(json.dumps(document))
    assert read_schedule(schedule, "g_search").rates == tuple(c / 256 for c in document["counts"])
    again = calibrate_g_search(model, processor, QUICK, file, "demo-vlm")
    assert again == document


def test_a_curve_for_the_demo_model(demo, tmp_path):
    pytest.importorskip("sklearn")
    settings = SigmoidSettings(source=dataclasses.replace(SMALL, held_out=0), budget=0.45, starts=3, iterations=1)
    document = calibrate_p_sigmoid(*demo, settings, tmp_path / "trace.jsonl", "demo-vlm")
    assert document["mean_rate"] == pytest.approx(0.45, abs=0.5 / 256)
    assert document["held_out"] is None and document["params"]["curves"] == 4
    rows = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()[1:]]
    assert document["q"] == pytest.approx(max(row["q"] for row in rows if min(row["counts"]) < 256), abs=1e-6)
    schedule = tmp_path / "schedule.json"
    schedule.write_text(json.dumps(document))
    with infer_patch.patch(demo[0], PSigmoid(schedule_file=str(schedule))) as handle:
        assert handle._engine.first_reduced == 2
    with pytest.raises(PatchError, match=r"no curve keeps a budget of 0.2 here: 8 layers, .* reach 0.250 to"):
        calibrate_p_sigmoid(*demo, dataclasses.replace(settings, budget=0.2))


def test_the_commands(tmp_path, monkeypatch):
    out, asked = tmp_path / "s.json", {}
    document = {
        **{"method": "g_search", "model": "demo-vlm", "num_layers": 3, "n_visual_ref": 16, "first": 1, "query": "last"},
        **{"keep_rate": [1.0, 0.5, 0.5], "counts": [16, 8, 8], "mean_rate": 2 / 3, "cost": 0.7, "metric": "agreement"},
        **{"q_full": 1.0, "q": 0.99, "held_out": None, "evaluations": 5},
    }

    def calibrate(model, processor, settings, trace, model_id, on_progress):
        asked.update(settings=settings, trace=trace, model_id=model_id)
        return document

    monkeypatch.setattr(keep_schedules, "calibrate_g_search", calibrate)
    options = ["--pictures", "3", "--eps", "0.05", "--group", "2", "--query", "last", "--first", "1"]
    result = CliRunner().invoke(app, ["calibrate", "g-search", "demo-vlm", "--out", str(out), *options])
    assert result.exit_code == 0, result.output
    assert "1-2" in result.output and "50.0%" in result.output and "schedule_file: " in result.output
    assert asked["settings"] == SearchSettings(source=Source(pictures=3), eps=0.05, group=2, query="last", first=1)
    assert asked["trace"] == tmp_path / "s.trace.jsonl" and asked["model_id"] == "demo-vlm"
    assert json.loads(out.read_text()) == document and len(out.read_text().splitlines()) == len(document) + 2
    for wrong in (["--out", str(tmp_path / "s.txt")], ["--out", str(out), "--query", "x"]):
        assert CliRunner().invoke(app, ["calibrate", "g-search", "demo-vlm", *wrong]).exit_code == 2
    wrong = ["calibrate", "p-sigmoid", "demo-vlm", "--out", str(out), "--budget", "1.5"]
    assert CliRunner().invoke(app, wrong).exit_code == 2


def test_the_cost_model_gives_the_published_ratios():
    """Text of 36 tokens, 576 visual ones: from the table of FastV's cost model."""
    for (layers, hidden, intermediate), row in {
        (32, 4096, 11008): {(2, 0.5): 0.552, (2, 0.75): 0.332, (3, 0.5): 0.567, (5, 0.5): 0.596},
        (40, 5120, 13824): {(2, 0.5): 0.547, (2, 0.75): 0.325, (3, 0.5): 0.559, (5, 0.5): 0.583},
    }.items():
        for (layer, ratio), expected in row.items():
            counts = [576] * layer + [576 * (1 - ratio)] * (layers - layer)
            assert cost_ratio(counts, 36, 576, hidden, intermediate) == pytest.approx(expected, abs=5e-4)
