"""G-Search and P-Sigmoid: the search against oracles and brute force, the curve, schedules, and what they drop."""

import itertools
import json
import math

import pytest
import torch
from miniatures import GREEDY, IMAGE, MINIATURES, text_inputs, vision_inputs

import infer_patch
from infer_patch import Plan
from infer_patch.demo_vlm import load_demo_vlm
from infer_patch.errors import PlanError, UnsupportedModelError
from infer_patch.evals.evaluate import at_random
from infer_patch.keep_schedule import Schedule, counts_of, read_schedule
from infer_patch.patches import FastV, GSearch, PSigmoid, RandomPruning
from infer_patch.patches.g_search import search
from infer_patch.patches.p_sigmoid import sigmoid_rates
from infer_patch.visual_scores import last_rows_attention

# --- the search ------------------------------------------------------------------------------------------


def oracle(essential, asked=None):
    """Quality 1 where every layer has what it needs, else 0."""

    def quality(counts):
        if asked is not None:
            asked.append(counts)
        return float(all(m >= e for m, e in zip(counts, essential)))

    return quality


@pytest.mark.parametrize("essential", [(9, 9, 7, 7, 0), (9, 9, 9, 9, 9), (9, 9, 0, 0, 0), (9, 9, 5, 3, 2)])
def test_an_oracle_search_finds_what_is_needed(essential):
    asked = []
    assert search(oracle(essential, asked), 5, 9, 1.0) == essential
    assert all(list(c) == sorted(c, reverse=True) and c[:2] == (9, 9) for c in asked)
    assert all(len(set(c[2:])) <= 3 for c in asked)
    # a trial gives all deeper layers the number under test, and bisection asks at most log2 of their number
    assert len(asked) <= 3 * math.ceil(math.log2(10))


@pytest.mark.parametrize("essential", [(4, 4, 3, 2, 2), (4, 4, 4, 1, 0), (4, 3, 3, 3, 1)])
def test_brute_force_finds_nothing_smaller_in_any_layer(essential):
    quality = oracle(essential)
    found = search(quality, 5, 4, 1.0, first=1)
    feasible = [
        c
        for c in itertools.product(range(5), repeat=5)
        if all(a >= b for a, b in itertools.pairwise(c)) and quality(c) == 1
    ]
    assert found in feasible
    assert all(m <= other for c in feasible for m, other in zip(found, c) if c[0] == 4)


def test_limits_of_the_search():
    assert search(lambda c: 0.0, 6, 20, -math.inf, least=3) == (20, 20, 3, 3, 3, 3)  # any quality will do
    assert search(oracle((20,) * 6), 6, 20, 1.0) == (20,) * 6
    assert search(oracle((20, 20, 9, 9, 5, 0)), 6, 20, 1.0, grid=8) == (20, 20, 16, 16, 8, 0)
    assert search(oracle((20, 20, 9, 7, 5, 0)), 6, 20, 1.0, group=2) == (20, 20, 9, 9, 5, 5)
    assert search(oracle((20, 20, 9, 7, 5, 0)), 6, 20, 1.0, first=4) == (20, 20, 20, 20, 5, 0)


def test_confirming_recovers_from_a_wrong_rejection():
    def noisy(counts):
        return 0.0 if counts[2] == 8 else float(counts[2] >= 3)  # 8 is judged wrongly

    assert search(noisy, 3, 16, 1.0) == (16, 16, 9)
    assert search(noisy, 3, 16, 1.0, confirm=1) == (16, 16, 3)


# --- the curve -------------------------------------------------------------------------------------------

CURVES = [(1.0, 0.0, 40.0), (1.0, 0.05, 10.0), (0.7, 0.1, 4.0), (0.9, 0.0, 2.0)]


@pytest.mark.parametrize("top, bottom, steepness", CURVES)
@pytest.mark.parametrize("layers, first", [(32, 2), (8, 2), (28, 1), (40, 3)])
def test_the_mean_of_the_curve_is_the_budget(top, bottom, steepness, layers, first):
    served = 0
    for budget in (0.125, 0.2, 0.3, 0.5, 0.7, 0.9):
        rates = sigmoid_rates(top, bottom, steepness, budget, layers, first)
        if rates is None:
            continue
        served += 1
        assert sum(rates) / layers == pytest.approx(budget, abs=1e-9)
        assert all(a >= b for a, b in itertools.pairwise(rates)) and rates[:first] == (1.0,) * first
        for tokens in (576, 256, 2880, 37):
            counts = counts_of(rates, torch.tensor(tokens)).double()
            assert abs(float(counts.mean()) / tokens - budget) <= 0.5 / tokens + 1e-9
            assert (counts.diff() <= 0).all()
    assert served >= 2


@pytest.mark.parametrize("top, bottom, steepness", CURVES)
def test_a_larger_budget_keeps_no_fewer_tokens_anywhere(top, bottom, steepness):
    rows = [sigmoid_rates(top, bottom, steepness, budget, 32) for budget in (0.15, 0.2, 0.25, 0.4, 0.6)]
    counts = [counts_of(rates, torch.tensor(576)) for rates in rows if rates is not None]
    assert len(counts) >= 3
    assert all((small <= large).all() for small, large in itertools.pairwise(counts))


def test_budgets_out_of_reach():
    assert sigmoid_rates(1, 0, 10, 2 / 32, 32) is None  # the forced layers alone use all of it
    assert sigmoid_rates(1, 0.4, 10, 0.3, 32) is None
    with pytest.raises(PlanError, match=r"p_sigmoid: a budget of 0.1 cannot be kept by 4 layers .* between 0.5"):
        infer_patch.patch(MINIATURES["llava"].build(), PSigmoid(budget=0.1))


def test_counts_round_half_up_and_never_rise():
    rates = (1.0, 1.0, 0.5, 0.25, 0.1, 0.0)
    assert counts_of(rates, torch.tensor([576, 5, 1, 0])).tolist() == [
        [576, 5, 1, 0],
        [576, 5, 1, 0],
        [288, 3, 1, 0],
        [144, 1, 0, 0],
        [58, 1, 0, 0],
        [0, 0, 0, 0],
    ]
    assert int(counts_of((1.0, 0.29), torch.tensor(50))[1]) == 15  # 14.5, and a little less in floating point


# --- scores ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_scores_are_the_mean_of_the_last_causal_attention_rows(rows, monkeypatch):
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 10, 8)
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    future = torch.arange(10) > torch.arange(3, 10)[:, None]
    expected = scores.masked_fill(future, -torch.inf).softmax(-1)[:, :, -rows:].mean((1, 2))
    torch.testing.assert_close(last_rows_attention(q, k, 0.3, rows), expected)
    monkeypatch.setattr("infer_patch.visual_scores._LARGEST", 2 * 2 * 4 * 10)  # two rows at once
    torch.testing.assert_close(last_rows_attention(q, k, 0.3, rows), expected)


# --- dropping --------------------------------------------------------------------------------------------


def kept(model, inputs, method):
    """Layer -> (kept tokens, image numbers) of one call."""
    with infer_patch.patch(model, method) as handle, torch.no_grad():
        logits = model(**inputs).logits
        return handle._engine.stats.methods[method.name].last, logits


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "internvl"])
def test_a_step_is_bit_equal_to_fastv(family, layer):
    mini = MINIATURES[family]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2, 0), seed=4)
    rates = tuple(1.0 if i < layer else 0.5 for i in range(4))
    for pool in ("per_image", "global"):
        fastv, expected = kept(model, inputs, FastV(layer=layer, drop_ratio=0.5, pool=pool))
        step, logits = kept(model, inputs, GSearch(keep_rate=rates, query="last", pool=pool))
        assert torch.equal(fastv[layer][0], step[layer][0])
        assert torch.equal(logits, expected)
        tokens = []
        for method in (FastV(layer=layer, pool=pool), GSearch(keep_rate=rates, query="last", pool=pool)):
            with infer_patch.patch(model, method):
                tokens.append(model.generate(**inputs, **GREEDY))
        assert torch.equal(*tokens)


@torch.no_grad()
def recompute(model, inputs, rates, extra=()):
    """Logits of the last prompt row and of further tokens: every token is computed in every layer, and keys of dropped
    ones are hidden from their layer on; the ranking is eager attention of the text behind the picture."""
    text, prompt = model.model.language_model, inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.tensor([list(extra)], dtype=torch.long)], 1)
    n = ids.shape[1]
    seen = {}
    hook = text.layers[0].register_forward_pre_hook(lambda m, a, kw: seen.update(x=a[0], kw=kw), with_kwargs=True)
    model(**dict(inputs, input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False))
    hook.remove()
    visual = (ids[0] == IMAGE).nonzero().squeeze(1)
    alive, counts = visual.tolist(), counts_of(rates, torch.tensor(len(visual))).tolist()
    mask = torch.zeros(1, 1, n, n).masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), torch.finfo().min)
    x, scores, sets = seen["x"], None, []
    for number, layer in enumerate(text.layers):
        if counts[number] < len(alive):
            alive = sorted(sorted(alive, key=lambda j: -float(scores[j]))[: counts[number]])
        sets.append(alive)
        hidden = mask.clone()
        hidden[..., [j for j in visual.tolist() if j not in alive]] = torch.finfo().min
        given = {**seen["kw"], "attention_mask": hidden, "past_key_values": None}
        _, weights = layer.self_attn(hidden_states=layer.input_layernorm(x), **given)
        scores = weights[0, :, int(visual[-1]) + 1 : prompt].mean((0, 1))
        x = layer(x, **given)
    return model.lm_head(text.norm(x))[0, prompt - 1 :], sets


@pytest.mark.parametrize("rates", [(1, 1, 0.6, 0.2), (1, 0.5, 0.5, 0), (1, 0.9, 0.4, 0.1)])
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_prefill_and_decode_equal_a_mask_only_recomputation(family, rates):
    mini = MINIATURES[family]
    inputs = vision_inputs(mini, images=(1,), text=[(6, 7)], seed=3)
    with infer_patch.patch(mini.build(), GSearch(keep_rate=rates)) as handle:
        out = handle.model.generate(
            **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        rows = [held.keys.shape[2] for held in out.past_key_values.layers]
    prompt = inputs["input_ids"].shape[1]
    extra = out.sequences[0, prompt:-1].tolist()
    expected, sets = recompute(mini.build(attn_implementation="eager"), inputs, rates, extra)
    torch.testing.assert_close(torch.cat(out.logits), expected, atol=1e-4, rtol=1e-4)
    visual = int((inputs["input_ids"] == IMAGE).sum())
    assert rows == [prompt + 3 - visual + len(alive) for alive in sets]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_kept_sets_are_nested_and_counted(family):
    mini = MINIATURES[family]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2, 0), seed=2)
    method = GSearch(keep_rate=(1, 0.7, 0.4, 0.1))
    found, _ = kept(model, inputs, method)
    assert sorted(found) == [1, 2, 3]
    text = found[1][1] < 0
    previous = torch.ones_like(text)
    real = inputs["attention_mask"].bool()
    for layer, (keep, image) in sorted(found.items()):
        assert not (keep & ~previous).any()
        assert (keep[text & real]).all()
        expected = counts_of(method.keep_rate[: layer + 1], (image >= 0).sum(1))[-1]
        assert torch.equal((keep & (image >= 0)).sum(1), expected)
        previous = keep
    assert (image[2] < 0).all()  # a sample without a picture loses nothing


def test_the_control_draws_the_same_places_as_random_pruning():
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2, 0), seed=2)
    step, logits = kept(model, inputs, GSearch(keep_rate=(1, 0.5, 0.5, 0.5), query="random"))
    control, expected = kept(model, inputs, RandomPruning(layer=1, pool="global"))
    assert torch.equal(step[1][0], control[1][0]) and torch.equal(logits, expected)
    found, _ = kept(model, inputs, PSigmoid(budget=0.65, query="random"))
    sets = [keep for _, (keep, _) in sorted(found.items())]
    assert len(sets) == 2 and not (sets[1] & ~sets[0]).any()
    plan = at_random(Plan((PSigmoid(budget=0.65), FastV())))
    assert plan.methods == (PSigmoid(budget=0.65, query="random"), RandomPruning()) and at_random(plan) is None


def test_rates_of_each_picture():
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(2,), gap=0, seed=2)
    for pool, each in (("per_image", [8, 8]), ("global", None)):
        found, _ = kept(model, inputs, GSearch(keep_rate=(1, 1, 0.5, 0.5), pool=pool))
        keep, image = found[2]
        counts = [int((keep & (image == p)).sum()) for p in (0, 1)]
        assert sum(counts) == 16 and each in (None, counts)


def test_a_second_turn_and_a_prompt_of_one_token():
    mini = MINIATURES["llava"]
    model, method = mini.build(), GSearch(keep_rate=(1, 0.5, 0.2, 0))
    inputs, more = vision_inputs(mini, images=(1,), seed=2), text_inputs(mini, lengths=(5,), seed=5)["input_ids"]
    one = text_inputs(mini, lengths=(1,))
    plain = model.generate(**one, **GREEDY)
    with infer_patch.patch(model, method):
        assert torch.equal(model.generate(**one, **GREEDY), plain)
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, more], 1)
        second = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values, **GREEDY
        )
        held = [layer.keys.shape[2] for layer in first.past_key_values.layers]
    assert second.shape[1] == ids.shape[1] + 8
    assert [held[0] - h for h in held] == [0, 8, 13, 16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_gradients(dtype):
    mini = MINIATURES["llava"]
    inputs = vision_inputs(mini, images=(1, 2, 0), seed=2)
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with infer_patch.patch(mini.build().to(dtype), PSigmoid(budget=0.6)) as handle:
        out = handle.model(**half)
        out.logits[:, -1].float().sum().backward()
    assert out.logits.dtype == dtype and out.logits[:, -1].isfinite().all()
    assert not handle.report().silent


# --- options and files -----------------------------------------------------------------------------------

FILE = {"method": "g_search", "num_layers": 4, "first": 2, "query": "last", "keep_rate": [1, 1, 0.5, 0.25]}


def written(tmp_path, **changes):
    file = tmp_path / "schedule.json"
    values = {k: v for k, v in {**FILE, **changes}.items() if v is not None}
    file.write_text(json.dumps(values))
    return file


def test_a_schedule_file_and_the_options_over_it(tmp_path):
    file = written(tmp_path, params={}, q=0.9)
    assert read_schedule(file, "g_search") == Schedule((1, 1, 0.5, 0.25), "last")
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2, 0), seed=2)
    found, logits = kept(model, inputs, GSearch(schedule_file=str(file)))
    for query, same in (("last", True), ("instruction", False)):
        _, other = kept(model, inputs, GSearch(keep_rate=(1, 1, 0.5, 0.25), query=query))
        assert torch.equal(logits, other) == same
    assert sorted(found) == [2, 3]
    plan = Plan.from_yaml(f"methods: [{{method: g_search, schedule_file: {file}, query: instruction}}]")
    assert torch.equal(kept(model, inputs, plan.methods[0])[1], other)
    assert Plan.from_yaml(Plan((GSearch(keep_rate=(1, 1, 0.5, 0.25)),)).to_yaml()).methods[0].keep_rate == (
        1,
        1,
        0.5,
        0.25,
    )


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"method": "p_sigmoid"}, "was made for 'p_sigmoid', not for 'g_search'"),
        ({"query": None}, "must hold an object with method, num_layers, first, query and keep_rate"),
        ({"query": "all"}, "query must be one of instruction, last, got 'all'"),
        ({"keep_rate": [1, 1, 0.2, 0.3]}, r"must not rise.* it does at layer 3 \(0.2 to 0.3\)"),
        ({"keep_rate": [1, 1, 1.2, 0.3]}, "shares from 0 to 1"),
        ({"keep_rate": [1, 1, "x", 0.3]}, "shares from 0 to 1"),
        ({"keep_rate": [1, 0.5, 0.5, 0.3]}, "must be 1 below layer 2"),
        ({"first": 0}, "first must be a layer number from 1 up, got 0"),
        ({"num_layers": 5}, "holds 4 rates for 5 layers"),
    ],
)
def test_files_that_are_refused(tmp_path, changes, complaint):
    with pytest.raises(PlanError, match=complaint):
        read_schedule(written(tmp_path, **changes), "g_search")


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(PlanError, match=r"cannot read the schedule file .*calibrate g-search"):
        read_schedule(tmp_path / "none.json", "g_search")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(PlanError, match="is not valid JSON"):
        read_schedule(tmp_path / "bad.json", "g_search")


@pytest.mark.parametrize(
    "make, complaint",
    [
        (lambda: GSearch(), "give either schedule_file .* or keep_rate"),
        (lambda: GSearch(schedule_file="x.json", keep_rate=(1, 0)), "give either"),
        (lambda: GSearch(keep_rate=(0.9, 0.5)), "must be 1 below layer 1"),
        (lambda: GSearch(keep_rate=(1, 0.5), query="first"), "query must be one of"),
        (lambda: GSearch(keep_rate=(1, 0.5), pool="x"), "pool must be"),
        (lambda: GSearch(keep_rate=(1, 0.5), layers=(1,)), "leave `layers` out"),
        (lambda: PSigmoid(), "give either schedule_file .* or budget"),
        (lambda: PSigmoid(budget=1.0), "budget must be between 0 and 1"),
        (lambda: PSigmoid(budget=0.3, top=0.2, bottom=0.4), "bottom not above top"),
        (lambda: PSigmoid(budget=0.3, steepness=0), "steepness must be a number above 0"),
        (lambda: PSigmoid(budget=0.3, first=0), "first must be a layer number from 1 up"),
    ],
)
def test_options_that_are_refused(make, complaint):
    with pytest.raises(PlanError, match=complaint):
        make()


def test_models_that_are_refused(tmp_path):
    with pytest.raises(PlanError, match="keep_rate is for 2 layers, and this model has 4"):
        infer_patch.patch(MINIATURES["llava"].build(), GSearch(keep_rate=(1, 0.5)))
    file = written(tmp_path, num_layers=3, keep_rate=[1, 1, 0.5])
    with pytest.raises(PlanError, match=r"schedule.json is for 3 layers, and this model has 4"):
        infer_patch.patch(MINIATURES["llava"].build(), GSearch(schedule_file=str(file)))
    for method in (GSearch(keep_rate=(1, 1, 0.5, 0)), PSigmoid(budget=0.6)):
        with pytest.raises(UnsupportedModelError, match=f"{method.name} prunes visual tokens, and llama has none"):
            infer_patch.patch(MINIATURES["llama"].build(), method)


@pytest.mark.parametrize(
    "name, method", [("g_search-demo-vlm.json", GSearch), ("p_sigmoid-demo-vlm-30.json", PSigmoid)]
)
def test_schedules_that_ship_fit_the_demo_model(name, method):
    model, _ = load_demo_vlm()
    ids = torch.tensor([[1, 10, *[model.config.image_token_id] * 256, 20, 30]])
    with infer_patch.patch(model, method(schedule_file=name)) as handle, torch.no_grad():
        model(ids, pixel_values=torch.zeros(1, 3, 128, 128))
    kept = handle.report().methods[method.name]["visual_tokens_kept"]
    assert kept[max(kept)] <= 32 and sum(kept.values()) < 256
