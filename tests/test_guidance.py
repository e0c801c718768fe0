"""Guidance: the formula, the prompt without pictures on every family, under patches, beams, batches, refusals."""

import math
import warnings

import pytest
import torch
from miniatures import GREEDY, IMAGE, MINIATURES, VIDEO, text_inputs, vision_inputs
from rows import ROWS, inputs_for
from second_streams import both_streams, without_cache
from test_behaviour import snapshot
from transformers import LogitsProcessor

import infer_patch
from infer_patch.errors import PatchError, UnsupportedCallError, UnsupportedModelError
from infer_patch.guidance import ClassifierFreeGuidance, guide
from infer_patch.patches import Paint

BEAMS = {**GREEDY, "num_beams": 3}
SAMPLES = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "num_return_sequences": 3}
TEXT = [(5, 9), (3, 12), (7, 4)]
FAMILIES = [name for name, mini in MINIATURES.items() if mini.kind == "vision"]


class Forced(LogitsProcessor):
    """The next tokens of every row are those of `answers` [rows, t]."""

    def __init__(self, prompt, answers):
        self.start, self.answers = prompt, answers

    def __call__(self, ids, scores):
        chosen = self.answers[:, ids.shape[1] - self.start]
        return torch.full_like(scores, -math.inf).scatter(1, chosen[:, None], 0.0)


def forced(model, inputs, answers):
    """Log-probabilities [rows, t, vocabulary] of generate before each token of given answers."""
    options = dict(max_new_tokens=answers.shape[1], do_sample=False, output_logits=True, return_dict_in_generate=True)
    processor = Forced(inputs["input_ids"].shape[1], answers)
    out = model.generate(**inputs, **options, logits_processor=[processor])
    assert torch.equal(out.sequences[:, -answers.shape[1] :], answers)
    return torch.stack(out.logits, 1).log_softmax(-1)


def without_pictures(mini, inputs):
    """The prompts as text alone, padded anew."""
    rows = [row[mask.bool() & (row != IMAGE)] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
    longest = max(map(len, rows))
    text = {
        "input_ids": torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows]),
        "attention_mask": torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows]),
    }
    kinds = {"token_type_ids", "mm_token_type_ids"} & mini.accepts  # all text
    return text | {name: torch.zeros_like(text["input_ids"]) for name in kinds}


def second(processor, inputs, answers):
    """The same of a processor's second stream."""
    prompt, steps = inputs["input_ids"], range(answers.shape[1])
    with torch.no_grad():
        rows = [processor.second_log_probabilities(torch.cat([prompt, answers[:, :t]], 1)) for t in steps]
    return torch.stack(rows, 1)


@pytest.mark.parametrize("gamma, cut", [(1.1, 0.1), (3.0, 0.0), (0.5, 1.0), (0.0, 0.01)])
def test_guide_is_the_formula(gamma, cut):
    rng = torch.Generator().manual_seed(0)
    c, n = ((3 * torch.randn(4, 50, generator=rng)).double().log_softmax(-1) for _ in range(2))
    c[:, 7] = -math.inf  # forbidden by another processor
    likely = (c.exp() >= cut * c.exp().amax(-1, keepdim=True)) & (c > -math.inf)
    found = guide(c, n, gamma, cut)
    assert torch.equal(found > -math.inf, likely) and not found.isnan().any()
    torch.testing.assert_close(found[likely].exp(), (c.exp() ** gamma * n.exp() ** (1 - gamma))[likely])
    assert (found.gather(1, c.argmax(-1, keepdim=True)) > -math.inf).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_stream_is_what_the_model_says_to_the_text_alone(family):
    mini = MINIATURES[family]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2, 0), text=TEXT, seed=1)
    answers = text_inputs(mini, lengths=(5, 5, 5), seed=7)["input_ids"]
    expected = forced(model, without_pictures(mini, inputs), answers)
    pictured = forced(model, inputs, answers)
    assert ((pictured - expected).abs().amax((1, 2)) > 0.01).tolist() == [True, True, False]
    before = snapshot(model)  # now: transformers puts hooks of its own on in its first call
    processor = ClassifierFreeGuidance(model, inputs)
    torch.testing.assert_close(second(processor, inputs, answers), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(second(processor, inputs, answers), expected, atol=1e-4, rtol=1e-4)  # from the start
    assert snapshot(model) == before


VISUAL = [row for row in ROWS if row.vision and all(m.modality == "vision" for m in row.methods)]


@pytest.mark.parametrize("row", VISUAL, ids=[row.name for row in VISUAL])
def test_methods_for_pictures_leave_the_second_stream_alone(row):
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2, 0), text=TEXT, seed=1)
    answers = text_inputs(mini, lengths=(4, 4, 4), seed=7)["input_ids"]
    expected = forced(model, without_pictures(mini, inputs), answers)
    plain = forced(model, inputs, answers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with infer_patch.patch(model, list(row.methods)):
            patched = forced(model, inputs, answers)
            processor = ClassifierFreeGuidance(model, inputs)
            torch.testing.assert_close(second(processor, inputs, answers), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(patched, plain) == row.neutral


BOTH = ("sink_window-evict", "envelope", "kv_quant", "zipvl", "act", "retrieval_heads-all")


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in BOTH], ids=lambda row: row.name)
def test_methods_for_text_act_on_both_streams(row):
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), inputs_for(row, mini)
    answers = text_inputs(mini, lengths=(4, 4, 4), seed=7)["input_ids"]
    plain = forced(model, without_pictures(mini, inputs), answers)
    with infer_patch.patch(model, list(row.methods)):
        expected = forced(model, without_pictures(mini, inputs), answers)
        found = second(ClassifierFreeGuidance(model, inputs), inputs, answers)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - plain).abs().max() > 0.01


def test_paint_raises_the_first_stream_only():
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2, 0), text=TEXT, seed=1)
    options = dict(GREEDY, output_scores=True, return_dict_in_generate=True)
    with infer_patch.patch(model, Paint()) as handle:
        processor = ClassifierFreeGuidance(model, inputs, gamma=1.5)
        found = model.generate(**inputs, **options, logits_processor=[processor])
        counts = handle.report().methods["paint"]["corrected"]
        answers = found.sequences[:, inputs["input_ids"].shape[1] :]
        raised = forced(model, inputs, answers)
    assert {layer: count["rows"] for layer, count in counts.items()} == {2: 8 * 2 * 4, 3: 8 * 2 * 4}
    remembered = [layer.memory_of(i) for layer in found.past_key_values.layers[2:] for i in range(3)]
    assert [len(memory) for memory in remembered] == [1, 1, 0] * 2
    assert not any(layer.memory_of(i) for layer in processor._cache.layers[2:] for i in range(3))
    text = forced(model, without_pictures(mini, inputs), answers)
    scores = torch.stack(found.scores, 1)
    torch.testing.assert_close(scores[:2], guide(raised, text, 1.5, 0.1)[:2], atol=1e-4, rtol=1e-4)
    assert (forced(model, inputs, answers) - raised)[:2].abs().max() > 0.01


def test_beams_under_paint_are_those_of_each_prompt_alone():
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2), text=TEXT[:2], seed=1)

    def guidance(given):
        return ClassifierFreeGuidance(model, given, gamma=2.0)

    unraised = model.generate(**inputs, **BEAMS, logits_processor=[guidance(inputs)])
    with infer_patch.patch(model, Paint(alpha=2.0)):
        found = model.generate(**inputs, **BEAMS, logits_processor=[guidance(inputs)])
        again = model.generate(**inputs, **BEAMS, logits_processor=[without_cache(guidance(inputs))])
        assert torch.equal(found, again) and not torch.equal(found, unraised)
        for i in range(2):
            alone = vision_inputs(mini, images=(1, 2), text=TEXT[:2], seed=1, only=i)
            tokens = model.generate(**alone, **BEAMS, logits_processor=[guidance(alone)])
            assert torch.equal(found[i, inputs["input_ids"].shape[1] :], tokens[0, alone["input_ids"].shape[1] :])


def test_prompts_without_a_picture_and_gamma_1_are_left_as_they_are():
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2, 0), text=TEXT, seed=1)
    options = dict(GREEDY, output_scores=True, output_logits=True, return_dict_in_generate=True)
    for gamma, same in ((3.0, [False, False, True]), (1.0, [True, True, True])):
        processor = ClassifierFreeGuidance(model, inputs, gamma=gamma)
        found = model.generate(**inputs, **options, logits_processor=[processor])
        expected = torch.stack(found.logits, 1).log_softmax(-1)
        assert [torch.equal(a, b) for a, b in zip(torch.stack(found.scores, 1), expected)] == same
    assert torch.equal(found.sequences, model.generate(**inputs, **GREEDY)) and processor._cache is None


def test_one_prompt_is_guided_as_by_transformers_own_processor():
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(2,), seed=1)
    text = without_pictures(mini, inputs)["input_ids"]
    options = dict(GREEDY, output_scores=True, return_dict_in_generate=True)
    theirs = model.generate(**inputs, **options, guidance_scale=2.5, negative_prompt_ids=text)
    processor = ClassifierFreeGuidance(model, inputs, gamma=2.5, cut=0.0)
    ours = model.generate(**inputs, **options, logits_processor=[processor])
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.scores), torch.stack(theirs.scores), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [GREEDY, BEAMS, SAMPLES], ids=["greedy", "beams", "sampling"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "internvl"])
def test_the_cached_stream_is_the_recomputed_one_and_batches_are_their_samples(family, options):
    mini = MINIATURES[family]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2, 0), text=TEXT, seed=1)

    def generated(given, *processors):
        torch.manual_seed(0)
        return model.generate(**given, **options, logits_processor=list(processors))

    def guidance(given):
        return ClassifierFreeGuidance(model, given, gamma=3.0)

    found = generated(inputs, guidance(inputs))
    assert not torch.equal(found, generated(inputs))
    assert torch.equal(found, generated(inputs, without_cache(guidance(inputs))))
    if options is SAMPLES:
        return
    for i in range(3):
        alone = vision_inputs(mini, images=(1, 2, 0), text=TEXT, seed=1, only=i)
        tokens = generated(alone, *([guidance(alone)] if i < 2 else []))
        assert torch.equal(found[i, inputs["input_ids"].shape[1] :], tokens[0, alone["input_ids"].shape[1] :])


def test_beams_are_ranked_by_the_sum_of_what_was_guided():
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(2,), seed=1)
    processor = ClassifierFreeGuidance(model, inputs, gamma=2.0, cut=0.0)
    options = dict(BEAMS, num_return_sequences=3, length_penalty=0.0, return_dict_in_generate=True, output_scores=True)
    found = model.generate(**inputs, **options, logits_processor=[processor])
    for sequence, score in zip(found.sequences, found.sequences_scores):
        answer = sequence[inputs["input_ids"].shape[1] :]
        c, n = both_streams(model, inputs, processor, answer)
        steps = guide(c, n, 2.0, 0.0).gather(1, answer[:, None])
        torch.testing.assert_close(score, steps.sum(), atol=1e-3, rtol=1e-4)


def test_other_processors_stay_in_force():
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2), seed=1)

    def guided(**options):
        processor = ClassifierFreeGuidance(model, inputs, gamma=3.0)
        return model.generate(**inputs, **GREEDY, **options, logits_processor=[processor])

    free = guided()[:, inputs["input_ids"].shape[1] :]
    found = guided(suppress_tokens=free.flatten().tolist())[:, inputs["input_ids"].shape[1] :]
    assert not torch.isin(found, free).any()


def test_videos_leave_the_prompt_as_pictures_do():
    mini = MINIATURES["qwen2_vl"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1, 2))
    video = dict(inputs, input_ids=inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, VIDEO))
    pairs = zip(ClassifierFreeGuidance(model, inputs)._second, ClassifierFreeGuidance(model, video)._second)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in pairs)


def test_what_cannot_be_served_is_refused():
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1,))
    for options in ({"gamma": -1}, {"gamma": math.nan}, {"cut": 2}):
        with pytest.raises(PatchError, match=f"guidance: {next(iter(options))} must be"):
            ClassifierFreeGuidance(model, inputs, **options)
    with pytest.raises(UnsupportedModelError, match="llama has no visual tokens"):
        ClassifierFreeGuidance(MINIATURES["llama"].build(), inputs)
    with pytest.raises(UnsupportedCallError, match="`input_ids` among them"):
        ClassifierFreeGuidance(model, {"pixel_values": inputs["pixel_values"]})
    with pytest.raises(UnsupportedCallError, match="none of these holds a visual token"):
        ClassifierFreeGuidance(model, text_inputs(mini))
    bare = {"input_ids": torch.tensor([[0, IMAGE, 9], [IMAGE, IMAGE, IMAGE]]), "attention_mask": torch.ones(2, 3)}
    with pytest.raises(UnsupportedCallError, match="without its pictures prompt 1 is empty"):
        ClassifierFreeGuidance(model, bare)
    other = vision_inputs(mini, images=(1,), seed=5)
    with pytest.raises(UnsupportedCallError, match="guidance: this is not the prompt"):
        model.generate(**other, **GREEDY, logits_processor=[ClassifierFreeGuidance(model, inputs)])
    for assisted in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": mini.build(seed=1)}):
        with pytest.raises(UnsupportedCallError, match="no assisted decoding"):
            model.generate(**inputs, **GREEDY, **assisted, logits_processor=[ClassifierFreeGuidance(model, inputs)])
