"""DyVTE: gates against a plain recomputation, sample by sample; labels; what the published code gets wrong."""

import json
import math

import pytest
import torch
from miniatures import GREEDY, IMAGE, MINIATURES, text_inputs, vision_inputs
from test_behaviour import snapshot

import infer_patch
from infer_patch.artifacts import save_artifact
from infer_patch.demo_vlm import load_demo_vlm
from infer_patch.errors import ArtifactError, PlanError, UnsupportedModelError
from infer_patch.patches import DyVTE, FastV, dyvte
from infer_patch.patches.dyvte import exit_labels, fires, gate_features, gate_logits

WIDTH, HIDDEN, LAYERS = 64, 8, 4


def random_gates(seed):
    """Gates that fire for some samples in some layers."""
    rng = torch.Generator().manual_seed(seed)
    return {
        f"gates.{layer}.{name}": torch.randn(shape, generator=rng)
        for layer in range(LAYERS - 1)
        for name, shape in (("w1", (HIDDEN, 2 * WIDTH)), ("w2", (2, HIDDEN)))
    }


def made(folder, model, seed=0, **meta):
    """A folder of random gates for a model."""
    return str(save_artifact(folder, "dyvte", random_gates(seed), {"features": "text_mean+last", **meta}, model))


def exits(handle):
    """Layer -> samples whose visual tokens left before it."""
    return handle.report().methods["dyvte"].get("samples_emptied", {})


# --- features, gates, labels -----------------------------------------------------------------------------


def test_features_are_the_text_behind_the_picture_and_the_last_token():
    torch.manual_seed(0)
    hidden = torch.randn(4, 10, 3)
    visual = torch.zeros(4, 10, dtype=torch.bool)
    visual[0, 2:5] = visual[1, 3:5] = visual[1, 6:8] = visual[2, 5:9] = visual[3, 1:3] = True
    last = torch.tensor([9, 9, 9, 6])  # the third has no text before its last token, the fourth is padded on the right
    found = gate_features(hidden, visual, last)
    assert found.shape == (4, 6)
    for row, text in enumerate([[5, 6, 7, 8], [5, 8], [9], [3, 4, 5]]):
        expected = torch.cat([hidden[row, text].mean(0), hidden[row, last[row]]])
        torch.testing.assert_close(found[row], expected)
        alone = gate_features(hidden[row : row + 1], visual[row : row + 1], last[row : row + 1])
        torch.testing.assert_close(found[row], alone[0])
    noise = hidden.clone()
    noise[0, :5] = noise[3, 7:] = 1e6  # system text, pictures and padding are not read
    torch.testing.assert_close(gate_features(noise, visual, last)[[0, 3]], found[[0, 3]])
    assert gate_features(hidden.bfloat16(), visual, last).dtype == torch.float32


def test_a_gate_is_two_matrices_with_exact_gelu():
    torch.manual_seed(0)
    f, w1, w2 = torch.randn(3, 6), torch.randn(5, 6), torch.randn(2, 5)
    z = f @ w1.T
    expected = (z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))) @ w2.T
    logits = gate_logits(f, w1, w2)
    torch.testing.assert_close(logits, expected)
    for threshold in (0.2, 0.5, 0.9):
        assert torch.equal(fires(logits, threshold), logits.softmax(-1)[:, 1] > threshold)
    extreme = torch.tensor([[200.0, -200.0], [-200.0, 200.0], [1.0, 1.0]])
    assert fires(extreme, 0).all() and not fires(extreme, 1).any()
    assert fires(extreme, 0.5).tolist() == [False, True, False]


def test_labels_want_the_same_answer_at_nearly_the_same_loss():
    torch.manual_seed(0)
    full = torch.randn(5, 4, 6)
    labels = torch.tensor([[2, 3, 1, 5], [2, 3, -100, -100], [2, 3, -100, -100], [2, 0, -100, -100], [4, 1, 2, 3]])
    cut = full.clone()
    assert exit_labels(full, cut, labels).all()  # nothing follows the last layer: it always may
    cut[1, 2:] = torch.randn(2, 6)  # behind the answer: right padding does not count
    flipped = full[2, 1].argmax()
    cut[2, 1, flipped] -= 20  # another choice
    cut[3, 1] = full[3, 1] + 3 * torch.nn.functional.one_hot(full[3, 1].argmax(), 6)  # loss at token 0 is left out
    best = full[4].argmax(-1)
    cut[4] = full[4] + torch.nn.functional.one_hot(best, 6)  # the same choices, more sure of wrong ones
    labels[4] = (best + 1) % 6
    labels[4, labels[4] == 0] = 3
    assert exit_labels(full, cut, labels).tolist() == [True, True, False, True, False]


def test_the_loss_may_grow_by_three_per_cent():
    labels = torch.tensor([[1]])

    def with_loss(loss):
        p = math.exp(-loss)
        return torch.tensor([[[math.log(1 - p), math.log(p)]]], dtype=torch.float64)

    full = with_loss(0.5)
    assert exit_labels(full, with_loss(0.5 * 1.029), labels).tolist() == [True]
    assert exit_labels(full, with_loss(0.5 * 1.031), labels).tolist() == [False]


# --- against a plain recomputation -----------------------------------------------------------------------


@torch.no_grad()
def recompute(model, inputs, gates, extra=()):
    """Logits of the last prompt row and of further tokens, and the exit layer (None if no gate fires): every token is
    computed in every layer, and visual keys are hidden past the exit."""
    text, prompt = model.model.language_model, inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], torch.tensor([list(extra)], dtype=torch.long)], 1)
    n, call, seen = ids.shape[1], dict(inputs, use_cache=False), {}
    call.update(input_ids=ids, attention_mask=torch.ones_like(ids))
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in call:
            call[name] = torch.nn.functional.pad(call[name], (0, len(extra)))
    hook = text.layers[0].register_forward_pre_hook(lambda m, a, kw: seen.update(x=a[0], kw=kw), with_kwargs=True)
    model(**call)
    hook.remove()
    visual = (ids[0] == IMAGE).nonzero().squeeze(1)
    mask = torch.zeros(1, 1, n, n).masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), torch.finfo().min)
    x, left = seen["x"], None
    for number, layer in enumerate(text.layers):
        x = layer(x, **{**seen["kw"], "attention_mask": mask, "past_key_values": None})
        if left is None and number < LAYERS - 1:
            behind = [i for i in range(int(visual[0]), prompt - 1) if i not in visual.tolist()]
            feature = torch.cat([x[0, behind].mean(0), x[0, prompt - 1]])
            stay, leave = gates[f"gates.{number}.w2"] @ torch.nn.functional.gelu(gates[f"gates.{number}.w1"] @ feature)
            if leave > stay:
                left = number
                mask = mask.clone()
                mask[..., visual] = torch.finfo().min
    return model.lm_head(text.norm(x))[0, prompt - 1 :], left


@pytest.mark.filterwarnings("ignore:.*never took effect")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_prefill_and_decode_equal_a_mask_only_recomputation(family, seed, tmp_path):
    mini = MINIATURES[family]
    model = mini.build()
    inputs = vision_inputs(mini, images=(1,), text=[(6, 7)], seed=3)
    with infer_patch.patch(model, DyVTE(gates=made(tmp_path / "gates", model, seed))) as handle:
        out = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        rows = [
            held.get_seq_length() if held.keys is None else held.keys.shape[2] for held in out.past_key_values.layers
        ]
        found = exits(handle)
    prompt = inputs["input_ids"].shape[1]
    extra = out.sequences[0, prompt:-1].tolist()
    expected, left = recompute(mini.build(attn_implementation="eager"), inputs, random_gates(seed), extra)
    torch.testing.assert_close(torch.cat(out.logits), expected, atol=1e-4, rtol=1e-4)
    kept = LAYERS if left is None else left + 1
    visual = int((inputs["input_ids"] == IMAGE).sum())
    assert rows == [prompt + 3] * kept + [prompt + 3 - visual] * (LAYERS - kept)
    assert {layer: n for layer, n in found.items() if n} == ({} if left is None else {left + 1: 1})


def test_the_seeds_above_leave_early_late_and_not_at_all(tmp_path):
    mini = MINIATURES["llava"]
    inputs = vision_inputs(mini, images=(1,), text=[(6, 7)], seed=3)
    model = mini.build(attn_implementation="eager")
    assert len({recompute(model, inputs, random_gates(seed))[1] for seed in range(4)}) >= 2


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_samples_of_a_batch_leave_each_at_its_own_layer(family, tmp_path):
    mini = MINIATURES[family]
    model = mini.build()
    shape = dict(images=(1, 2, 0, 1, 1, 2), text=[(5, 9), (3, 12), (7, 4), (2, 2), (9, 5), (4, 1)])
    inputs = vision_inputs(mini, **shape, seed=1)
    width, different = inputs["input_ids"].shape[1], set()
    for seed in range(3):
        method = DyVTE(gates=made(tmp_path / str(seed), model, seed))
        with infer_patch.patch(model, method) as handle, torch.no_grad():
            tokens, logits = model.generate(**inputs, **GREEDY), model(**inputs).logits[:, -1]
            handle.report(reset=True)
            model(**inputs)
            together = {layer: n for layer, n in exits(handle).items() if n}
            handle.report(reset=True)
            for i in range(6):
                alone = vision_inputs(mini, **shape, seed=1, only=i)
                torch.testing.assert_close(logits[i], model(**alone).logits[0, -1], atol=1e-4, rtol=1e-4)
                first = alone["input_ids"].shape[1]
                assert torch.equal(tokens[i, width:], model.generate(**alone, **GREEDY)[0, first:])
            apart = {layer: n // 2 for layer, n in exits(handle).items() if n}  # each sample was read twice
        assert together == apart
        different.add(len(together) + (sum(together.values()) < 5))  # five samples have pictures; some may stay
    assert max(different) >= 2


# --- invariants ------------------------------------------------------------------------------------------


def run(model, inputs, method):
    with infer_patch.patch(model, method), torch.no_grad():
        return model.generate(**inputs, **GREEDY), model(**inputs).logits


@pytest.mark.filterwarnings("ignore:.*never took effect")
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
def test_thresholds_at_their_ends(family, tmp_path):
    mini = MINIATURES[family]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2, 0), seed=2)
    gates = made(tmp_path / "gates", model)
    with torch.no_grad():
        plain = model.generate(**inputs, **GREEDY), model(**inputs).logits
    before = snapshot(model)
    for a, b in zip(run(model, inputs, DyVTE(gates=gates, threshold=1)), plain):
        assert torch.equal(a, b)
    for layer in range(LAYERS - 1):
        gated = run(model, inputs, DyVTE(gates=gates, threshold=0, min_layer=layer))
        fixed = run(model, inputs, DyVTE(policy="fixed", exit_layer=layer))
        assert all(torch.equal(a, b) for a, b in zip(gated, fixed))
        assert not torch.equal(fixed[1], plain[1])
    assert snapshot(model) == before
    one = text_inputs(mini, lengths=(1,))
    assert torch.equal(run(model, one, DyVTE(gates=gates, threshold=0))[0], model.generate(**one, **GREEDY))


def test_visual_states_do_not_matter_past_the_exit(tmp_path):
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2, 0), seed=2)
    method = DyVTE(gates=made(tmp_path / "gates", model), threshold=0, min_layer=1)
    visual = (inputs["input_ids"] == IMAGE)[..., None]

    def noisy(noise):
        hook = model.model.language_model.layers[2].register_forward_pre_hook(lambda m, a: (a[0] + noise * visual,))
        with infer_patch.patch(model, method), torch.no_grad():
            logits = model(**inputs).logits[:, -1]
        hook.remove()
        return logits

    assert torch.equal(noisy(0.0), noisy(100.0))


@pytest.mark.filterwarnings("ignore:.*never took effect")
def test_gates_are_asked_in_prefill_only_and_nothing_outlives_a_call(tmp_path, monkeypatch):
    mini = MINIATURES["llava"]
    model = mini.build()
    first, second = (vision_inputs(mini, images=(1, 2, 0), seed=s) for s in (2, 3))
    asked, original = [], dyvte.gate_logits
    monkeypatch.setattr(dyvte, "gate_logits", lambda *a: asked.append(1) or original(*a))
    for threshold in (1.0, 0.5):  # with 1 no gate fires: the published code then asks again while generating
        method = DyVTE(gates=made(tmp_path / "gates", model), threshold=threshold)
        expected = run(model, second, method)
        asked.clear()
        with infer_patch.patch(model, method), torch.no_grad():
            model.generate(**first, **GREEDY)
            assert len(asked) == LAYERS - 1
            tokens, logits = model.generate(**second, **GREEDY), model(**second).logits
        assert torch.equal(tokens, expected[0]) and torch.equal(logits, expected[1])


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}]
)
def test_modes(options, tmp_path):
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2, 0), seed=2)
    with infer_patch.patch(model, DyVTE(gates=made(tmp_path / "gates", model))):
        tokens = model.generate(**inputs, **GREEDY, **options)
        assert torch.equal(tokens, model.generate(**inputs, **GREEDY, **options))
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 8


def test_a_second_turn_half_precision_and_gradients(tmp_path):
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1,), seed=2)
    more = text_inputs(mini, lengths=(5,), seed=5)["input_ids"]
    method = DyVTE(gates=made(tmp_path / "gates", model), threshold=0, min_layer=1)
    with infer_patch.patch(model, method):
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, more], 1)
        second = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values, **GREEDY
        )
        held = [layer.keys.shape[2] for layer in first.past_key_values.layers]
    assert second.shape[1] == ids.shape[1] + 8 and [held[0] - h for h in held] == [0, 0, 16, 16]
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    with infer_patch.patch(model.bfloat16(), method) as handle:
        logits = model(**half).logits[:, -1]
        logits.float().sum().backward()
    assert logits.isfinite().all() and exits(handle) == {2: 1}


def test_the_histogram_of_exits_and_other_methods_beside(tmp_path):
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2, 0), seed=2)
    with infer_patch.patch(model, DyVTE(policy="fixed", exit_layer=1)) as handle:
        model.generate(**inputs, **GREEDY)
    assert exits(handle) == {2: 2} and "from layer 2 on in 2 samples" in str(handle.report())
    with infer_patch.patch(model, FastV(layer=1), DyVTE(policy="fixed", exit_layer=2)) as handle:
        cache = model(**inputs).past_key_values
    assert exits(handle) == {3: 2} and "samples_emptied" not in handle.report().methods["fastv"]
    assert cache.layers[3].keys.shape[2] < cache.layers[1].keys.shape[2] < cache.layers[0].keys.shape[2]


# --- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({}, "gates must name a folder, got ''; make one with `infer-patch calibrate dyvte`"),
        ({"gates": "x", "threshold": 1.5}, "threshold must be a probability"),
        ({"gates": "x", "min_layer": -1}, "min_layer must be a layer number"),
        ({"gates": "x", "exit_layer": 2}, "exit_layer is for policy fixed"),
        ({"gates": "x", "layers": (1,)}, "set `min_layer` or `exit_layer`"),
        ({"policy": "vote"}, "policy must be gates or fixed"),
        ({"policy": "fixed"}, "needs exit_layer"),
        ({"policy": "fixed", "exit_layer": 1, "gates": "x"}, "the fixed policy has no gates"),
    ],
)
def test_options_that_are_refused(options, complaint):
    with pytest.raises(PlanError, match=complaint):
        DyVTE(**options)


def test_models_and_folders_that_do_not_fit(tmp_path):
    model = MINIATURES["llava"].build()
    with pytest.raises(UnsupportedModelError, match="dyvte prunes visual tokens, and llama has none"):
        infer_patch.patch(MINIATURES["llama"].build(), DyVTE(policy="fixed", exit_layer=1))
    for options in ({"policy": "fixed", "exit_layer": 3}, {"gates": "x", "min_layer": 3}):
        with pytest.raises(PlanError, match="_layer must be at most 2 for 4 layers, got 3"):
            infer_patch.patch(model, DyVTE(**options))
    with pytest.raises(ArtifactError, match="expected an artifact folder"):
        infer_patch.patch(model, DyVTE(gates="no-such-gates"))
    with pytest.raises(ArtifactError, match="with other weights"):
        infer_patch.patch(MINIATURES["llava"].build(seed=1), DyVTE(gates=made(tmp_path / "a", model)))
    with pytest.raises(ArtifactError, match="holds gates for the features 'attention'"):
        infer_patch.patch(model, DyVTE(gates=made(tmp_path / "b", model, features="attention")))
    tensors = {name: w for name, w in random_gates(0).items() if name != "gates.1.w2"}
    folder = save_artifact(tmp_path / "c", "dyvte", tensors, {"features": "text_mean+last"}, model)
    with pytest.raises(ArtifactError, match=r"should hold gates\.1\.w1 \(h, 128\) and gates\.1\.w2"):
        infer_patch.patch(model, DyVTE(gates=str(folder)))
    assert not infer_patch.api.is_patched(model)
    assert json.loads((folder / "artifact.json").read_text())["method"] == "dyvte"


@pytest.mark.filterwarnings("ignore:.*never took effect")
def test_gates_that_ship_fit_the_demo_model():
    model, _ = load_demo_vlm()
    ids = torch.tensor([[1, 10, *[model.config.image_token_id] * 256, 20, 30]])
    pixels = torch.zeros(1, 3, 128, 128)
    with infer_patch.patch(model, DyVTE(gates="dyvte-demo-vlm", threshold=0.5)) as handle, torch.no_grad():
        cache = model(ids, pixel_values=pixels).past_key_values
        gates = handle._engine.methods[0][2].gates
    assert {w1.shape for w1, _ in gates.values()} == {(32, 512)} and sorted(gates) == list(range(7))
    left = [layer for layer, n in exits(handle).items() if n]
    rows = [held.keys.shape[2] for held in cache.layers]
    assert rows == ([260] * 8 if not left else [260] * left[0] + [4] * (8 - left[0]))
    with pytest.raises(ArtifactError, match="was made for another model"):
        infer_patch.patch(MINIATURES["llava"].build(), DyVTE(gates="dyvte-demo-vlm"))
