"""VAR: sink tokens, the rule of the rows, a model with planted sinks, the state of a prompt, refusals."""

import json
import warnings

import pytest
import torch
from miniatures import BOS, GREEDY, MINIATURES, text_inputs, vision_inputs
from test_image_shift import written_out

import infer_patch
from infer_patch.errors import PlanError, UnsupportedModelError
from infer_patch.kernels.image_shift import ImageRule, reference_shifted
from infer_patch.patches import VAR, FastV
from infer_patch.patches.var import read_dims, sink_activation

DIMS, WIDTH, PLANTED = (7, 300), 512, (3, 11)  # sqrt(512) = 22.6 is above the official tau of 20
PLAN = VAR(dims=DIMS, vision_mass_min=0.1)


@pytest.fixture(scope="module")
def planted():
    """LLaVA in small, in which BOS and two visual tokens of each picture are huge in two hidden dimensions that nothing
    reads or writes."""
    mini = MINIATURES["llava"]
    model = mini.build(hidden_size=WIDTH, num_hidden_layers=5, num_key_value_heads=2)
    text = model.model.language_model
    with torch.no_grad():
        text.embed_tokens.weight[:, DIMS] = 0
        text.embed_tokens.weight[BOS, DIMS] = torch.tensor([100.0, 900.0])  # both at 900 give sqrt(512 / 2) = 16 only
        for layer in text.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[list(DIMS)] = 0
            layer.self_attn.o_proj.weight[list(DIMS)] = 0
            layer.mlp.down_proj.weight[list(DIMS)] = 0
        text.norm.weight[list(DIMS)] = 0

    def plant(module, args, output):
        output = output.clone()
        output[..., list(DIMS)] = 0
        for token in PLANTED:
            output[..., token, list(DIMS)] = torch.tensor([900.0, -150.0])
        return output

    model.model.multi_modal_projector.register_forward_hook(plant)
    return mini, model


def prompt(mini, images=(1,), seed=2, **options):
    inputs = vision_inputs(mini, images=images, seed=seed, **options)
    first = inputs["attention_mask"].int().argmax(1)
    inputs["input_ids"][torch.arange(len(first)), first] = BOS
    return inputs


def corrected(report):
    return report.methods["var"]["corrected"]


@torch.no_grad()
def test_planted_sinks_are_found_and_their_attention_goes_to_the_picture(planted):
    mini, model = planted
    inputs, seen = prompt(mini), {}
    layer = model.model.language_model.layers[2].self_attn
    with infer_patch.patch(model, VAR(dims=DIMS, vision_mass_min=0.1, layers=(2,))) as handle:
        hook = layer.o_proj.register_forward_pre_hook(lambda m, args: seen.update(out=args[0]))
        model(**inputs)
        hook.remove()
        counts = corrected(handle.report())
    assert list(counts) == [2]
    assert counts[2]["visual_sinks"] == len(PLANTED) and counts[2]["text_sinks"] == 1
    hooks = [
        layer.v_proj.register_forward_hook(lambda m, args, out: seen.update(v=out)),
        layer.o_proj.register_forward_pre_hook(lambda m, args: seen.update(plain=args[0])),
    ]
    model.set_attn_implementation("eager")
    a = model(**inputs, output_attentions=True).attentions[2].double()
    model.set_attn_implementation("sdpa")
    for hook in hooks:
        hook.remove()
    visual = inputs["input_ids"] == mini.image_token_id
    sinks = inputs["input_ids"] == BOS
    sinks[0, visual[0].nonzero()[list(PLANTED), 0]] = True
    behind = torch.arange(visual.shape[1])[None] > visual[0].nonzero().max()
    new, rows = written_out(a, sinks, visual, behind, ImageRule(0.5, 0.1, 0.4))
    assert int(rows.sum()) == counts[2]["rows"] > 0
    v = seen["v"][0].view(-1, 2, 128).transpose(0, 1).double().repeat_interleave(2, 0)
    expected = (new[0] @ v).transpose(0, 1).flatten(1)
    torch.testing.assert_close(seen["out"][0].double(), expected, atol=1e-4, rtol=1e-4)
    before_end = int(visual[0].nonzero().max()) + 1
    torch.testing.assert_close(seen["out"][0, :before_end], seen["plain"][0, :before_end])
    gained = (new - a)[rows]
    non_sink = visual[0] & ~sinks[0]
    torch.testing.assert_close(gained[:, non_sink].sum(-1), -gained[:, sinks[0]].sum(-1))
    assert (gained[:, ~(visual[0] | sinks[0])] == 0).all()


def test_while_generating_the_sinks_of_the_prompt_are_used(planted):
    mini, model = planted
    with infer_patch.patch(model, PLAN) as handle:
        model.generate(**prompt(mini), **GREEDY)
        counts = corrected(handle.report())
    assert list(counts) == [2, 3]  # 0, 1 and the last are left out
    rows = {i: c["rows_asked"] for i, c in counts.items()}
    assert rows == {i: 4 * (9 + 7) for i in (2, 3)}  # heads x (words behind the picture + tokens that were fed back)
    assert all(c["visual_sinks"] == len(PLANTED) and c["text_sinks"] == 1 for c in counts.values())


def test_prompts_do_not_see_each_other(planted):
    """In the released code the second prompt is edited with the first picture's sinks."""
    mini, model = planted
    inputs, other = prompt(mini), prompt(mini, images=(2,), seed=4)
    with infer_patch.patch(model, PLAN), torch.no_grad():
        first, second = (model(**x).logits for x in (inputs, other))
        assert torch.equal(model(**inputs).logits, first)
        cache = model(**inputs, use_cache=True).past_key_values
        cache.crop(-cache.get_seq_length())
        assert torch.equal(model(**other, past_key_values=cache).logits, second)


def test_a_padded_batch_with_different_pictures_gives_what_its_samples_give(planted):
    mini, model = planted
    batch = prompt(mini, images=(1, 2, 0))
    with infer_patch.patch(model, PLAN):
        found = model.generate(**batch, **GREEDY, output_logits=True, return_dict_in_generate=True)
        for i in range(3):
            alone = prompt(mini, images=(1, 2, 0), only=i)
            one = model.generate(**alone, **GREEDY, output_logits=True, return_dict_in_generate=True)
            for a, b in zip(found.logits, one.logits):
                torch.testing.assert_close(a[i], b[0], atol=1e-3, rtol=1e-3)


def test_beams_and_a_later_turn_keep_the_sinks(planted):
    mini, model = planted
    inputs = prompt(mini)
    with infer_patch.patch(model, PLAN) as handle, torch.no_grad():
        model.generate(**inputs, **GREEDY, num_beams=3)
        handle.report(reset=True)
        cache = model(**inputs, use_cache=True).past_key_values
        asked = corrected(handle.report())[2]["rows_asked"]
        more = torch.randint(10, 50, (1, 5), generator=torch.Generator().manual_seed(0))
        model(more, past_key_values=cache)
        assert corrected(handle.report())[2]["rows_asked"] == asked + 4 * 5


def test_neither_pictures_without_sinks_nor_text_are_touched(planted):
    mini, model = planted
    text = text_inputs(mini, lengths=(20,))
    text["input_ids"][0, 0] = BOS
    for inputs, method, said in (
        (text, PLAN, "no picture"),
        (prompt(mini), VAR(dims=(5,)), "no visual token is a sink"),
        (prompt(mini), VAR(dims=DIMS, tau=23.0), "no token can be a sink: tau 23 is not below sqrt(512)"),
        (prompt(mini), VAR(dims=DIMS, move_fraction=0.0), "move_fraction is 0"),
    ):
        expected = model.generate(**inputs, **GREEDY)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with infer_patch.patch(model, method) as handle:
                assert torch.equal(model.generate(**inputs, **GREEDY), expected)
                report = handle.report()
        assert report.silent == ["var"]
        assert report.methods["var"]["left_alone"] == {said: 16}  # 8 calls in 2 layers


def test_tokens_that_were_dropped_are_no_sinks_any_more(planted):
    mini, model = planted
    inputs = prompt(mini, images=(2,))
    counts = set()
    for ratio in (0.25, 0.5, 0.75):
        with warnings.catch_warnings(), infer_patch.patch(model, [FastV(layer=2, drop_ratio=ratio), PLAN]) as handle:
            warnings.simplefilter("ignore", UserWarning)
            model.generate(**inputs, **GREEDY)
            report = handle.report()
            (kept, image), *_ = handle._engine.stats.methods["fastv"].last.values()
        places = [(image[0] == picture).nonzero()[list(PLANTED), 0] for picture in (0, 1)]
        left = int(kept[0, torch.cat(places)].sum())
        found = [c["visual_sinks"] for c in corrected(report).values()]
        assert found == ([left] * 2 if left else [])
        counts.add(left)
    assert len(counts) > 1, "no sink was ever dropped: nothing is tested"


def test_the_measure_of_a_sink():
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    x[0, 2, 9] = -1e6
    phi = sink_activation(x, (4, 9))
    expected = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()).abs()[..., [4, 9]].amax(-1)
    torch.testing.assert_close(phi, expected)
    torch.testing.assert_close(phi[0, 2], torch.tensor(8.0))  # sqrt(64), the most there is
    assert sink_activation(x.to(torch.bfloat16), (4, 9)).dtype == torch.float32


def test_invariants_of_the_formula():
    a = torch.rand(2, 3, 9, 30, generator=torch.Generator().manual_seed(0)) ** 4
    a = a / a.sum(-1, keepdim=True)
    visual = torch.zeros(2, 30, dtype=torch.bool)
    visual[:, 5:15] = True
    sinks = torch.zeros_like(visual)
    sinks[:, 0] = sinks[:, 6] = sinks[:, 20] = True
    asked = torch.ones(2, 9, dtype=torch.bool)
    new, rows = reference_shifted(a, sinks, visual, asked, ImageRule(0.5, 0.2, 0.4))
    assert rows.any() and not rows.all()
    torch.testing.assert_close(new.sum(-1), torch.ones(2, 3, 9))
    assert torch.equal(new[~rows], a[~rows])
    ratio = (new / a)[rows]
    torch.testing.assert_close(ratio[:, sinks[0]], torch.full_like(ratio[:, sinks[0]], 0.6))
    image = ratio[:, visual[0] & ~sinks[0]]
    torch.testing.assert_close(image, image[:, :1].expand_as(image))
    assert (image > 1).all()
    assert (ratio[:, ~(visual[0] | sinks[0])] == 1).all()
    text_only = sinks & ~visual
    assert torch.equal(reference_shifted(a, text_only, visual, asked, ImageRule(0.5, 0.2, 0.4))[0], a)
    assert torch.equal(reference_shifted(a, sinks, visual, asked, ImageRule(0.5, 0.2, 0.0))[0], a)


def test_the_demo_model_has_no_sinks_at_the_official_threshold():
    from infer_patch.demo_vlm import load_demo_vlm

    model, processor = load_demo_vlm(torch.float32)
    from PIL import Image

    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a red circle?"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(images=[Image.new("RGB", (64, 64), "red")], text=[text], return_tensors="pt")
    with pytest.warns(UserWarning, match="var"), infer_patch.patch(model, VAR(dims=(3, 17))) as handle:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        said = str(handle.report())
    assert "NEVER FIRED" in said and "no token can be a sink: tau 20 is not below sqrt(256)" in said


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({}, "give dims or dims_file, one of them"),
        ({"dims": (1, -2)}, "numbers of hidden dimensions"),
        ({"dims": (1,), "tau": 0}, "tau must be above 0"),
        ({"dims": (1,), "move_fraction": 1.2}, "move_fraction is a share"),
    ],
)
def test_values_that_make_no_sense(options, complaint):
    with pytest.raises(PlanError, match=complaint):
        VAR(**options)


def test_models_it_cannot_serve(tmp_path):
    file = tmp_path / "dims.json"
    file.write_text(json.dumps({"dims": [3, 70]}))
    assert read_dims(file) == (3, 70)
    with pytest.raises(PlanError, match=r"dimension 70 of a model with 64 hidden dimensions"):
        infer_patch.patch(MINIATURES["llava"].build(), VAR(dims_file=str(file)))
    with pytest.raises(UnsupportedModelError, match="moves attention to visual tokens, and llama has none"):
        infer_patch.patch(MINIATURES["llama"].build(), PLAN)
    with pytest.raises(UnsupportedModelError, match=r"layers \[1\] .* it can act on layers 2 only"):
        infer_patch.patch(MINIATURES["llava"].build(), VAR(dims=(1,), layers=(1,)))
    twice = [VAR(dims=(1,)), VAR(dims=(1,), tau=9.0)]
    with pytest.raises(PlanError, match=r"var and var both act on layers 2: each .* is not defined") as refused:
        infer_patch.patch(MINIATURES["llava"].build(), twice)
    assert "Give them different `layers`, or leave one out." in str(refused.value)
    file.write_text("{}")
    with pytest.raises(PlanError, match="should hold an object with `dims`"):
        read_dims(file)
