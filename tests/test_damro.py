"""DAMRO: the outlier patches, the second stream against one that recomputes everything, beams, batches, refusals."""

import inspect
import math

import pytest
import torch
from miniatures import GREEDY, IMAGE, MINIATURES, vision_inputs
from second_streams import both_streams, without_cache
from test_behaviour import snapshot

import infer_patch
from infer_patch import damro
from infer_patch.damro import Damro, contrast
from infer_patch.errors import PatchError, UnsupportedCallError, UnsupportedModelError
from infer_patch.families import describe
from infer_patch.patches import VTCCLS, FastV
from infer_patch.vision_tower import find_vision_tower

BEAMS = {**GREEDY, "num_beams": 3}


def test_contrast_is_the_formula():
    rng = torch.Generator().manual_seed(0)
    positive, negative = (3 * torch.randn(4, 50, generator=rng) for _ in range(2))
    found = contrast(positive, negative, 2.0, 0.1)
    probabilities = positive.softmax(-1)
    likely = probabilities >= 0.1 * probabilities.amax(-1, keepdim=True)
    assert torch.equal(found > -math.inf, likely)
    torch.testing.assert_close(found[likely], (3 * positive - 2 * negative)[likely])
    assert (found.gather(1, positive.argmax(-1, keepdim=True)) > -math.inf).all()
    assert torch.equal(contrast(positive, negative, 0.0, 0.0), positive)
    alone = contrast(positive, negative, 5.0, 1.0)
    assert torch.equal(alone.argmax(-1), positive.argmax(-1)) and ((alone > -math.inf).sum(-1) == 1).all()
    logs = contrast(positive.log_softmax(-1), negative.log_softmax(-1), 2.0, 0.1)
    torch.testing.assert_close(logs.softmax(-1), found.softmax(-1))


@torch.no_grad()
def outliers(model, pixels, k, heads):
    """The best patches of every picture or tile, best first, from what q_proj and k_proj put out."""
    attention, seen = find_vision_tower(describe(model)).attentions[1], {}
    hooks = [
        projection.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
        for name, projection in (("q", attention.q_proj), ("k", attention.k_proj))
    ]
    model.model.vision_tower(pixels)
    for hook in hooks:
        hook.remove()
    if heads == "joint":
        row = (seen["q"][:, :1] @ seen["k"].mT * seen["q"].shape[-1] ** -0.5).softmax(-1)[:, 0]
    else:
        q, key = (seen[name].unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for name in "qk")
        row = (q[:, :, :1] @ key.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1)[:, 0]
    return row[:, 1:].topk(k).indices


@pytest.mark.parametrize("heads", ["joint", "mean_heads"])
def test_the_second_prompt_holds_the_outlier_patches(heads):
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2, 0), text=[(5, 9), (3, 12), (7, 4)])
    processor = Damro(model, inputs, k=3, cls_attention=heads)
    features = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    best = iter(zip(features, outliers(model, inputs["pixel_values"], 3, heads)))
    for row, valid, second in zip(inputs["input_ids"], inputs["attention_mask"].bool(), processor._second):
        expected, row = [], row[valid]
        for i, token in enumerate(row.tolist()):
            if token != IMAGE:
                expected.append(model.get_input_embeddings()(row[i])[None])
            elif row[i - 1] != IMAGE:
                picture, chosen = next(best)
                expected.append(picture[chosen])
        torch.testing.assert_close(second["inputs_embeds"], torch.cat(expected))


def test_tiles_give_their_whole_view_and_a_newline():
    mini = MINIATURES["llava_next"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1,), text=[(2, 2)])
    embeds = Damro(model, inputs, k=3)._second[0]["inputs_embeds"]
    with torch.no_grad():
        (features,) = model.model.get_image_features(
            inputs["pixel_values"], inputs["image_sizes"], return_dict=True
        ).pooler_output
    best = outliers(model, inputs["pixel_values"][0], 3, "joint")[0]
    torch.testing.assert_close(embeds[2:6], torch.cat([features[best], features[8:9]]))
    assert torch.equal(features[8], features[13]) and len(embeds) == 8


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_the_cached_stream_is_the_recomputed_one_and_batches_are_their_samples(family, options):
    mini, text = MINIATURES[family], [(5, 9), (3, 12), (7, 4)]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2, 0), text=text, seed=1)
    plain = model.generate(**inputs, **options)  # first: transformers puts hooks of its own on in its first call
    before = snapshot(model)
    found = model.generate(**inputs, **options, logits_processor=[Damro(model, inputs)])
    assert not torch.equal(found, plain)
    assert torch.equal(
        found, model.generate(**inputs, **options, logits_processor=[without_cache(Damro(model, inputs))])
    )
    width = inputs["input_ids"].shape[1]
    for i in range(3):
        alone = vision_inputs(mini, images=(1, 2, 0), text=text, seed=1, only=i)
        if i < 2:
            tokens = model.generate(**alone, **options, logits_processor=[Damro(model, alone)])
            assert torch.equal(found[i, width:], tokens[0, alone["input_ids"].shape[1] :])
    assert snapshot(model) == before
    assert torch.equal(model.generate(**inputs, **options), plain)


def test_beams_are_ranked_by_the_sum_of_what_was_contrasted():
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(2,), seed=1)
    processor = Damro(model, inputs, beta=0.0)
    options = dict(BEAMS, num_return_sequences=3, length_penalty=0.0, return_dict_in_generate=True, output_scores=True)
    found = model.generate(**inputs, **options, logits_processor=[processor])
    for sequence, score in zip(found.sequences, found.sequences_scores):
        answer = sequence[inputs["input_ids"].shape[1] :]
        first, second = both_streams(model, inputs, processor, answer)
        steps = (3 * first - 2 * second).gather(1, answer[:, None])
        torch.testing.assert_close(score, steps.sum(), atol=1e-3, rtol=1e-4)


def test_defaults_are_the_authors():
    options = {name: p.default for name, p in inspect.signature(Damro).parameters.items() if p.default is not p.empty}
    assert options == {"alpha": 2.0, "k": 10, "beta": 0.1, "cls_attention": "joint"}


def test_what_survives_the_cut_is_a_matter_of_the_first_stream():
    rng = torch.Generator().manual_seed(0)
    positive, *negatives = (3 * torch.randn(20, 50, generator=rng) for _ in range(4))
    kept = [contrast(positive, negative, 2.0, 0.1) > -math.inf for negative in negatives]
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])
    assert 1 < kept[0].sum(-1).float().mean() < 50
    suppressed = positive.masked_fill(torch.rand(20, 50, generator=rng) < 0.3, -math.inf)  # by another processor
    found = contrast(suppressed, negatives[0], 2.0, 0.1)
    assert not found.isnan().any() and (found[suppressed == -math.inf] == -math.inf).all()


def test_without_weight_it_is_truncated_sampling_and_cut_to_one_token_it_is_greedy():
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2), seed=1)

    def sampled(**options):
        torch.manual_seed(0)
        return model.generate(**inputs, max_new_tokens=8, do_sample=True, top_k=0, **options)

    truncated = sampled(min_p=0.1)  # transformers' own: P >= 0.1 max P
    assert torch.equal(sampled(logits_processor=[Damro(model, inputs, alpha=0.0)]), truncated)
    assert not torch.equal(sampled(), truncated)
    greedy = model.generate(**inputs, **GREEDY)
    assert torch.equal(sampled(logits_processor=[Damro(model, inputs, alpha=5.0, beta=1.0)]), greedy)


def test_one_question_about_two_pictures():
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 1), seed=1)
    inputs["input_ids"][1] = inputs["input_ids"][0]
    found = model.generate(**inputs, **BEAMS, logits_processor=[Damro(model, inputs)])
    for i in range(2):
        alone = {name: x[i : i + 1] for name, x in inputs.items()}
        assert torch.equal(found[i], model.generate(**alone, **BEAMS, logits_processor=[Damro(model, alone)])[0])


def test_all_tokens_in_their_places_give_the_same_stream(monkeypatch):
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2))
    by_attention = Damro(model, inputs, k=16)
    monkeypatch.setattr(damro, "outlier_tokens", lambda scores, k: torch.arange(len(scores.tile)))
    processor = Damro(model, inputs, alpha=3.0)
    options = dict(GREEDY, output_logits=True, output_scores=True, return_dict_in_generate=True)
    found = model.generate(**inputs, **options, logits_processor=[processor])
    for scores, logits in zip(found.scores, found.logits):  # but for a constant, and what the cut leaves
        kept = scores > -math.inf
        expected = logits.masked_fill(~kept, -math.inf).softmax(-1)
        torch.testing.assert_close(scores.softmax(-1), expected, atol=1e-4, rtol=1e-3)
    assert torch.equal(found.sequences, model.generate(**inputs, **GREEDY))
    again = model.generate(**inputs, **GREEDY, logits_processor=[processor])  # from the start once more
    assert torch.equal(again, found.sequences)
    with torch.no_grad():  # all of them by attention: their order and so their positions are others
        same, other = (p._second_stream(inputs["input_ids"]) for p in (processor, by_attention))
    assert (same - other).abs().max() > 0.1


def test_on_a_patched_model_the_second_stream_is_left_alone():
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2))
    processor, naive = Damro(model, inputs), without_cache(Damro(model, inputs))
    with infer_patch.patch(model, FastV(layer=1)):
        found = model.generate(**inputs, **GREEDY, logits_processor=[processor])
        assert torch.equal(found, model.generate(**inputs, **GREEDY, logits_processor=[naive]))


def test_what_cannot_be_served_is_refused():
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1,))
    for options in ({"alpha": -1}, {"k": 0}, {"beta": 2}, {"cls_attention": "sum"}):
        with pytest.raises(PatchError, match=f"damro: {next(iter(options))} must be"):
            Damro(model, inputs, **options)
    qwen = MINIATURES["qwen2_vl"]
    with pytest.raises(UnsupportedModelError, match="that of qwen2_vl has none"):
        Damro(qwen.build(), vision_inputs(qwen, images=(1,)))
    with pytest.raises(UnsupportedModelError, match="llama has no visual tokens"):
        Damro(MINIATURES["llama"].build(), inputs)
    with pytest.raises(UnsupportedCallError, match="hold no `pixel_values`"):
        Damro(model, {"input_ids": inputs["input_ids"]})
    with pytest.raises(UnsupportedCallError, match="`input_ids` among them"):
        Damro(model, {"pixel_values": inputs["pixel_values"]})
    other = vision_inputs(mini, images=(1,), seed=5)
    with pytest.raises(UnsupportedCallError, match="not the prompt"):
        model.generate(**other, **GREEDY, logits_processor=[Damro(model, inputs)])
    with pytest.raises(UnsupportedCallError, match=r"attention_mask is \[1, 2\], input_ids \[1, 30\]"):
        Damro(model, dict(inputs, attention_mask=torch.ones(1, 2)))
    for assisted in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": mini.build(seed=1)}):
        with pytest.raises(UnsupportedCallError, match="no assisted decoding"):
            model.generate(**inputs, **GREEDY, **assisted, logits_processor=[Damro(model, inputs)])
    with infer_patch.patch(model, VTCCLS()), pytest.raises(PatchError, match="make the processor before it"):
        Damro(model, inputs)
