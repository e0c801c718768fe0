"""Masked heads against models whose own weights make the queries zero, and against means taken by hand."""

import json
import warnings

import pytest
import torch
from miniatures import GREEDY, MINIATURES, text_inputs, vision_inputs
from rows import SCORES
from transformers import AutoConfig, AutoModelForCausalLM

import infer_patch
from infer_patch.errors import ArtifactError, PlanError, UnsupportedCallError, UnsupportedModelError
from infer_patch.head_scores import HeadScores
from infer_patch.patches import FastV, RetrievalHeads
from infer_patch.patches.retrieval_heads import causal_means, pick, window_means

HEADS = ("1-0", "1-3", "2-1")
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "mixtral"]


@torch.no_grad()
def without_queries(mini, heads=HEADS, **overrides):
    """A model whose named heads have queries of zero, whatever they read: uniform attention by the model itself."""
    model = mini.build(**overrides)
    for name in heads:
        layer, head = map(int, name.split("-"))
        attention = model.model.layers[layer].self_attn
        rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        attention.q_proj.weight[rows] = 0
        if attention.q_proj.bias is not None:
            attention.q_proj.bias[rows] = 0
    return model


@torch.no_grad()
def without_outputs(mini, heads=HEADS):
    """A model that reads nothing of the named heads."""
    model = mini.build()
    for name in heads:
        layer, head = map(int, name.split("-"))
        attention = model.model.layers[layer].self_attn
        attention.o_proj.weight[:, head * attention.head_dim : (head + 1) * attention.head_dim] = 0
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_equals_queries_of_zero(family):
    mini = MINIATURES[family]
    inputs = text_inputs(mini, lengths=(40, 23, 1))
    expected = without_queries(mini).generate(**inputs, **GREEDY)
    real = inputs["attention_mask"].bool()
    model = mini.build()
    with infer_patch.patch(model, RetrievalHeads(heads=HEADS, phase="all")), torch.no_grad():
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)
        logits = model(**inputs).logits
    torch.testing.assert_close(logits[real], without_queries(mini)(**inputs).logits[real], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def decoded_by_hand(model, masked, inputs, steps):
    """Logits of each step: all but the last prompt token through one model, the rest through the other."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = model(ids[:, :-1], attention_mask=mask[:, :-1]).past_key_values
    token, found = ids[:, -1:], []
    for _ in range(steps):
        positions = (mask.cumsum(1) - 1)[:, -1:]
        logits = masked(token, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]
        found.append(logits)
        token = logits.argmax(-1, keepdim=True)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return torch.stack(found, 1)


@pytest.mark.parametrize("mode", ["uniform", "zero"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_decoding_starts_with_the_last_prompt_token(family, mode):
    """The released procedure: prefill all but the last token unmasked, then decode masked."""
    mini = MINIATURES[family]
    model = mini.build()
    masked = without_queries(mini) if mode == "uniform" else without_outputs(mini)
    inputs = text_inputs(mini, lengths=(40,))
    expected = decoded_by_hand(model, masked, inputs, 8)
    with infer_patch.patch(model, RetrievalHeads(heads=HEADS, mode=mode)):
        out = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(out.sequences, mini.build().generate(**inputs, **GREEDY))


@pytest.mark.parametrize("phase", ["decode", "all"])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_drafts_are_checked_masked_in_layers_with_windows_too(family, phase):
    mini = MINIATURES[family]
    model, assistant = mini.build(), mini.build(num_hidden_layers=2)
    inputs = text_inputs(mini, lengths=(60,))
    with infer_patch.patch(model, RetrievalHeads(heads=HEADS, phase=phase)):
        expected = model.generate(**inputs, **GREEDY)
        assert torch.equal(model.generate(**inputs, **GREEDY, assistant_model=assistant), expected)


@torch.no_grad()
def head_outputs(model, inputs, layer, methods):
    """What each head of a layer gives, [B, T, H, D], with the cache afterwards."""
    seen, attention = [], model.model.layers[layer].self_attn
    hook = attention.o_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with infer_patch.patch(model, methods):
        cache = model(**inputs, use_cache=True).past_key_values
    hook.remove()
    return seen[0].unflatten(-1, (-1, attention.head_dim)), cache


def test_only_the_masked_heads_change_and_the_cache_of_their_layer_does_not():
    mini = MINIATURES["llama"]
    model, inputs = mini.build(), text_inputs(mini, lengths=(30,))
    plain, before = head_outputs(model, inputs, 1, [])
    masked, after = head_outputs(model, inputs, 1, RetrievalHeads(heads=("1-2",), phase="all"))
    values = after.layers[1].values  # query heads 2 and 3 share key head 1
    means = values[0, 1].cumsum(0) / torch.arange(1, 31)[:, None]
    torch.testing.assert_close(masked[0, :, 2], means)
    others = [0, 1, 3]
    assert torch.equal(masked[:, :, others], plain[:, :, others])
    for layer in (0, 1):
        assert torch.equal(after.layers[layer].keys, before.layers[layer].keys)
        assert torch.equal(after.layers[layer].values, before.layers[layer].values)
    assert not torch.equal(after.layers[2].keys, before.layers[2].keys)


def test_decoding_leaves_the_prompt_in_the_cache_as_it_was():
    mini = MINIATURES["llama"]
    model, inputs = mini.build(), text_inputs(mini, lengths=(30,))
    _, before = head_outputs(model, inputs, 1, [])
    _, after = head_outputs(model, inputs, 1, RetrievalHeads(heads=("1-2",)))
    assert torch.equal(after.layers[3].keys[:, :, :-1], before.layers[3].keys[:, :, :-1])
    assert not torch.equal(after.layers[3].keys[:, :, -1], before.layers[3].keys[:, :, -1])


@torch.no_grad()
def test_a_masked_head_reads_neither_queries_nor_keys():
    mini = MINIATURES["llama"]
    model, inputs = mini.build(), text_inputs(mini, lengths=(30,))
    method = RetrievalHeads(heads=("1-2", "1-3"), phase="all")  # all query heads of one key head
    masked, _ = head_outputs(model, inputs, 1, method)
    attention = model.model.layers[1].self_attn
    attention.q_proj.weight[2 * attention.head_dim :] *= 5
    attention.k_proj.weight[attention.head_dim :] *= -3
    again, _ = head_outputs(model, inputs, 1, method)
    assert torch.equal(masked[:, :, 2:], again[:, :, 2:])


@pytest.mark.parametrize("layer", [0, 1])  # gpt-oss: a window of 6, and none; both with learned sinks
def test_learned_sinks_take_no_part_in_the_mean(layer):
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128)
    config = AutoConfig.for_model(
        "gpt_oss",
        **sizes,
        head_dim=16,
        intermediate_size=32,
        num_local_experts=2,
        num_experts_per_tok=2,
        sliding_window=6,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    seen, layers = {}, model.model.layers
    layers[layer].self_attn.v_proj.register_forward_hook(lambda m, a, out: seen.update(v=out))
    inputs = text_inputs(model, lengths=(20,))
    masked, _ = head_outputs(model, inputs, layer, RetrievalHeads(heads=(f"{layer}-1",)))
    values = seen["v"][0, -6 if layer == 0 else 0 :, :16]
    torch.testing.assert_close(masked[0, -1, 1], values.mean(0))


def test_means_of_a_few_rows_at_a_time_are_those_of_all():
    v = torch.randn(2, 3, 50, 8, generator=torch.Generator().manual_seed(0))
    whole, total = causal_means(v, 50)
    expected = torch.stack([v[:, :, : i + 1].mean(2) for i in range(50)], 2)
    torch.testing.assert_close(whole, expected)
    first, before = causal_means(v[:, :, :30], 30)
    rest, last = causal_means(v, 20, before)
    torch.testing.assert_close(torch.cat([first, rest], 2), expected)
    torch.testing.assert_close(last, total)


def test_means_within_a_window_count_what_is_still_there():
    positions = torch.tensor([[0, 1, 2, 5, 6, 9, 12, 13], [2, 3, 4, 5, 6, 7, 8, 9]])
    v = torch.randn(2, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    found = window_means(v, positions, rows=5, window=4)
    for sample in range(2):
        for row in range(5):
            own = positions[sample, 3 + row]
            seen = (positions[sample] <= own) & (positions[sample] > own - 4)
            torch.testing.assert_close(found[sample, :, row], v[sample][:, seen].mean(1))


def test_survivors_of_pruning_make_the_mean():
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(2,), seed=1)
    text, seen = model.model.language_model, []
    hook = text.layers[2].self_attn.o_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with infer_patch.patch(model, [FastV(layer=2), RetrievalHeads(heads=("2-1",))]), torch.no_grad():
        cache = model(**inputs).past_key_values
    hook.remove()
    values = cache.layers[2].values
    assert values.shape[2] < inputs["input_ids"].shape[1]
    torch.testing.assert_close(seen[0][0, -1, 16:32], values[0, 0].mean(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype):
    mini = MINIATURES["llama"]
    model = mini.build().to(dtype)
    inputs = text_inputs(mini, lengths=(300,))
    masked, cache = head_outputs(model, inputs, 1, RetrievalHeads(heads=("1-0",)))
    expected = cache.layers[1].values[0, 0].float().mean(0).to(dtype)
    assert masked.dtype == dtype and torch.equal(masked[0, -1, 0], expected)


def test_gradients_pass():
    mini = MINIATURES["llama"]
    inputs = text_inputs(mini, lengths=(20, 12))
    grads = []
    for model, methods in ((without_queries(mini), []), (mini.build(), RetrievalHeads(heads=HEADS, phase="all"))):
        with infer_patch.patch(model, methods):
            model(**inputs).logits[:, -1].square().sum().backward()
        grads.append(model.model.layers[1].self_attn.v_proj.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-3, rtol=1e-3)


def scores(best, layers=6, heads=25):
    """150 heads, of which the named ones score, the first most."""
    marks = {head: 1 - i / 200 for i, head in enumerate(best)}
    return HeadScores({(i, h): (marks.get((i, h), 0.0),) for i in range(layers) for h in range(heads)})


def test_random_heads_are_never_among_the_best():
    """The released draw compares tuples with lists, so it excludes nothing."""
    best = [(i % 6, i // 6) for i in range(100)]
    ranked = scores(best).ranked()
    assert ranked[:100] == best
    draws = [pick(ranked, RetrievalHeads(scores_file="x", top=30, draw="random", seed=s)) for s in range(40)]
    assert all(len(set(d)) == 30 and not set(d) & set(best) for d in draws)
    assert draws[0] == pick(ranked, RetrievalHeads(scores_file="x", top=30, draw="random", seed=0)) != draws[1]
    assert {h for d in draws for h in d} == set(ranked[100:])
    assert pick(ranked, RetrievalHeads(scores_file="x", top=3)) == best[:3]
    with pytest.raises(PlanError, match="60 heads were asked for, and there are 50 below the 100 best"):
        pick(ranked, RetrievalHeads(scores_file="x", top=60, draw="random"))


def test_heads_of_a_file_and_by_name_are_the_same():
    mini = MINIATURES["llama"]
    inputs = text_inputs(mini, lengths=(30, 20))
    best = HeadScores.read(SCORES).ranked()[:3]
    found = []
    for method in (
        RetrievalHeads(scores_file=SCORES, top=3),
        RetrievalHeads(heads=tuple(f"{layer}-{head}" for layer, head in best)),
    ):
        model = mini.build()
        with infer_patch.patch(model, method), torch.no_grad():
            found.append(model(**inputs).logits)
    assert torch.equal(*found)
    within = RetrievalHeads(scores_file=SCORES, top=2, layers=(0, 3))
    parts = infer_patch.families.describe(mini.build())
    assert {layer for layer, _ in within.chosen(parts)} <= {0, 3} and len(within.chosen(parts)) == 2


def test_scores_survive_the_way_to_a_file_and_back(tmp_path):
    measured = HeadScores({(0, 0): (0.25, 0.75), (0, 1): (0.0, 0.0), (1, 0): (), (1, 1): (1.5, 0.0)})
    (tmp_path / "scores.json").write_text(json.dumps(measured.to_dict()))
    again = HeadScores.read(tmp_path / "scores.json")
    assert again == measured and again.matrix() == [[0.5, 0.0], [0.0, 0.75]]
    assert again.ranked() == [(1, 1), (0, 0), (0, 1), (1, 0)] and again.tests == 2


@pytest.mark.parametrize(
    "text, words",
    [
        ("[1]", "expected an object"),
        ('{"a-b": [1]}', "named layer-head"),
        ('{"0-0": 1}', "list of finite numbers"),
        ('{"0-0": [NaN]}', "list of finite numbers"),
        ('{"0-0": []}', "holds no test"),
        ('{"version": 9, "scores": {}}', "version 9"),
        ("{", "not valid JSON"),
    ],
)
def test_score_files_that_cannot_be_read(tmp_path, text, words):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(ArtifactError, match=words):
        HeadScores.read(tmp_path / "scores.json")
    with pytest.raises(ArtifactError, match="calibrate retrieval-heads"):
        infer_patch.patch(MINIATURES["llama"].build(), RetrievalHeads(scores_file="absent.json", top=1))


def test_plan_files_name_heads_without_quotes():
    method = RetrievalHeads(heads=("18-6", "2-0"))
    plan = infer_patch.Plan.from_yaml("methods: [{method: retrieval_heads, heads: [18-6, 2-0]}]")
    assert plan.methods == (method,) and infer_patch.Plan.from_yaml(plan.to_yaml()) == plan


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "give either heads or a scores_file"),
        ({"heads": ("1-1",), "scores_file": "x"}, "give either"),
        ({"heads": ("1.1",)}, "layer-head names"),
        ({"heads": ("1-1", "1-1")}, "once each"),
        ({"heads": ("1-1",), "top": 3}, "top is for a scores_file"),
        ({"heads": ("1-1",), "draw": "random"}, "draw is for a scores_file"),
        ({"scores_file": "x", "top": -1}, "0 heads or more"),
        ({"heads": ("1-1",), "mode": "half"}, "uniform or zero"),
        ({"heads": ("1-1",), "phase": "prefill"}, "decode or all"),
    ],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(PlanError, match=words):
        RetrievalHeads(**options)


def test_what_does_not_fit_the_model_is_refused():
    model = MINIATURES["llama"].build()
    with pytest.raises(PlanError, match=r"heads \['4-0', '1-4'\]|heads \['1-4', '4-0'\]"):
        infer_patch.patch(model, RetrievalHeads(heads=("4-0", "1-4")))
    with pytest.raises(PlanError, match="holds 4 layers of 4 heads; llama has 2 layers"):
        small = MINIATURES["llama"].build(num_hidden_layers=2)
        infer_patch.patch(small, RetrievalHeads(scores_file=SCORES, top=1))
    config = AutoConfig.for_model(
        "llama4_text", hidden_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, vocab_size=64,
        head_dim=16, intermediate_size=32, intermediate_size_mlp=32, num_local_experts=1, attention_chunk_size=8,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="attend in chunks"):
        infer_patch.patch(AutoModelForCausalLM.from_config(config), RetrievalHeads(heads=("0-1",)))


@pytest.mark.parametrize("family", ["paligemma", "gemma3"])
def test_prompts_that_look_forward(family):
    mini = MINIATURES[family]
    model, inputs = mini.build(), vision_inputs(mini, images=(1,))
    handle = infer_patch.patch(model, RetrievalHeads(heads=HEADS, phase="all"))
    with pytest.raises(UnsupportedCallError, match='Use phase="decode" or mode="zero"'):
        model(**inputs)
    handle.remove()
    for method in (RetrievalHeads(heads=HEADS), RetrievalHeads(heads=HEADS, phase="all", mode="zero")):
        with infer_patch.patch(model, method) as handle:
            model(**inputs)
            assert handle.report().methods["retrieval_heads"]["fired"]


def test_padding_between_tokens_is_refused():
    mini = MINIATURES["llama"]
    model, inputs = mini.build(), text_inputs(mini, lengths=(30, 20))
    inputs["attention_mask"][0, 10:12] = 0
    handle = infer_patch.patch(model, RetrievalHeads(heads=HEADS))
    with pytest.raises(UnsupportedCallError, match="padding stands between"):
        model(**inputs)
    handle.remove()


def test_masking_nothing_says_so():
    model = MINIATURES["llama"].build()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with infer_patch.patch(model, RetrievalHeads(scores_file=SCORES, top=0)):
            model(**text_inputs(MINIATURES["llama"]))
    assert any("never took effect" in str(w.message) for w in said)
