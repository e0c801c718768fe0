"""A cache that is copied, cropped or carried between modes goes on as the original."""

import copy
import warnings

import pytest
import torch
from miniatures import MINIATURES, text_inputs, vision_inputs
from rows import HEADS, KEEN, ONCE, ids, inputs_for
from torch import nn

import infer_patch
from infer_patch.errors import UnsupportedCallError
from infer_patch.patches import ACT, Paint, RetrievalHeads

LLAMA = MINIATURES["llama"]


def read(model, tokens, cache):
    return model(tokens, past_key_values=cache, use_cache=True).logits


def draw(count, seed=0, batch=1):
    return torch.randint(20, 100, (batch, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("row, mini", ONCE, ids=ids(ONCE))
@torch.no_grad()
def test_copies_go_on_alike_and_leave_the_model_alone(row, mini):
    """As when a long prefix is read once and used for several questions."""
    model, inputs = mini.build(), inputs_for(row, mini, only=0)
    with warnings.catch_warnings(), infer_patch.patch(model, list(row.methods)):
        warnings.simplefilter("ignore", UserWarning)
        cache = model(**inputs, use_cache=True).past_key_values
        read(model, draw(1), cache)
        copied: dict = {}
        other = copy.deepcopy(cache, copied)
        assert not any(isinstance(value, nn.Module) for value in copied.values())
        for seed in (1, 2):
            assert torch.equal(read(model, draw(1, seed), other), read(model, draw(1, seed), cache))


@torch.no_grad()
def test_act_knows_what_it_knows_of_rows_that_are_taken_back():
    """Two calls longer than what is kept: rows before the last of them are forgotten, not mixed up."""
    method, tokens = ACT(heads=HEADS, threshold=1.5, threshold_mode="relative"), draw(640)
    model = LLAMA.build()
    with infer_patch.patch(model, method):
        for left, fits in ((350, True), (320, False)):
            cache = model(tokens[:, :300], use_cache=True).past_key_values
            read(model, tokens[:, 300:600], cache)
            cache.crop(left - 600)
            if not fits:
                with pytest.raises(UnsupportedCallError, match=r"280 tokens were taken back .* newest 256 rows only"):
                    read(model, tokens[:, 600:], cache)
                continue
            straight = model(tokens[:, :300], use_cache=True).past_key_values
            read(model, tokens[:, 300:left], straight)
            after = tokens[:, 600:]
            torch.testing.assert_close(read(model, after, cache), read(model, after, straight), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("blocks", [1 << 20, 3000], ids=["one block", "many blocks"])
@torch.no_grad()
def test_the_same_behind_another_method(blocks, monkeypatch):
    from infer_patch.kernels import row_attention

    monkeypatch.setitem(row_attention._SCORES_PER_BLOCK, "cpu", blocks)
    plan = [RetrievalHeads(heads=("1-1", "2-3"), phase="all"), ACT(heads=HEADS, **KEEN)]
    tokens, model = draw(160), LLAMA.build()
    with infer_patch.patch(model, plan):
        cache, straight = (model(tokens[:, :100], use_cache=True).past_key_values for _ in range(2))
        read(model, tokens[:, 100:111], cache)
        read(model, tokens[:, 111:114], cache)
        read(model, tokens[:, 100:108], straight)
        cache.crop(-6)
        after = tokens[:, 120:140]
        torch.testing.assert_close(read(model, after, cache), read(model, after, straight), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_paint_forgets_patches_that_were_taken_back():
    mini = MINIATURES["llava"]
    model, inputs = mini.build(), vision_inputs(mini, images=(1,))
    first = int((inputs["input_ids"][0] == mini.image_token_id).nonzero()[0])
    with warnings.catch_warnings(), infer_patch.patch(model, Paint()) as handle:
        warnings.simplefilter("ignore", UserWarning)
        cache = model(**inputs, use_cache=True).past_key_values
        assert handle.report(reset=True).methods["paint"]["fired"]
        cache.crop(first - cache.get_seq_length())
        patched = read(model, draw(30), cache)
        assert handle.report().silent == ["paint"]
    plain = model(torch.cat([inputs["input_ids"][:, :first], draw(30)], 1)).logits[:, first:]
    torch.testing.assert_close(patched, plain, atol=1e-4, rtol=1e-4)


def test_a_cache_of_inference_mode_goes_on_outside_of_it():
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(40,))
    with infer_patch.patch(model, ACT(heads=HEADS, threshold=0.01)):
        with torch.inference_mode():
            cache = model(**inputs, use_cache=True).past_key_values
        with torch.no_grad():
            expected = model(**inputs, use_cache=True).past_key_values
            for seed in range(3):
                found = read(model, draw(1, seed), cache)
                torch.testing.assert_close(found, read(model, draw(1, seed), expected), atol=1e-5, rtol=1e-5)


def test_act_under_autocast():
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(40,))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with infer_patch.patch(model, ACT(heads=HEADS, threshold=0.01)) as handle:
            cache = model(**inputs, use_cache=True).past_key_values
            patched = read(model, draw(1), cache)
            assert handle.report().methods["act"]["fired"]
        assert patched.isfinite().all()


@pytest.mark.parametrize("decode", ["off", "frozen", "running"])
@torch.no_grad()
def test_nothing_is_kept_that_nobody_asks_for(decode):
    model, inputs = LLAMA.build(), text_inputs(LLAMA, lengths=(300,))
    with infer_patch.patch(model, ACT(heads=HEADS, threshold=0.01, decode=decode)):
        cache = model(**inputs, use_cache=True).past_key_values
        kept = sum(layer.nbytes() - layer.keys.nbytes - layer.values.nbytes for layer in cache.layers[1:])
    most = {"off": 0, "frozen": 300 * len(HEADS), "running": 300 * len(HEADS) * 100}[decode]
    assert kept <= most and (kept > 0) == (decode != "off")
