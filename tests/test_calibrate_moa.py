"""Calibrating MoA: influence against finite differences, the search against brute force, resuming."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
import torch
from miniatures import MINIATURES, text_inputs
from typer.testing import CliRunner

import infer_patch
from infer_patch.calibration import moa as calibration
from infer_patch.calibration.moa import calibrate
from infer_patch.calibration.moa_influence import answer_loss, block_influence, prompt_influence, weight_influence
from infer_patch.calibration.moa_prompts import make_example, prompt_tokens
from infer_patch.calibration.moa_rules import candidates, densities, key_heads, rule_losses
from infer_patch.calibration.moa_settings import Settings
from infer_patch.calibration.moa_solver import Problem, Solution, Solver, not_dominated, pareto_plans
from infer_patch.cli import app
from infer_patch.errors import PatchError
from infer_patch.families import describe
from infer_patch.kernels.block_mask import sink_window_blocks
from infer_patch.patches import MoA, SinkWindow
from infer_patch.patches.moa import read_plan
from infer_patch.spans import window_blocks

QUICK = Settings(lengths=(512, 640), items=2, answer_tokens=8, intervals=2, validation_items=1, validation_plans=2)


# --- influence -------------------------------------------------------------------------------------------


def softmax_rows(scores):
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


def test_influence_is_the_slope_towards_the_row_without_a_weight():
    torch.manual_seed(0)
    scores, values = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)

    def loss(weights):
        return (weights @ values).sin().square().sum()

    a = softmax_rows(scores).requires_grad_()
    (g,) = torch.autograd.grad(loss(a), a)
    a = a.detach()
    found = weight_influence(a, g)
    for t, j in torch.ones(6, 6).tril().nonzero().tolist():
        without = a.clone()
        without[t, j] = 0
        if t > 0:  # the first row has nothing to renormalise
            without[t] /= without[t].sum()
        step = 1e-5
        slope = (loss(a + step * (without - a)) - loss(a - step * (without - a))) / (2 * step)
        assert found[t, j] == pytest.approx(float(slope), rel=1e-4, abs=1e-6), (t, j)


def test_influence_is_exact_for_a_linear_loss_and_finite_where_one_weight_is_everything():
    a = softmax_rows(torch.tensor([[0.0, 0, 0], [50, 0, 0], [1, 2, 3]]))
    g = torch.tensor([[1.0, 0, 0], [2, 5, 0], [1, -1, 4]])
    found = weight_influence(a, g)
    assert found.isfinite().all()
    row = a[2].clone()
    row[1] = 0
    change = (row / row.sum()) @ g[2] - a[2] @ g[2]
    assert found[2, 1] == pytest.approx(float(change), rel=1e-5)
    assert found[0, 0] == -1


@pytest.mark.parametrize("length", [10, 12])
def test_blocks_are_sums_over_the_causal_triangle_of_each_head(length):
    torch.manual_seed(1)
    q, k, v = (torch.randn(h, length, 4) for h in (4, 2, 2))
    a = softmax_rows(q @ k.repeat_interleave(2, 0).transpose(1, 2) * 0.7).requires_grad_()
    output = a @ v.repeat_interleave(2, 0)
    loss = output.sin().sum()
    ga, go = torch.autograd.grad(loss, [a, output])
    found = block_influence(q, k, v, go, scale=0.7, block=4)
    assert found.shape == (4, 3, 3)
    for head in range(4):
        expected = weight_influence(a[head].detach(), ga[head]).tril().abs()
        for i, j in itertools.product(range(3), range(3)):
            part = expected[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].sum()
            assert found[head, i, j] == pytest.approx(float(part), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text", "qwen3_moe"])
def test_gradients_layer_by_layer_are_those_of_ordinary_backpropagation(family, monkeypatch):
    mini = MINIATURES[family]
    model = mini.build()
    model.lm_head.weight.requires_grad_(False) if hasattr(model, "lm_head") else None
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    ids = text_inputs(mini, lengths=(100,))["input_ids"]
    parts = describe(model)
    seen = []

    def spy(q, k, v, gradient, scale, block):
        seen.append(gradient)
        return block_influence(q, k, v, gradient, scale, block)

    monkeypatch.setattr("infer_patch.calibration.moa_influence.block_influence", spy)
    config, hooks = model.config, [len(layer._forward_pre_hooks) for layer in parts.layers]
    influence, loss = prompt_influence(model, parts, ids, answer_tokens=5)
    assert list(influence) == list(parts.full_attention_layers)
    assert model.config is config and hooks == [len(layer._forward_pre_hooks) for layer in parts.layers]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert all(p.grad is None for p in model.parameters())

    # attention output, before the projection: the input of the module that projects it
    outputs = {}
    for number, attention in enumerate(parts.attentions):
        project = getattr(attention, "o_proj", None) or attention.dense

        def keep(module, args, number=number):
            outputs[number] = args[0]
            args[0].retain_grad()

        project.register_forward_pre_hook(keep)
    expected = answer_loss(model, ids, 5)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for gradient, layer in zip(reversed(seen), influence):
        torch.testing.assert_close(gradient.transpose(0, 1).flatten(1), outputs[layer].grad[0], atol=1e-6, rtol=1e-3)


# --- rules -----------------------------------------------------------------------------------------------


def test_candidates():
    rules = candidates((512, 1024, 1536), (3072,))
    assert (0.0, 1.0) in rules
    assert all(a + b * 512 > 0 and a + b * 1536 <= 1536 for a, b in rules)
    blocks = [tuple(window_blocks(a, b, n) for n in (512, 1024, 1536, 3072)) for a, b in rules]
    assert len(set(blocks)) == len(blocks)
    assert any(a < 0 for a, _ in rules)
    published = candidates((2048, 4096, 8192))
    assert {a % 1024 for a, _ in published} == {0} and {b * 8 % 1 for _, b in published} == {0}


def test_density_is_what_a_row_reads_at_most():
    rules = [(0.0, 1.0), (0.0, 0.5), (128.0, 0.0), (-512.0, 0.5)]
    found = densities(rules, (512, 1000))
    for column, rule in enumerate(rules):
        for row, length in enumerate((512, 1000)):
            lists = sink_window_blocks(length, length, 64, [window_blocks(*rule, length)])
            assert found[row, column] == pytest.approx(int(lists.count.max()) / -(-length // 64))


def test_a_rule_loses_the_influence_of_the_blocks_it_does_not_list():
    torch.manual_seed(2)
    rules, length = [(0.0, 1.0), (0.0, 0.5), (128.0, 0.0), (320.0, 0.0)], 640
    influence = torch.rand(2, 3, 10, 10).tril()
    found = rule_losses(influence, rules, length)
    assert found.shape == (2, 3, 4) and (found[..., 0] == 0).all()
    for column, rule in enumerate(rules):
        lists = sink_window_blocks(length, length, 64, [window_blocks(*rule, length)])
        masked = influence.clone()
        for i in range(10):
            masked[:, :, i, lists.idx[0, 0, i, : lists.count[0, 0, i]]] = 0
        np.testing.assert_allclose(found[..., column], masked.sum((2, 3)).numpy(), rtol=1e-5)


def test_query_heads_are_grouped_contiguously():
    influence = torch.tensor([1.0, 2.0, 10.0, 20.0])[None, :, None, None]
    assert key_heads(influence, 2, "sum").flatten().tolist() == [3, 30]
    assert key_heads(influence, 2, "max").flatten().tolist() == [2, 20]


def test_a_local_head_gets_the_shortest_span():
    n, lengths = 24, (1536,)
    distance = (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=0).float()
    influence = torch.stack([torch.exp(-2 * distance), torch.ones(n, n), torch.exp(-0.1 * distance)]).tril()[None]
    rules = candidates(lengths)
    losses = rule_losses(influence, rules, 1536)[None]
    problem = Problem(losses, densities(rules, lengths), np.array([0.6]))
    plan = Solver(problem).minimise(0)
    spans = [window_blocks(*rules[r], 1536) for r in plan.rules[0]]
    assert spans[0] == min(spans) < spans[1] == max(spans)
    assert plan.densities[0] <= 0.6


# --- the search ------------------------------------------------------------------------------------------


def problem(seed, layers=2, heads=3, rules=4, lengths=2, limits=2, max_rules=2, limit=0.6):
    rng = np.random.default_rng(seed)
    share = np.sort(rng.uniform(0.1, 1, (limits, rules)), 1)
    amount, decay = rng.lognormal(0, 1.5, (1, layers, heads, 1)), rng.uniform(0.2, 6, (1, layers, heads, 1))
    losses = amount * (1 - share.mean(0)) ** decay * rng.uniform(0.8, 1.2, (lengths, layers, heads, rules))
    return Problem(losses, share, np.full(limits, limit), max_rules)


def plans_of(given):
    """Every plan that keeps the limits, as (losses, densities)."""
    _, layers, heads, rules = given.losses.shape
    index = np.arange(layers)[:, None], np.arange(heads)
    for choice in itertools.product(range(rules), repeat=layers * heads):
        chosen = np.array(choice).reshape(layers, heads)
        if given.max_rules and any(len(set(row)) > given.max_rules for row in chosen.tolist()):
            continue
        share = given.densities[:, chosen].mean((1, 2))
        if (share <= given.limits + 1e-9).all():
            yield given.losses[:, index[0], index[1], chosen].sum((1, 2)), share


@pytest.mark.parametrize("max_rules", [1, 2, None])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_search_finds_what_brute_force_finds(seed, max_rules):
    given = problem(seed, max_rules=max_rules)
    every = [losses for losses, _ in plans_of(given)]
    if not every:
        assert Solver(given).minimise(0) is None
        return
    solver = Solver(given)
    best = min(losses[0] for losses in every)
    plan = solver.minimise(0)
    assert best * 0.999 <= plan.losses[0] <= best * 1.003  # the integer solver stops within 0.2 %
    assert plan.bound <= best * 1.001
    cap = float(np.median([losses[1] for losses in every]))
    best = min(losses[0] for losses in every if losses[1] <= cap)
    plan = solver.minimise(0, np.array([np.inf, cap]))
    assert best * 0.999 <= plan.losses[0] <= best * 1.003 and plan.losses[1] <= cap * 1.001
    assert solver.minimise(0, np.array([np.inf, 0.5 * min(losses[1] for losses in every)])) is None


@pytest.mark.parametrize("max_rules", [1, 2, None])
def test_columns_come_near_the_bound_and_keep_the_limits(max_rules):
    given = problem(3, layers=12, heads=4, rules=20, lengths=1, limits=3, max_rules=max_rules, limit=0.5)
    plan = Solver(given, enumerate_up_to=0).minimise(0)
    assert plan.bound <= plan.losses[0] <= plan.bound * 1.02
    assert (plan.densities <= 0.5 + 1e-6).all()
    np.testing.assert_allclose(plan.densities, given.densities[:, plan.rules].mean((1, 2)))
    if max_rules:
        assert max(len(set(row)) for row in plan.rules.tolist()) <= max_rules


def test_trades_between_lengths_keep_the_limits_and_none_is_dominated():
    rng = np.random.default_rng(0)
    given = problem(4, layers=4, heads=2, rules=8, lengths=2, max_rules=2)
    given = Problem(given.losses * rng.lognormal(0, 1, (2, 4, 2, 1)), given.densities, given.limits)
    steps = []
    plans = pareto_plans(Solver(given), 3, lambda: steps.append(1))
    assert len(steps) == 2 + 2 * 3 and len(plans) > 2
    for one, other in itertools.permutations(plans, 2):
        assert not ((one.losses <= other.losses).all() and (one.losses < other.losses).any())
    assert all((plan.densities <= 0.6 + 1e-6).all() for plan in plans)


def test_dominated_and_equal_plans_go():
    def plan(*losses):
        return Solution(np.zeros((1, 1), int), np.array(losses, float), np.zeros(1))

    kept = not_dominated([plan(1, 3), plan(2, 2), plan(2, 3), plan(1, 3), plan(3, 1)])
    assert [tuple(p.losses) for p in kept] == [(1, 3), (2, 2), (3, 1)]


# --- all of it -------------------------------------------------------------------------------------------


def test_prompts_fit_their_length_and_end_with_the_models_own_answer(tiny):
    model, tokenizer = tiny
    for number in (0, 1):
        example = make_example(model, tokenizer, 512, number, 8, seed=0)
        prompt = prompt_tokens(tokenizer, 504, number, seed=0)
        assert 450 < example.length <= 512
        assert example.input_ids[0, : -example.answer_tokens].tolist() == prompt
        logits = model(example.input_ids).logits[0, -example.answer_tokens - 1 : -1]
        assert torch.equal(logits.argmax(-1), example.input_ids[0, -example.answer_tokens :])
    assert prompt_tokens(tokenizer, 504, 0, seed=1) != prompt_tokens(tokenizer, 504, 0, seed=0)
    text = "One short sentence stands here.\n\n" * 60
    assert "short sentence" in tokenizer.decode(prompt_tokens(tokenizer, 504, 1, 0, text))


@pytest.fixture(scope="module")
def calibrated(tiny, tmp_path_factory):
    """A finished calibration: its result, its folder and the progress it told of."""
    steps, folder = [], tmp_path_factory.mktemp("calibrated")
    return calibrate(*tiny, QUICK, folder / "work", on_progress=lambda *step: steps.append(step)), folder, steps


def test_an_interrupted_calibration_goes_on_and_ends_with_the_same_plan(tiny, calibrated, tmp_path, monkeypatch):
    measured, original = [], calibration.prompt_influence

    def interrupted(*args):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(args)
        return original(*args)

    monkeypatch.setattr(calibration, "prompt_influence", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(*tiny, QUICK, tmp_path)
    measured.clear()
    assert calibrate(*tiny, QUICK, tmp_path) == calibrated[0]
    assert len(measured) == 1
    looser = calibrate(*tiny, dataclasses.replace(QUICK, density=0.6), tmp_path)  # nothing is measured again
    assert len(measured) == 1 and looser["densities"]["640"] > calibrated[0]["densities"]["640"]
    with pytest.raises(PatchError, match=r"other values of answer_tokens, seed\. Name another work folder"):
        calibrate(*tiny, dataclasses.replace(QUICK, seed=1, answer_tokens=9), tmp_path)


def test_a_plan_keeps_its_density_and_runs(tiny, calibrated):
    model, (document, folder, steps) = tiny[0], calibrated
    assert steps[-1] == (steps[-1][1], steps[-1][1], "done")
    assert document["per"] == "kv" and set(document["densities"]) == {"512", "640", "1280"}
    file = folder / "plan.json"
    file.write_text(json.dumps(document))
    plan = read_plan(file)
    for length, density in document["densities"].items():
        assert plan.density(int(length)) == pytest.approx(density, abs=1e-4) and density <= 0.5
    assert len(document["validation"]["plans_compared"]) <= 2
    assert document["validation"]["loss"] == min(document["validation"]["plans_compared"])
    ids = torch.randint(8, 200, (1, 600))
    with torch.no_grad(), infer_patch.patch(model, MoA(plan_file=str(file), length=640, evict=True)) as handle:
        cache = model(ids).past_key_values
        model(ids[:, :1], past_key_values=cache)
    assert handle.report().methods["moa"]["fired"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lengths": (512, 500)}, "lengths must be different multiples of 64 tokens"),
        ({"lengths": (128,)}, "from 256 up"),
        ({"validation_length": 512}, "none of the profiled lengths"),
        ({"density": 0.0}, "above 0 and up to 1, got 0.0"),
        ({"answer_tokens": 400}, "answers of 400 tokens leave too little"),
        ({"items": 0}, "must be 1 or more"),
        ({"max_rules": 3}, "max_rules must be 1, 2 or None"),
    ],
)
def test_settings_that_make_no_sense(change, message):
    with pytest.raises(PatchError, match=message):
        Settings(**{"lengths": (512, 640), **change})


def test_what_cannot_work_is_refused_before_any_work(tiny, tmp_path):
    model, tokenizer = tiny
    with pytest.raises(
        PatchError, match=r"density of 0\.1 cannot be kept at 512 tokens, where the shortest span is 0\.25"
    ):
        calibrate(model, tokenizer, Settings(lengths=(512, 640), density=0.1), tmp_path / "work")
    with pytest.raises(PatchError, match="this model takes 2,048"):
        calibrate(model, tokenizer, Settings(lengths=(512, 2048)), tmp_path / "work")
    with infer_patch.patch(model, SinkWindow()), pytest.raises(PatchError, match="this model is patched"):
        calibrate(model, tokenizer, QUICK, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_the_command(folder, tmp_path):
    out = tmp_path / "plan.json"
    options = [
        "--lengths",
        "512",
        "--items",
        "1",
        "--answer-tokens",
        "4",
        "--validation-items",
        "1",
        "--max-rules",
        "0",
    ]
    result = CliRunner().invoke(app, ["calibrate", "moa", str(folder), "--out", str(out), *options])
    assert result.exit_code == 0, result.output
    assert re.search(r"plan_file: .*plan\.json", result.output)
    document = json.loads(out.read_text())
    assert read_plan(out).heads == 2 and document["settings"]["max_rules"] is None
    assert (tmp_path / "plan" / "influence-512-0.safetensors").exists()
    assert len(out.read_text().splitlines()) < 100  # a line for each layer
    for wrong in (["--out", str(tmp_path / "plan.txt")], ["--out", str(out), "--lengths", "many"]):
        assert CliRunner().invoke(app, ["calibrate", "moa", str(folder), *wrong]).exit_code == 2
