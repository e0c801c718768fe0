"""`transformers.pipeline` on patched models gives what `generate` gives, and leaves them able to be unpatched."""

import copy

import pytest
from transformers import pipeline
from transformers.utils import logging

import infer_patch
from infer_patch.demo_vlm import load_demo_vlm
from infer_patch.evals.scenes import make_scene
from infer_patch.patches import Envelope, FastV, SinkWindow

TEXT_PLANS = {
    "identity": infer_patch.Plan(),
    "evict": SinkWindow(window=64, evict=True),
    "envelope": Envelope(budget=192, window=64, dense_below=0),
}
VISION_PLANS = {
    "fastv": FastV(layer=2, drop_ratio=0.5),
    "fastv and window": infer_patch.Plan((FastV(layer=1), SinkWindow(window=64, evict=True))),
}
PROMPTS = ["A story of many words. " * 20, "Another one. " * 24, "The third " * 35]
ASKED = ["is there a red arrow in the image ?", "how many objects are in the image ?"]
NEW = 12
LENGTHS = {"max_new_tokens": 6, "min_new_tokens": 6}  # beyond the end token: more to differ in


@pytest.fixture(autouse=True)
def _quiet():
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="module")
def language(chatty):
    model, tokenizer = copy.deepcopy(chatty)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.convert_ids_to_tokens(8), "left"
    return model, tokenizer


@pytest.fixture(scope="module")
def vision():
    model, processor = load_demo_vlm()
    processor.tokenizer.padding_side = "left"
    return model, processor


def state(model):
    """What a patch might leave on a model."""
    return [(sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def write(model, tokenizer, prompts, batch_size):
    """Texts of `generate` for left-padded batches."""
    texts = []
    for start in range(0, len(prompts), batch_size):
        inputs = tokenizer(prompts[start : start + batch_size], return_tensors="pt", padding=True)
        output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        texts += tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def pipe_text(pipe, prompts, batch_size):
    options = {"max_new_tokens": NEW, "do_sample": False, "return_full_text": False, "batch_size": batch_size}
    return [found[0]["generated_text"] for found in pipe(prompts, **options)]


@pytest.mark.filterwarnings("ignore:.*never took effect")
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("plan", TEXT_PLANS.values(), ids=TEXT_PLANS)
def test_text_generation(language, plan, batch_size):
    model, tokenizer = language
    plain, before = write(model, tokenizer, PROMPTS, batch_size), state(model)
    with infer_patch.patch(model, plan) as handle:
        expected = write(model, tokenizer, PROMPTS, batch_size)
        handle.report(reset=True)
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        assert pipe_text(pipe, PROMPTS, batch_size) == expected
        assert pipe_text(pipe, PROMPTS[:1], 1) == write(model, tokenizer, PROMPTS[:1], 1)
        assert all(figures["fired"] for figures in handle.report().methods.values())
    assert (expected == plain) == (plan == infer_patch.Plan())
    assert pipe_text(pipe, PROMPTS, batch_size) == plain and state(model) == before


def test_text_generation_from_messages(language):
    model, tokenizer = language
    messages = [{"role": "user", "content": PROMPTS[0]}]
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    with infer_patch.patch(model, TEXT_PLANS["evict"]):
        (found,) = pipe(messages, max_new_tokens=NEW, do_sample=False)
        expected = write(model, tokenizer, [whole], 1)
    assert [found["generated_text"][-1]["content"]] == expected != write(model, tokenizer, [whole], 1)


def test_a_pipeline_made_before_the_patch_runs_patched(language):
    model, tokenizer = language
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    plain = pipe_text(pipe, PROMPTS[:1], 1)
    with infer_patch.patch(model, TEXT_PLANS["evict"]) as handle:
        assert pipe_text(pipe, PROMPTS[:1], 1) == write(model, tokenizer, PROMPTS[:1], 1) != plain
    assert handle.report().methods["sink_window"]["fired"] and pipe_text(pipe, PROMPTS[:1], 1) == plain


def questions():
    """A picture and a question each; the second has two pictures."""
    for i, words in enumerate(ASKED):
        images = [make_scene(seed).image() for seed in (range(i, i + 2) if i == 1 else (i,))]
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": words}]
        yield [{"role": "user", "content": content}]


def answer(model, processor, chats, batch_size):
    """Texts of `generate` for left-padded batches of conversations with pictures."""
    texts = []
    for start in range(0, len(chats), batch_size):
        batch = chats[start : start + batch_size]
        prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in batch]
        images = [[part["image"] for part in chat[0]["content"] if "image" in part] for chat in batch]
        inputs = processor(text=prompts, images=images, return_tensors="pt", padding=True)
        output = model.generate(**inputs, **LENGTHS, do_sample=False)
        texts += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def pipe_vision(pipe, chats, batch_size):
    options = {"generate_kwargs": {**LENGTHS, "do_sample": False}, "return_full_text": False}
    found = pipe(text=chats, batch_size=batch_size, **options)
    return [(entry[0] if isinstance(entry, list) else entry)["generated_text"].strip() for entry in found]


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("plan", VISION_PLANS.values(), ids=VISION_PLANS)
def test_image_text_to_text(vision, plan, batch_size):
    model, processor = vision
    chats = list(questions())
    plain, before = answer(model, processor, chats, batch_size), state(model)
    with infer_patch.patch(model, plan) as handle:
        expected = answer(model, processor, chats, batch_size)
        handle.report(reset=True)
        pipe = pipeline("image-text-to-text", model=model, processor=processor)
        assert pipe_vision(pipe, chats, batch_size) == expected
        assert handle.report().methods["fastv"]["fired"]
    assert expected != plain
    assert pipe_vision(pipe, chats, batch_size) == plain and state(model) == before
