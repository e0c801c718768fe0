"""YOPO against a plain recomputation of the published formula, with eager attention and the whole score matrix."""

import json

import pytest
import torch
from miniatures import IMAGE, MINIATURES, vision_inputs
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import infer_patch
from infer_patch import Plan
from infer_patch.availability import crop_is_relative
from infer_patch.errors import ConflictError, PlanError, UnsupportedModelError
from infer_patch.families import describe
from infer_patch.kernels.hidden_keys import HiddenKeys, hidden_keys_attention, reference
from infer_patch.patches import YOPO, FastV, SinkWindow
from infer_patch.patches.yopo import seeing_heads, visual_ratio

BLIND = ("1-0", "1-3", "2-0", "2-1", "2-2", "2-3")
FAMILIES = ["llava", "llava_next", "qwen2_vl", "internvl"]


def text_model(model):
    return model.model.language_model


@torch.no_grad()
def recompute(monkeypatch, family, inputs, extra, mode, cut):
    """Logits of the last prompt row and of `extra` further tokens: everything anew, with what is said hidden."""
    ids = torch.cat([inputs["input_ids"], torch.tensor([list(extra)], dtype=torch.long)], 1)
    visual = ids[0] == IMAGE
    blind = {tuple(map(int, name.split("-"))) for name in BLIND}

    def attention(module, query, key, value, mask, scaling=None, **kwargs):
        n, group = query.shape[2], query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = (query @ key.mT * scaling).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf"))
        if module.layer_idx >= cut:  # rows of text; those of visual tokens feed nothing any more
            scores[:, :, ~visual] = scores[:, :, ~visual].masked_fill(visual, float("-inf"))
        if mode == "fast":
            for layer, head in blind:
                if layer == module.layer_idx and layer < cut:
                    rows = scores[:, head, ~visual].masked_fill(visual, float("-inf"))
                    scores[:, head, ~visual] = rows
        weights = scores.softmax(-1)
        for layer, head in blind:
            if layer == module.layer_idx and layer < cut:
                if mode == "exact":
                    weights[:, head, :, visual] = 0
                else:
                    weights[:, head, visual] = 0
        return (weights @ value).transpose(1, 2).contiguous(), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "published", attention)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "published", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = MINIATURES[family].build()
    text_model(model).set_attn_implementation("published")
    call = dict(inputs, input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in call:
            call[name] = torch.nn.functional.pad(call[name], (0, len(extra)))
    return model(**call).logits[0, inputs["input_ids"].shape[1] - 1 :]


@pytest.mark.parametrize("mode, cut", [("fast", 3), ("fast", 4), ("exact", 3), ("exact", 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_are_the_published_ones(monkeypatch, family, mode, cut):
    inputs = vision_inputs(MINIATURES[family], images=(1,), text=[(6, 7)], seed=3)
    with infer_patch.patch(MINIATURES[family].build(), YOPO(blind=BLIND, cut_layer=cut, mode=mode)) as handle:
        out = handle.model.generate(
            **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        rows = [held.keys.shape[2] for held in out.past_key_values.layers]
    prompt, visual = inputs["input_ids"].shape[1], int((inputs["input_ids"] == IMAGE).sum())
    extra = out.sequences[0, prompt:-1].tolist()
    expected = recompute(monkeypatch, family, inputs, extra, mode, cut)
    torch.testing.assert_close(torch.cat(out.logits), expected, atol=1e-4, rtol=1e-4)
    assert rows == [prompt + 3] * cut + [prompt + 3 - visual] * (4 - cut)


def test_the_modes_differ_and_blind_heads_matter():
    model, inputs = MINIATURES["llava"].build(), vision_inputs(MINIATURES["llava"], images=(1,), seed=2)
    found = []
    for method in (YOPO(cut_layer=4), *(YOPO(cut_layer=4, blind=("1-0",), mode=m) for m in ("fast", "exact"))):
        with infer_patch.patch(model, method), torch.no_grad():
            found.append(model(**inputs).logits[:, -1])
    with torch.no_grad():
        assert torch.equal(found[0], model(**inputs).logits[:, -1])
    assert all((a - b).abs().max() > 1e-3 for a, b in ((found[0], found[1]), (found[1], found[2])))


def test_a_later_turn_does_not_read_the_pictures_of_the_first():
    """Blind heads know which keys of the cache are visual: two calls give what one gives."""
    inputs = vision_inputs(MINIATURES["llava"], images=(1,), text=[(6, 9)], seed=4)
    first = {k: v[:, :-4] if k in ("input_ids", "attention_mask") else v for k, v in inputs.items()}
    for mode in ("fast", "exact"):
        with infer_patch.patch(MINIATURES["llava"].build(), YOPO(blind=BLIND, cut_layer=3, mode=mode)) as handle:
            model = handle.model
            with torch.no_grad():
                whole = model(**inputs).logits[:, -1]
                cache = model(**first).past_key_values
                parts = model(input_ids=inputs["input_ids"][:, -4:], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


def test_tokens_that_were_taken_back_are_forgotten():
    """Text in the places of a picture that was taken back is text."""
    inputs = vision_inputs(MINIATURES["llava"], images=(1,), text=[(6, 9)], seed=4)
    ids = inputs["input_ids"]
    with infer_patch.patch(MINIATURES["llava"].build(), YOPO(blind=BLIND, cut_layer=4)) as handle, torch.no_grad():
        cache = handle.model(**inputs).past_key_values
        cache.crop(-(ids.shape[1] - 4) if crop_is_relative() else 4)
        after = handle.model(input_ids=ids[:, -9:], past_key_values=cache).logits[:, -1]
        text = torch.cat([ids[:, :4], ids[:, -9:]], 1)
        expected = handle.model(input_ids=text).logits[:, -1]
    torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loses_mass", [False, True])
@pytest.mark.parametrize("blind", [(0,), (1, 2, 5), tuple(range(6))])
@pytest.mark.parametrize("queries", [1, 7, 40])
def test_the_kernel_is_its_reference(loses_mass, blind, queries):
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, queries, 8, generator=draw)
    k, v = torch.randn(2, 2, 2, 40, 8, generator=draw)
    hidden = torch.zeros(2, 40, dtype=torch.bool)
    hidden[0, 3:20] = hidden[1, 10:36] = True
    rows = (~hidden[:, 40 - queries :]).sum(1).tolist()
    choice = HiddenKeys(blind, 6, queries, hidden, loses_mass, tuple(zip(rows, (23, 14))))
    expected = reference(q, k, v, choice, 0.3)
    torch.testing.assert_close(hidden_keys_attention(q, k, v, choice, 0.3), expected, atol=1e-5, rtol=1e-5)
    seeing = [h for h in range(6) if h not in blind]
    nothing = HiddenKeys(blind, 6, queries, torch.zeros_like(hidden), loses_mass, ((queries, 40),) * 2)
    assert torch.equal(expected[:, seeing], reference(q, k, v, nothing, 0.3)[:, seeing])


def test_blocks_that_a_report_counts():
    hidden = torch.zeros(1, 256, dtype=torch.bool)
    hidden[:, 64:192] = True
    read = {lost: HiddenKeys((0, 1), 4, 256, hidden, lost, ((128, 128),)).blocks_read(1, 2) for lost in (False, True)}
    assert read == {False: 2 * (10 + 3) // 2, True: 20}  # 10 causal blocks of 256 tokens, 3 of 128; half of the heads


def test_which_heads_see():
    attention = torch.tensor([[[0.5, 0.5, 0.0], [0.1, 0.3, 0.6]], [[1.0, 0.0, 0.0], [0.8, 0.2, 0.0]]])
    ratio = visual_ratio(attention, torch.tensor([False, True, False]))
    torch.testing.assert_close(ratio, torch.tensor([0.8 / 1.2, 0.2 / 1.8]).double())
    ratios = torch.zeros(5, 4, 2)
    ratios[:2, 2, 0] = ratios[:3, 3, 1] = 0.1  # 40 % is not enough, 60 % is
    ratios[:, 2, 1] = 0.05
    assert seeing_heads(ratios, 0.05).tolist() == [[True, True], [True, True], [False, False], [False, True]]


def test_where_the_cut_is_and_which_layers_have_blind_heads(tmp_path):
    parts = describe(MINIATURES["llava"].build())
    assert [YOPO().cut(n) for n in (28, 32, 40, 4)] == [24, 27, 34, 3]
    assert YOPO().resolve_layers(parts) == (3,) and YOPO(cut_layer=4).resolve_layers(parts) == ()
    file = tmp_path / "heads.json"
    file.write_text(json.dumps({"heads": {"1": [0], "3": [2]}}))
    method = YOPO(heads_file=str(file), cut_layer=2)
    assert method.resolve_layers(parts) == (1, 2)  # heads behind the cut have nothing to read
    assert method.layers_of("reduce", (1, 2), parts) == (2,) and method.layers_of("select", (1, 2), parts) == (1,)
    Plan((method, FastV(layer=1))).resolve(parts)
    with pytest.raises(ConflictError, match="key blocks can be selected by one method only"):
        Plan((method, SinkWindow())).resolve(parts)


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"cut_layer": -1}, "cut_layer must be a layer number"),
        ({"blind": ("3.1",)}, 'layer-head names like "5-0"'),
        ({"blind": ("3-1", "3-1")}, "given once each"),
        ({"blind": ("3-1",), "heads_file": "x.json"}, "not both"),
        ({"mode": "quick"}, "fast or exact"),
        ({"layers": (1,)}, "not `layers`"),
    ],
)
def test_options_that_make_no_sense(options, complaint):
    with pytest.raises(PlanError, match=complaint):
        YOPO(**options)


def test_models_it_does_not_serve():
    model = MINIATURES["llava"].build()
    for method, complaint in (
        (YOPO(cut_layer=5), "at most 4, the number of layers, got 5"),
        (YOPO(blind=("1-7",)), "names head 7 of layer 1"),
        (YOPO(heads_file="nowhere.json"), "cannot read the head list"),
    ):
        with pytest.raises(PlanError, match=complaint):
            infer_patch.patch(model, method)
    with pytest.raises(UnsupportedModelError, match="llama has none"):
        infer_patch.patch(MINIATURES["llama"].build(), YOPO())
    with pytest.raises(UnsupportedModelError, match="within a window of their own"):
        infer_patch.patch(MINIATURES["gemma3"].build(), YOPO(blind=("0-0",)))
