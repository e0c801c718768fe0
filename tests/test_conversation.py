"""Conversations: the cache is read again only where that changes nothing, and a plan never reads another's cache."""

import copy

import pytest
import torch

import infer_patch
from infer_patch.conversation import Conversation
from infer_patch.demo_vlm import load_demo_vlm
from infer_patch.errors import ConflictError, PatchError, PlanError
from infer_patch.evals.scenes import make_scene
from infer_patch.patches import FastV, SinkWindow
from infer_patch.streaming import TextStream
from infer_patch.turns import TurnEncoder

EVICT = SinkWindow(window=64, evict=True)
PLANS = {"unpatched": None, "identity": infer_patch.Plan(), "window": SinkWindow(window=64), "evict": EVICT}
LONG = "A story of many words. " * 20


@pytest.fixture(scope="module")
def vlm():
    return load_demo_vlm()


def fresh(model, processor, turns, plan=None, new_tokens=12):
    """What the model answers to the whole conversation, without any cache from before."""
    inputs = TurnEncoder(model, processor).encode(turns)
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    if plan is None:
        ids = model.generate(**inputs, **options)
    else:
        with infer_patch.patch(model, plan):
            ids = model.generate(**inputs, **options)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.filterwarnings("ignore:.*never took effect")
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_later_turns_read_the_cache_and_give_what_a_whole_prefill_gives(chatty, plan):
    model, tokenizer = chatty
    with Conversation(model, tokenizer, plan, system="Be brief.", max_new_tokens=12) as talk:
        answers = []
        for message in (LONG, "And then?", "Why? " * 30):
            answers.append(talk.say(message))
            assert list(answers[-1].ids) == fresh_of(talk, model, tokenizer, plan)
    assert [a.new_tokens == a.whole_tokens for a in answers] == [True, False, False]
    # the last token of an answer is read with the next message
    assert answers[1].new_tokens == answers[1].whole_tokens - answers[0].whole_tokens - 11
    assert not any(a.anew for a in answers) and all(a.ended == "length" and a.cache_bytes > 0 for a in answers)
    assert ("held at most" in answers[-1].effect) == (plan is EVICT)
    assert [t.role for t in talk.turns] == ["system", *["user", "assistant"] * 3]


def fresh_of(talk, model, tokenizer, plan):
    """The same for the message that was answered last, on a copy of the model."""
    return fresh(_unpatched(talk, model), tokenizer, talk.turns[:-1], plan)


def _unpatched(talk, model):
    twin = copy.deepcopy(model)
    if infer_patch.is_patched(twin):
        infer_patch.unpatch(twin)
    return twin


@pytest.mark.parametrize("new", [None, SinkWindow(window=128, evict=True)], ids=["off", "another"])
def test_after_a_change_of_plan_answers_are_those_of_a_conversation_that_never_had_the_old_one(chatty, new):
    model, tokenizer = chatty
    with Conversation(model, tokenizer, EVICT, max_new_tokens=12) as talk:
        talk.say(LONG)
        old = talk.turns
        evicted = talk.say("And then?")
        talk.turns = old  # ask the same once more
        assert talk.change_plan(new) and not talk.change_plan(new)
        changed = talk.say("And then?")
        after = talk.say("Why?")
    assert changed.anew == "the plan was changed" and changed.new_tokens == changed.whole_tokens and not after.anew
    with Conversation(model, tokenizer, new, max_new_tokens=12) as other:
        other.turns = old
        assert (other.say("And then?").ids, other.say("Why?").ids) == (changed.ids, after.ids)
    assert changed.ids != evicted.ids and changed.cache_bytes > evicted.cache_bytes
    assert not infer_patch.is_patched(model)


@pytest.mark.parametrize(
    "bad, error", [("nonsense", PlanError), (FastV(), PatchError), ([EVICT, EVICT], ConflictError)]
)
def test_a_refused_plan_leaves_plan_and_cache_as_they_are(chatty, bad, error):
    with Conversation(*chatty, EVICT, max_new_tokens=4) as talk:
        talk.say(LONG)
        with pytest.raises(error):
            talk.change_plan(bad)
        answer = talk.say("And then?")
        assert talk.plan == infer_patch.Plan.of(EVICT) and answer.new_tokens < 40 and not answer.anew


def test_a_template_that_writes_earlier_turns_otherwise_starts_the_cache_anew(tiny):
    """The one of this miniature ends with a line break that is gone one turn later."""
    model, tokenizer = tiny
    with Conversation(model, tokenizer, max_new_tokens=6) as talk:
        talk.say("abc")
        second = talk.say("def")
    assert "other tokens than the cache" in second.anew and second.new_tokens == second.whole_tokens
    assert list(second.ids) == fresh(model, tokenizer, talk.turns[:-1], new_tokens=6)


def test_without_a_template_the_plain_text_goes_on(chatty):
    model, tokenizer = chatty
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    with Conversation(model, plain, system="Once upon a time", max_new_tokens=6) as talk:
        first, second = talk.say("there was"), talk.say("and then")
    whole = f"Once upon a time\nthere was{first.text}\nand then"
    assert second.whole_tokens == len(whole) and second.new_tokens == len("\nand then") + 1 and not second.anew
    ids = model.generate(**plain(whole, return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert ids[0, len(whole) :].tolist() == list(second.ids)


def test_an_answer_that_is_stopped_counts_as_far_as_it_came(chatty):
    model, tokenizer = chatty
    calls = []
    with Conversation(model, tokenizer, EVICT, max_new_tokens=12) as talk:
        stopped = talk.say(LONG, should_stop=lambda: calls.append(0) or len(calls) == 3)
        second = talk.say("And then?")
        assert list(second.ids) == fresh_of(talk, model, tokenizer, EVICT)
    assert stopped.ended == "stopped" and len(stopped.ids) == 3 and talk.turns[1].text == stopped.text
    assert not second.anew and second.new_tokens < 40


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("when", ["prefill", "decode"])
def test_a_call_torn_apart_leaves_conversation_and_model_consistent(chatty, error, when):
    model, tokenizer = chatty
    probe = tokenizer(LONG, return_tensors="pt")
    expected, hooks = model.generate(**probe, max_new_tokens=6, do_sample=False), _hooks(model)
    with Conversation(model, tokenizer, EVICT, max_new_tokens=12) as talk:
        first = talk.say(LONG)
        before, calls = talk.turns, []

        def tear(*_):
            calls.append(0)
            if len(calls) == (1 if when == "prefill" else 4):
                raise error

        layer = model.model.layers[2].mlp.register_forward_pre_hook(tear)
        with pytest.raises(error):
            talk.say("And then?")
        layer.remove()
        assert talk.turns == before and talk.turns[-1].text == first.text
        again = talk.say("And then?")
        assert again.anew == "the last answer was broken off"
        assert list(again.ids) == fresh_of(talk, model, tokenizer, EVICT)
    assert not infer_patch.is_patched(model) and _hooks(model) == hooks
    assert torch.equal(model.generate(**probe, max_new_tokens=6, do_sample=False), expected)


def _hooks(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()]


def test_reset(chatty):
    with Conversation(*chatty, EVICT, system="Be brief.", max_new_tokens=6) as talk:
        first = talk.say(LONG)
        talk.reset()
        again = talk.say(LONG)
        assert (again.ids, again.anew, again.whole_tokens) == (first.ids, "", first.whole_tokens)


def test_sampling_follows_the_seed(chatty):
    with Conversation(*chatty, temperature=1.5, max_new_tokens=12) as talk:
        found = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            talk.reset()
            found.append(talk.say("abc").ids)
    assert found[0] == found[1] != found[2]


def test_the_end_token_ends_an_answer_and_is_no_part_of_its_text(chatty):
    model, tokenizer = copy.deepcopy(chatty[0]), chatty[1]
    with Conversation(model, tokenizer, max_new_tokens=6) as talk:
        ids = talk.say("abc").ids
        end = next(i for i in range(1, 6) if ids[i] not in ids[:i])
        model.generation_config.eos_token_id = [7, ids[end]]
        talk.reset()
        answer = talk.say("abc")
    assert answer.ended == "end" and answer.ids == ids[: end + 1]


def test_pieces_are_whole_characters_and_make_up_the_answer(chatty):
    _, tokenizer = chatty
    pieces = []
    stream = TextStream(lambda ids: tokenizer.decode(ids), pieces.append)
    stream.put(torch.tensor([[9, 9]]))  # the prompt
    ids = tokenizer("añ €", add_special_tokens=False).input_ids
    assert len(ids) == 7  # bytes
    for token in ids + ids[1:2]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert pieces == ["a", "ñ", " ", "€", "\ufffd"] and stream.ids == ids + ids[1:2]
    with Conversation(*chatty, max_new_tokens=12) as talk:
        pieces.clear()
        assert talk.say("abc", on_text=pieces.append).text == "".join(pieces) and len(pieces) == 12


@pytest.mark.parametrize("plan", [None, EVICT], ids=["unpatched", "evict"])
def test_later_questions_about_a_picture_read_the_cache(vlm, plan):
    model, processor = vlm
    picture, other = make_scene(3).image(), make_scene(4).image()
    asked = [("is there a red arrow in the image ?", [picture]), ("is there a red ring in the image ?", [])]
    with Conversation(model, processor, plan, max_new_tokens=4) as talk:
        answers = [talk.say(*asked[0]), talk.say(*asked[1])]
        assert list(answers[1].ids) == fresh(_unpatched(talk, model), processor, talk.turns[:-1], plan, 4)
        third = talk.say("is there a white star in the image ?", [other])
        assert list(third.ids) == fresh(_unpatched(talk, model), processor, talk.turns[:-1], plan, 4)
    assert answers[0].whole_tokens > 256 > answers[1].new_tokens and not answers[1].anew
    assert third.anew == "a picture came" and third.new_tokens == third.whole_tokens > 512


def test_pruned_pictures_stay_pruned_until_the_plan_is_off(vlm):
    model, processor = vlm
    with Conversation(model, processor, FastV(layer=2, drop_ratio=0.5), max_new_tokens=4) as talk:
        first = talk.say("is there a red arrow in the image ?", [make_scene(3).image()])
        second = talk.say("is there a red ring in the image ?")
        assert "kept 128 of 256 visual tokens" in first.effect and "nothing new" in second.effect
        talk.change_plan(None)
        third = talk.say("is there a blue ring in the image ?")
    assert third.effect == "" and third.cache_bytes > 1.3 * second.cache_bytes


def test_what_is_refused(chatty, vlm):
    model, tokenizer = chatty
    with Conversation(model, tokenizer, max_new_tokens=100) as talk:
        for message, words in (("", "empty"), ("x" * 2048, "takes 2,048; start a new one")):
            with pytest.raises(PatchError, match=words):
                talk.say(message)
        with pytest.raises(PatchError, match="text only"):
            talk.say("what is this?", [make_scene(3).image()])
        assert talk.turns == ()
        prompt = 2048 - 30
        answer = talk.say("x" * (prompt - len("<user>\n<assistant>")))
        assert (answer.whole_tokens, len(answer.ids), answer.ended) == (prompt, 30, "length")
    for values, words in (({"max_new_tokens": 0}, "1 or more"), ({"temperature": -1}, "0 .greedy. or more")):
        with pytest.raises(PatchError, match=words):
            Conversation(model, tokenizer, **values)
    with infer_patch.patch(model, infer_patch.Plan()), pytest.raises(PatchError, match="patched already"):
        Conversation(model, tokenizer)
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    with pytest.raises(PatchError, match="refuses the conversation: no system"):
        Conversation(model, strict, system="Be brief.")
