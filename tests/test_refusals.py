"""What cannot work is refused in words, before work starts, and the model is left as it was."""

import warnings

import pytest
import torch
from miniatures import GREEDY, MINIATURES, text_inputs, vision_inputs
from test_behaviour import snapshot
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    StaticCache,
)

import infer_patch
from infer_patch.errors import UnsupportedCallError, UnsupportedModelError
from infer_patch.patches import Envelope, FastV, SinkWindow

WINDOW = SinkWindow(window=64, evict=True)


def tiny(model_type, auto=AutoModelForCausalLM, **settings):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64, intermediate_size=32)
    config = AutoConfig.for_model(model_type, **{**sizes, **settings})
    return auto.from_config(config)


@pytest.mark.parametrize(
    "build, complaint",
    [
        (lambda: nn.Linear(2, 2), "expected a transformers model .* got Linear"),
        (lambda: tiny("t5", AutoModelForSeq2SeqLM, d_model=32, d_kv=16, num_layers=2), "encoder-decoder"),
        (
            lambda: tiny("mamba", state_size=4),
            r"layers of kind \['linear_attention'\]|looked for a list of 2 decoder layers",
        ),
        (lambda: tiny("falcon"), "does not call attention through transformers' registry|looked for a list of 2"),
        (
            lambda: tiny("bloom", n_layer=2, n_head=2),
            "does not call attention through transformers' registry|looked for",
        ),
    ],
    ids=["no model", "t5", "mamba", "falcon", "bloom"],
)
def test_models_that_are_not_understood(build, complaint):
    model = build()
    before = sorted(vars(model))
    with pytest.raises(UnsupportedModelError, match=complaint):
        infer_patch.patch(model, [])
    assert sorted(vars(model)) == before


@pytest.mark.parametrize(
    "family, method, complaint",
    [
        ("mistral", SinkWindow(), r"every layer of mistral already attends within a window of \[6\]"),
        ("gemma2", Envelope(), "gemma2 soft-caps its attention scores"),
        ("gemma2", SinkWindow(), "gemma2 soft-caps its attention scores"),
        ("llama", FastV(), "fastv prunes visual tokens, and llama has none"),
    ],
)
def test_methods_that_do_not_apply(family, method, complaint):
    model = MINIATURES[family].build()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=complaint):
        infer_patch.patch(model, method)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "make", [lambda c: StaticCache(config=c, max_cache_len=400), lambda c: DynamicCache(config=c, offloading=True)]
)
def test_caches_that_cannot_be_patched(make):
    model = MINIATURES["llama"].build()
    inputs = text_inputs(MINIATURES["llama"], lengths=(100,))
    with infer_patch.patch(model, WINDOW):
        with pytest.raises(UnsupportedCallError, match="expected a DynamicCache"):
            model(**inputs, past_key_values=make(model.config))
        with pytest.raises(UnsupportedCallError, match="expected a DynamicCache"):
            model.generate(**inputs, **GREEDY, cache_implementation="static")
        model.generate(**inputs, **GREEDY)


def test_an_interrupted_forward_leaves_nothing_open():
    """A keyboard interrupt skips even those hooks that torch calls after exceptions."""
    mini = MINIATURES["llama"]
    model = mini.build()
    inputs = text_inputs(mini, lengths=(30, 20))
    expected = model.generate(**inputs, **GREEDY, cache_implementation="static")

    def interrupt(*_):
        raise KeyboardInterrupt

    with infer_patch.patch(model, WINDOW):
        hook = model.model.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        hook.remove()
        model.generate(**inputs, **GREEDY)
    with infer_patch.patch(model, []):
        assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static"), expected)


def test_the_identity_plan_serves_static_caches():
    model = MINIATURES["llama"].build()
    inputs = text_inputs(MINIATURES["llama"], lengths=(30, 20))
    expected = model.generate(**inputs, **GREEDY, cache_implementation="static")
    with infer_patch.patch(model, []):
        assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static"), expected)


def test_a_cache_filled_under_another_plan():
    model = MINIATURES["llama"].build()
    inputs = text_inputs(MINIATURES["llama"], lengths=(300,))
    with infer_patch.patch(model, WINDOW):
        cache = model(**inputs).past_key_values
    mask = torch.ones(1, 301, dtype=torch.long)
    with (
        infer_patch.patch(model, SinkWindow(window=128, evict=True)),
        pytest.raises(UnsupportedCallError, match="another plan"),
    ):
        model(inputs["input_ids"][:, :1], attention_mask=mask, past_key_values=cache)


def test_an_evicted_cache_under_a_plan_that_does_not_store():
    model = MINIATURES["llama"].build()
    inputs = text_inputs(MINIATURES["llama"], lengths=(300,))
    with infer_patch.patch(model, WINDOW):
        cache = model(**inputs).past_key_values
    mask = torch.ones(1, 301, dtype=torch.long)
    with infer_patch.patch(model, Envelope()), pytest.raises(UnsupportedCallError, match="another plan"):
        model(inputs["input_ids"][:, :1], attention_mask=mask, past_key_values=cache)


def test_changing_the_attention_implementation_under_a_patch():
    model = MINIATURES["llama"].build()
    inputs = text_inputs(MINIATURES["llama"], lengths=(30,))
    with infer_patch.patch(model, WINDOW):
        model.set_attn_implementation("eager")
        with pytest.raises(UnsupportedCallError, match="changed while the model was patched"):
            model(**inputs)


def test_calls_that_cannot_be_served():
    mini = MINIATURES["llama"]
    model = mini.build()
    inputs = text_inputs(mini, lengths=(100,))
    with infer_patch.patch(model, WINDOW):
        with pytest.raises(UnsupportedCallError, match="output_attentions"):
            model(**inputs, output_attentions=True)
        with pytest.raises(UnsupportedCallError, match="4-D attention mask"):
            model(inputs["input_ids"], attention_mask=torch.ones(1, 1, 100, 100, dtype=torch.bool).tril())
        with pytest.raises(UnsupportedCallError, match="covers 90 tokens, cache and new tokens are 100"):
            model(inputs["input_ids"], attention_mask=torch.ones(1, 90, dtype=torch.long))
        with pytest.raises(UnsupportedCallError, match="padded on the left"):
            model(**text_inputs(mini, lengths=(100, 50), side="right"))
        model.gradient_checkpointing_enable()
        model.train()
        with pytest.raises(UnsupportedCallError, match="gradient checkpointing"):
            model(**inputs)
        model.gradient_checkpointing_disable()
        model.eval()
        model(**inputs)


def test_attention_dropout_in_training():
    mini = MINIATURES["llama"]
    model = mini.build(attention_dropout=0.5)
    with infer_patch.patch(model, SinkWindow(window=64, dense_below=0)):
        model.train()
        with pytest.raises(UnsupportedCallError, match="dropout is on"):
            model(**text_inputs(mini, lengths=(200,)))


def test_taking_back_what_was_evicted():
    model = MINIATURES["llama"].build()
    with infer_patch.patch(model, WINDOW):
        cache = model(**text_inputs(MINIATURES["llama"], lengths=(400,))).past_key_values
        with pytest.raises(UnsupportedCallError, match="200 tokens cannot be taken back"):
            cache.layers[0].crop(-200)
        cache.layers[0].crop(-60)
        assert cache.layers[0].get_seq_length() == 340


def test_pictures_without_ids():
    mini = MINIATURES["llava"]
    model = mini.build()
    inputs = vision_inputs(mini, images=(1,))
    ids = inputs.pop("input_ids")
    with infer_patch.patch(model, FastV()), pytest.raises(UnsupportedCallError, match="pass input_ids"):
        model(**inputs, inputs_embeds=model.get_input_embeddings()(ids))


@pytest.mark.parametrize("family", ["paligemma", "gemma3"])
def test_a_mask_that_sees_both_ways_runs_dense_and_says_so(family):
    mini = MINIATURES[family]
    model = mini.build()
    inputs = vision_inputs(mini, images=(1,), text=[(150, 60)])
    with torch.no_grad():
        expected = model(**inputs).logits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with infer_patch.patch(model, SinkWindow(window=64, dense_below=0)) as handle:
                assert torch.equal(model(**inputs).logits, expected)
                report = handle.report()
    assert report.silent == ["sink_window"]
    assert list(report.methods["sink_window"]["dense_calls"]) == ["the model's own mask is not plain causal"]


def test_padding_between_tokens_runs_dense_and_says_so():
    mini = MINIATURES["llama"]
    model = mini.build()
    inputs = text_inputs(mini, lengths=(200, 150))
    inputs["attention_mask"][0, 70:80] = 0
    with torch.no_grad():
        expected = model(**inputs).logits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with infer_patch.patch(model, SinkWindow(window=64, dense_below=0)) as handle:
                found = model(**inputs).logits
                assert "padding stands between real tokens" in handle.report().methods["sink_window"]["dense_calls"]
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real])
