"""VTC-CLS: what is kept against a plain recomputation, and that the decoder runs as on the shorter sequence."""

import warnings

import pytest
import torch
from miniatures import IMAGE, MINIATURES, PAD, vision_inputs
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from vision_references import token_scores

import infer_patch
from infer_patch import Plan
from infer_patch.errors import PlanError, UnsupportedModelError
from infer_patch.evals.evaluate import at_random
from infer_patch.patches import VTCCLS, RandomPruning
from infer_patch.patches.vtc_cls import best_patches, newlines_of_kept_rows, tile_budgets
from infer_patch.vision_layout import NEWLINE, SPECIAL

PACKED = ["llava", "llava_next", "llava_onevision", "internvl", "idefics3", "smolvlm", "paligemma"]
KEPT = ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"]


def kept_tokens(model, inputs, method):
    """bool [B, T] and picture numbers of one forward call."""
    with infer_patch.patch(model, method) as handle, torch.no_grad():
        model(**inputs)
        ((keep, image),) = handle._engine.stats.methods["vtc_cls"].last.values()
    return keep, image


def text_model(model):
    return model.model.text_model if hasattr(model.model, "text_model") else model.model.language_model


@torch.no_grad()
def shorter(model, inputs, keep, extra, positions):
    """Logits of the last prompt row and of further tokens, from the text model alone, on the kept rows only."""
    text, given = text_model(model), {}
    hook = text.register_forward_pre_hook(lambda m, a, kw: given.update(kw), with_kwargs=True)
    model(**inputs)
    hook.remove()
    rows = keep[0].nonzero()[:, 0]
    new = model.get_input_embeddings()(torch.tensor([list(extra)], dtype=torch.long))
    embeds = torch.cat([given["inputs_embeds"][:, rows], new], 1)
    # without a mask, transformers takes gaps between positions for the beginning of another text
    call = {
        "inputs_embeds": embeds,
        "use_cache": False,
        "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.long),
    }
    if positions == "pack":
        call["position_ids"] = torch.arange(embeds.shape[1])[None]
    else:
        place = given.get("position_ids")
        place = torch.arange(keep.shape[1])[None] if place is None else place
        later = place.amax() + 1 + torch.arange(len(extra)).expand(*place.shape[:-1], -1)
        call["position_ids"] = torch.cat([place[..., rows], later], -1)
    if given.get("visual_pos_masks") is not None:  # Qwen3-VL adds features in its first layers
        visual = torch.nn.functional.pad(given["visual_pos_masks"][:, rows], (0, len(extra)))
        among = keep[given["visual_pos_masks"]]
        call |= {
            "visual_pos_masks": visual,
            "deepstack_visual_embeds": [x[among] for x in given["deepstack_visual_embeds"]],
        }
    if isinstance(given.get("attention_mask"), torch.Tensor) and given["attention_mask"].ndim == 4:  # PaliGemma
        n, prompt = embeds.shape[1], len(rows)
        mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)
        mask[:, :prompt] = 0
        call["attention_mask"] = mask[None, None]
    hidden = text(**call).last_hidden_state
    return model.lm_head(hidden)[0, len(rows) - 1 :]


@pytest.mark.parametrize(
    "family, positions", [(f, "pack") for f in PACKED] + [(f, "keep") for f in KEPT], ids=lambda x: x
)
def test_prefill_and_decode_are_those_of_the_shorter_sequence(family, positions):
    mini = MINIATURES[family]
    inputs = vision_inputs(mini, images=(1,), text=[(6, 7)], seed=3)
    if "token_type_ids" in inputs and mini.bidirectional == "prompt":
        inputs["token_type_ids"].zero_()
    model, method = mini.build(), VTCCLS(drop_ratio=0.6, positions=positions)
    keep, _ = kept_tokens(model, inputs, method)
    with infer_patch.patch(model, method):
        out = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    rows = {held.keys.shape[2] for held in out.past_key_values.layers}
    assert rows == {int(keep.sum()) + 3} and out.past_key_values.get_seq_length() == keep.shape[1] + 3
    extra = out.sequences[0, keep.shape[1] : -1].tolist()
    expected = shorter(model, inputs, keep, extra, positions)
    torch.testing.assert_close(torch.cat(out.logits), expected, atol=1e-4, rtol=1e-4)


def test_packing_without_a_cache_and_in_a_second_turn():
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1,), text=[(6, 7)], seed=3)
    method = VTCCLS(drop_ratio=0.6)
    keep, _ = kept_tokens(model, inputs, method)
    more = [11, 12, 13, 14]
    expected = shorter(model, inputs, keep, more, "pack")
    with infer_patch.patch(model, method), torch.no_grad():
        bare = {"input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"]}
        without = model(**bare, use_cache=False).logits[0, -1:]
        cache = model(**inputs).past_key_values
        mask = torch.ones(1, keep.shape[1] + 4, dtype=torch.long)
        second = model(torch.tensor([more]), attention_mask=mask, past_key_values=cache).logits[0]
    torch.testing.assert_close(without, expected[:1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(second, expected[1:], atol=1e-4, rtol=1e-4)


def test_a_second_turn_with_another_picture_packs_behind_the_first():
    mini = MINIATURES["llava"]
    model, method = mini.build(), VTCCLS(drop_ratio=0.6)
    both = vision_inputs(mini, images=(2,), text=[(6, 7)], seed=3)
    ids, pixels = both["input_ids"], both["pixel_values"]
    first = int((ids[0] == IMAGE).nonzero()[15]) + 1  # through the last token of the first picture
    with infer_patch.patch(model, method), torch.no_grad():
        whole = model(**both).logits[0, -1]
        cache = model(ids[:, :first], pixel_values=pixels[:1]).past_key_values
        later = model(ids[:, first:], pixel_values=pixels[1:], past_key_values=cache).logits[0, -1]
    torch.testing.assert_close(later, whole, atol=1e-4, rtol=1e-4)


def test_beams_carry_the_positions_of_their_sample():
    mini = MINIATURES["llava"]
    model, options = mini.build(), {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    inputs = vision_inputs(mini, images=(1, 2, 0), text=[(5, 9), (3, 12), (7, 4)], seed=1)
    width = inputs["input_ids"].shape[1]
    with infer_patch.patch(model, VTCCLS(drop_ratio=0.8)):
        batch = model.generate(**inputs, **options)
        for i in range(3):
            alone = vision_inputs(mini, images=(1, 2, 0), text=[(5, 9), (3, 12), (7, 4)], seed=1, only=i)
            tokens = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
            assert torch.equal(batch[i, width:], tokens)


@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_vl", "gemma3", "idefics3"])
def test_the_best_tokens_of_every_picture_stay_in_order(family):
    mini = MINIATURES[family]
    inputs = vision_inputs(mini, images=(1, 2, 0), seed=4)
    clip = mini.vision.get("model_type") == "clip_vision_model"
    blocks = [0, 1] if clip else [0, 1, 2]
    pictures = iter(token_scores(family, mini.build(attn_implementation="eager"), inputs, blocks))
    keep, image = kept_tokens(mini.build(), inputs, VTCCLS(tokens=3))
    for sample in range(3):
        for number in range(int(image[sample].max()) + 1):
            scores = next(pictures)
            best = sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:3])
            assert keep[sample, image[sample] == number].nonzero()[:, 0].tolist() == best
    assert keep[(image < 0) & inputs["attention_mask"].bool()].all()


def llava(blocks=24, patches=24, layer=-2, strategy="default"):
    """CLIP-L's shape in blocks and patches (24 x 24 of them, and CLS), narrow; a decoder of one layer."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=blocks, image_size=4 * patches, patch_size=4)
    text = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=32, pad_token_id=PAD)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
        for block in model.model.vision_tower.modules():
            if isinstance(block, torch.nn.Linear):
                torch.nn.init.normal_(block.weight, std=1.5 * block.weight.shape[1] ** -0.5)
    pixels = torch.randn(1, 3, 4 * patches, 4 * patches, generator=torch.Generator().manual_seed(1))
    tokens = patches**2 + (strategy == "full")
    return model, {"input_ids": torch.tensor([[9, 10] + [IMAGE] * tokens + [11, 12, 13]]), "pixel_values": pixels}


def test_kept_sets_on_an_encoder_of_24_blocks_and_577_tokens():
    model, inputs = llava()
    eager = model.model.vision_tower
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        rows = [a[0, :, 0, 1:].mean(0) for a in eager(inputs["pixel_values"], output_attentions=True).attentions]
    eager.set_attn_implementation("sdpa")
    assert len(rows) == 24 and rows[0].shape == (576,)
    cases = [
        ({}, range(16, 23)),
        ({"ensemble_k": 1}, [22]),
        ({"start_block": 22}, [22]),
        ({"start_block": -4}, [20, 21, 22]),
        ({"ensemble_k": 99}, range(23)),
    ]
    for options, blocks in cases:
        scores = sum(rows[b] for b in blocks)
        assert float(scores.sum()) < len(blocks) and (scores >= 0).all()
        for count in (256, 64):
            keep, image = kept_tokens(model, inputs, VTCCLS(tokens=count, **options))
            assert keep[image >= 0].nonzero()[:, 0].tolist() == sorted(scores.topk(count).indices.tolist())
    small = kept_tokens(model, inputs, VTCCLS(tokens=64))[0]
    assert (kept_tokens(model, inputs, VTCCLS(tokens=128))[0] | ~small).all()  # nested
    other = dict(inputs, input_ids=torch.cat([inputs["input_ids"], torch.tensor([[14, 15]])], 1))
    assert torch.equal(kept_tokens(model, other, VTCCLS(tokens=64))[0][:, :-2], small)  # whatever the question


@pytest.mark.parametrize("layer, last", [(-1, 5), (-2, 4), (-3, 3), (2, 1), ([-4, -2], 4)])
def test_the_ensemble_ends_where_the_features_come_from(layer, last):
    model, inputs = llava(blocks=6, patches=4, layer=layer)
    if isinstance(layer, list):  # features of all listed layers side by side
        model.model.multi_modal_projector.linear_1 = torch.nn.Linear(64, 32)
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        rows = [a[0, :, 0, 1:].mean(0) for a in tower(inputs["pixel_values"], output_attentions=True).attentions]
    scores = sum(rows[max(last - 1, 0) : last + 1])
    keep, image = kept_tokens(model, inputs, VTCCLS(tokens=5, ensemble_k=2))
    assert keep[image >= 0].nonzero()[:, 0].tolist() == sorted(scores.topk(5).indices.tolist())


def test_a_cls_token_among_the_features_stays_and_does_not_count():
    model, inputs = llava(blocks=4, patches=4, strategy="full")
    keep, image = kept_tokens(model, inputs, VTCCLS(tokens=5))
    assert keep[image >= 0].sum() == 6 and keep[image >= 0][0]
    default, plain = llava(blocks=4, patches=4)
    expected, numbers = kept_tokens(default, plain, VTCCLS(tokens=5))
    assert torch.equal(keep[image >= 0][1:], expected[numbers >= 0])


def test_budgets_of_tiles():
    assert tile_budgets(torch.tensor([576, 576, 288]), 100).tolist() == [40, 40, 20]
    assert tile_budgets(torch.tensor([10, 10, 10]), 11).tolist() == [4, 4, 3]  # ties to the earlier tile
    assert tile_budgets(torch.tensor([97, 1, 2]), 10).tolist() == [8, 1, 1]  # at least one
    assert tile_budgets(torch.tensor([4, 4, 4]), 2).tolist() == [1, 1, 1]
    assert tile_budgets(torch.tensor([4, 3, 0]), 7).tolist() == [4, 3, 0]
    for total in range(3, 60):
        sizes = torch.tensor([30, 17, 13])
        budgets = tile_budgets(sizes, total)
        assert budgets.sum() == total and (budgets >= 1).all() and (budgets <= sizes).all()


def test_tiles_rows_and_newlines():
    tile = torch.tensor([0, 0, 1, 2, NEWLINE, 1, 2, NEWLINE, 1, 2, NEWLINE])
    scores = torch.tensor([9.0, 1, 3, 2, float("nan"), 5, 1, float("nan"), 0, 7, float("nan")])
    keep = best_patches(scores, tile, 3)
    assert keep.nonzero()[:, 0].tolist() == [0, 5, 9]  # one of each tile
    assert newlines_of_kept_rows(keep, tile).nonzero()[:, 0].tolist() == [7, 10]
    alone = torch.tensor([SPECIAL, 0, 0, NEWLINE])
    kept = best_patches(torch.tensor([float("nan"), 1.0, 1.0, float("nan")]), alone, 1)
    assert kept.tolist() == [False, True, False, False]  # ties to the lower index
    assert newlines_of_kept_rows(kept, alone).tolist() == [False, False, False, True]


@pytest.mark.parametrize("newlines", ["row", "always"])
def test_newline_tokens_of_llava_next(newlines):
    mini = MINIATURES["llava_next"]
    keep, image = kept_tokens(mini.build(), vision_inputs(mini, images=(1, 2)), VTCCLS(tokens=3, newlines=newlines))
    for sample, picture in ((0, 0), (1, 0), (1, 1)):
        kept = keep[sample, image[sample] == picture].tolist()
        rows = [kept[4:8], kept[9:13]]
        assert sum(kept[:4]) == 1 and sum(map(sum, rows)) == 2
        assert [kept[8], kept[13]] == [newlines == "always" or any(row) for row in rows]


@pytest.mark.parametrize("options", [{"tokens": 3}, {"tokens": 99}, {"drop_ratio": 0.7}])
def test_the_random_control_keeps_as_many(options):
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2, 0))
    counts = []
    for plan in (Plan((VTCCLS(**options),)), at_random(Plan((VTCCLS(**options),)))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # 99 tokens are all
            with infer_patch.patch(model, plan) as handle, torch.no_grad():
                model(**inputs)
                ((name, figures),) = handle.report().methods.items()
        counts.append(figures["kept_per_image"])
    assert name == "random" and counts[0] == counts[1]
    with pytest.raises(PlanError, match="random: tokens must be 1 or more"):
        RandomPruning(tokens=0)


def test_positions_are_packed_only_where_they_can_be():
    for family, packs in (("llava", True), ("paligemma", True), ("qwen2_vl", False), ("gemma3", False)):
        with infer_patch.patch(MINIATURES[family].build(), VTCCLS()) as handle:
            assert bool(handle._engine.packers) == packs
    for family, reason in (("qwen2_vl", "M-RoPE"), ("qwen3_vl", "M-RoPE"), ("gemma3", "within a window")):
        with pytest.raises(UnsupportedModelError, match=f'{reason}.*Use positions="keep"'):
            infer_patch.patch(MINIATURES[family].build(), VTCCLS(positions="pack"))


def test_blocks_that_cannot_vote_are_refused():
    model = MINIATURES["llava"].build()  # three blocks, features of the second
    with pytest.raises(UnsupportedModelError, match=r"start_block 2 leaves no block.*blocks 0 to 1"):
        infer_patch.patch(model, VTCCLS(start_block=2))
    with infer_patch.patch(model, VTCCLS(start_block=-2)):
        pass


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"tokens": 0}, "tokens must be 1 or more, got 0"),
        ({"drop_ratio": 1.0}, "below 1, got 1.0"),
        ({"ensemble_k": 0}, "ensemble_k must be 1 or more"),
        ({"start_block": "x"}, "start_block must be a block number"),
        ({"positions": "gaps"}, "positions must be one of auto, pack, keep"),
        ({"newlines": "never"}, "newlines must be row or always"),
        ({"layers": (1,)}, "acts before the decoder"),
    ],
)
def test_options_that_make_no_sense(options, complaint):
    with pytest.raises(PlanError, match=f"vtc_cls: .*{complaint}"):
        VTCCLS(**options)
