"""Every way transformers can decode, for every method.

Rows that keep everything must reproduce the unpatched model token for token. Rows that do not are held to identities
that hold for the patched model itself: a cache gives what recomputing everything gives, a draft changes nothing, a
conversation gives what its whole text gives.
"""

import warnings

import pytest
import torch
from miniatures import EOS, GREEDY, MINIATURES, text_inputs
from rows import AGAIN, FEW, ONCE, SOME, inputs_for
from rows import ids as named

import infer_patch

TEXT = [case for case in FEW if case[1].kind == "text" and (case in ONCE or case[0].name in SOME)]
TEXT_IDS = named(TEXT)
MODES = {
    "greedy": GREEDY,
    "no cache": {**GREEDY, "use_cache": False},
    "sampling": {"max_new_tokens": 8, "do_sample": True, "top_k": 20},
    "beams": {**GREEDY, "num_beams": 3},
    "two beams returned": {**GREEDY, "num_beams": 3, "num_return_sequences": 2},
    "two samples": {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 2},
}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def generate(model, inputs, **options):
    torch.manual_seed(0)
    return model.generate(**inputs, **options)


WAYS = [(*case, mode) for case in ONCE for mode in MODES]
WAYS += [(*case, "beams") for case in AGAIN if case not in ONCE]  # families repeat pictures in two orders


@pytest.mark.parametrize("row, mini, mode", WAYS, ids=[f"{row.name}-{mini.name}-{mode}" for row, mini, mode in WAYS])
def test_modes(row, mini, mode):
    model = mini.build()
    inputs = inputs_for(row, mini)
    expected = generate(model, inputs, **MODES[mode])
    with infer_patch.patch(model, list(row.methods)):
        tokens = generate(model, inputs, **MODES[mode])
        assert tokens.shape == expected.shape
        assert torch.equal(tokens, generate(model, inputs, **MODES[mode])), "a second run differs: state leaked"
    if row.neutral:
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("row, mini", TEXT, ids=TEXT_IDS)
def test_assisted_and_lookup_decoding(row, mini):
    model, assistant = mini.build(), mini.build(num_hidden_layers=2)
    inputs = inputs_for(row, mini, only=0)
    with infer_patch.patch(model, list(row.methods)):
        greedy = generate(model, inputs, **GREEDY)
        assisted = generate(model, inputs, **GREEDY, assistant_model=assistant)
        lookup = generate(model, inputs, **GREEDY, prompt_lookup_num_tokens=3, eos_token_id=EOS)  # 5.2 needs an eos
    assert assisted.shape == lookup.shape == greedy.shape
    if row.draftable:
        assert torch.equal(assisted, greedy)
        assert torch.equal(lookup, greedy)


def test_a_patched_assistant():
    mini = MINIATURES["llama"]
    model, assistant = mini.build(), mini.build(num_hidden_layers=2)
    inputs = text_inputs(mini, lengths=(300,))
    expected = generate(model, inputs, **GREEDY)
    with infer_patch.patch(assistant, "sink_window-evict"):
        assert torch.equal(generate(model, inputs, **GREEDY, assistant_model=assistant), expected)


@pytest.mark.parametrize("row, mini", TEXT, ids=TEXT_IDS)
def test_the_cache_gives_what_recomputing_gives(row, mini):
    if not row.chunkable:
        pytest.skip("this method's choice for a token depends on the tokens it is computed with")
    model = mini.build()
    inputs = inputs_for(row, mini)
    with infer_patch.patch(model, list(row.methods)):
        out = generate(model, inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
        steps = torch.stack(out.logits, 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 7, dtype=torch.long)], 1)
        with torch.no_grad():
            whole = model(out.sequences[:, :-1], attention_mask=mask, use_cache=False).logits[:, -8:]
    torch.testing.assert_close(steps, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("row, mini", TEXT, ids=TEXT_IDS)
def test_second_turn_on_the_returned_cache(row, mini):
    if not row.chunkable:
        pytest.skip("this method's choice for a token depends on the tokens it is computed with")
    model = mini.build()
    inputs = inputs_for(row, mini)
    more = text_inputs(mini, lengths=(90, 90, 90), seed=5)["input_ids"]
    with infer_patch.patch(model, list(row.methods)):
        first = generate(model, inputs, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, more], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 98, dtype=torch.long)], 1)
        second = generate(
            model, {"input_ids": ids, "attention_mask": mask}, **GREEDY, past_key_values=first.past_key_values
        )
        fresh = generate(model, {"input_ids": ids, "attention_mask": mask}, **GREEDY)
    assert torch.equal(second, fresh)


@pytest.mark.parametrize("chunk", [64, 100])
@pytest.mark.parametrize("row, mini", TEXT, ids=TEXT_IDS)
def test_chunked_prefill(row, mini, chunk):
    model = mini.build()
    inputs = inputs_for(row, mini)
    plain = generate(model, inputs, **GREEDY, prefill_chunk_size=chunk)
    if not torch.equal(plain, generate(model, inputs, **GREEDY)):
        pytest.skip("this transformers gives padded batches something else in chunks, unpatched (5.2 does)")
    with infer_patch.patch(model, list(row.methods)):
        whole = generate(model, inputs, **GREEDY)
        chunked = generate(model, inputs, **GREEDY, prefill_chunk_size=chunk)
    assert chunked.shape == whole.shape
    if row.neutral:
        assert torch.equal(chunked, plain)
    if row.chunkable:
        assert torch.equal(chunked, whole)


@pytest.mark.parametrize("row, mini", TEXT, ids=TEXT_IDS)
def test_inputs_embeds(row, mini):
    model = mini.build()
    inputs = inputs_for(row, mini)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with infer_patch.patch(model, list(row.methods)):
        tokens = generate(model, inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
        from_embeds = generate(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}, **GREEDY)
    assert torch.equal(from_embeds, tokens)


@pytest.mark.parametrize("row, mini", ONCE, ids=named(ONCE))
def test_hidden_states_keep_their_shapes(row, mini):
    model = mini.build()
    inputs = inputs_for(row, mini)
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states
        with infer_patch.patch(model, list(row.methods)):
            states = model(**inputs, output_hidden_states=True).hidden_states
            last = model(**inputs, output_hidden_states=True).hidden_states[-1]
    assert [s.shape for s in states] == [s.shape for s in expected]
    assert torch.equal(states[0], expected[0])
    assert torch.equal(states[-1], last)
    if row.neutral:
        real = inputs["attention_mask"].bool()
        assert all(torch.equal(a[real], b[real]) for a, b in zip(states, expected))


HALF = [(*case, torch.float16) for case in ONCE] + [(*case, torch.bfloat16) for case in AGAIN]


@pytest.mark.parametrize("row, mini, dtype", HALF, ids=[f"{row.name}-{mini.name}-{dtype}" for row, mini, dtype in HALF])
def test_half_precision(row, mini, dtype):
    model = mini.build().to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs_for(row, mini).items()}
    expected = generate(model, inputs, **GREEDY)
    with torch.no_grad(), infer_patch.patch(model, list(row.methods)):
        assert model(**inputs).logits.isfinite().all()
        tokens = generate(model, inputs, **GREEDY)
    assert tokens.shape == expected.shape
    if row.neutral:
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("row, mini", TEXT, ids=TEXT_IDS)
def test_gradients(row, mini):
    model = mini.build()
    inputs = text_inputs(mini, lengths=(300,))
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()

    def gradient():
        leaf = embeds.clone().requires_grad_()
        model(inputs_embeds=leaf).logits[:, -1].square().sum().backward()
        return leaf.grad

    expected = gradient()
    with infer_patch.patch(model, list(row.methods)):
        found = gradient()
    assert found.isfinite().all()
    if row.neutral:
        torch.testing.assert_close(found, expected)
    elif row.name.startswith("sink_window"):
        assert (found[:, 64:128] == 0).all() or not torch.equal(found, expected)


@pytest.mark.parametrize("length", [1, 63, 64, 65])
@pytest.mark.parametrize("row, mini", TEXT, ids=TEXT_IDS)
def test_short_prompts(row, mini, length):
    model = mini.build()
    inputs = text_inputs(mini, lengths=(length,))
    expected = generate(model, inputs, **GREEDY)
    with infer_patch.patch(model, list(row.methods)):
        found = generate(model, inputs, **GREEDY)
    assert found.shape == expected.shape
    if row.patient:
        assert torch.equal(found, expected)
