"""Models loaded in unusual ways: 4-bit weights, weights spread over devices, other attention implementations."""

import warnings

import pytest
import torch
from miniatures import GREEDY, MINIATURES, text_inputs, vision_inputs
from rows import ROWS, first_of_its_kind
from transformers import AutoModelForCausalLM

import infer_patch
from infer_patch.availability import is_available
from infer_patch.patches import FastV

TEXT_ROWS = [row for row in ROWS if not row.vision and first_of_its_kind(row)]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check(model, row):
    """Neutral rows change nothing, others something, and all come off."""
    inputs = text_inputs(MINIATURES["llama"], lengths=(300, 210))
    tokens, logits = generated(model, inputs)
    with infer_patch.patch(model, list(row.methods)):
        patched_tokens, patched = generated(model, inputs)
    assert torch.equal(patched, logits) == row.neutral
    assert torch.equal(patched_tokens, tokens) or not row.neutral
    assert torch.equal(generated(model, inputs)[1], logits)


def generated(model, inputs):
    """Tokens, and the logits of every step: the first is the prompt's, the others read the cache."""
    out = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    return out.sequences, torch.stack(out.logits, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    MINIATURES["llama"].build().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def four_bits(folder):
    if not is_available("bitsandbytes"):
        pytest.skip("bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map={"": "cpu"})
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("row", TEXT_ROWS, ids=lambda r: r.name)
def test_four_bit_weights(four_bits, row):
    assert "4bit" in type(four_bits.model.layers[0].self_attn.q_proj).__name__
    check(four_bits, row)


@pytest.fixture(scope="module")
def spread(folder, tmp_path_factory):
    """Without a GPU the second device is the disk: accelerate moves weights in by its own hooks around each module."""
    if not is_available("accelerate"):
        pytest.skip("accelerate is not installed")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "cpu" if i % 2 else "disk" for i in range(4)}
    offloaded = tmp_path_factory.mktemp("offloaded")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=offloaded)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("row", TEXT_ROWS, ids=lambda r: r.name)
def test_device_map_over_two_devices(spread, row):
    assert spread.model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    check(spread, row)


@pytest.mark.parametrize("row", TEXT_ROWS, ids=lambda r: r.name)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_attention_implementations(implementation, row):
    model = MINIATURES["llama"].build(attn_implementation=implementation)
    check(model, row)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_pruning_does_not_need_eager_attention_and_works_with_it(implementation):
    mini = MINIATURES["llava"]
    inputs = vision_inputs(mini, images=(1, 2, 0))
    with torch.no_grad(), infer_patch.patch(mini.build(attn_implementation=implementation), FastV()) as handle:
        logits = handle.model(**inputs).logits[:, -1]
    with torch.no_grad(), infer_patch.patch(mini.build(), FastV()) as handle:
        torch.testing.assert_close(logits, handle.model(**inputs).logits[:, -1], atol=1e-4, rtol=1e-4)
