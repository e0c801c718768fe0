"""Perplexity: equal to the plain formula, the same in one pass and through the cache, and eviction shows in it."""

import math

import pytest
import torch
from test_evaluate import IDENTITY, NARROW

from infer_patch.errors import PatchError
from infer_patch.evals.evaluate import evaluate
from infer_patch.evals.perplexity import Perplexity

WINDOWS = dict(tokens=300, windows=2)


def rows(tiny, task, plans=(IDENTITY,)):
    return {row["name"]: row for row in evaluate(*tiny, task, list(plans)).summary["rows"]}


def test_it_is_the_exponent_of_the_mean_loss_of_the_model_itself(tiny):
    model, tokenizer = tiny
    task = Perplexity(**WINDOWS, prefill=0)
    found = rows(tiny, task)["unpatched"]["metrics"]
    losses = []
    for item in task.items(tokenizer, model):
        ids = torch.tensor([item.prompt.input_ids])
        losses.append(model(ids, labels=ids).loss.item())
    assert found["nll"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert found["ppl"] == pytest.approx(math.exp(found["nll"]), rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_through_the_cache_is_the_loss_of_the_same_tokens_in_one_pass(tiny, chunk):
    model, tokenizer = tiny
    task = Perplexity(**WINDOWS, prefill=200, chunk=chunk)
    ids = torch.tensor([item.prompt.input_ids for item in task.items(tokenizer, model)])
    logits = model(ids).logits[:, 199:-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 200:])
    assert rows(tiny, task)["unpatched"]["metrics"]["nll"] == pytest.approx(float(expected), rel=1e-5)


def test_unpatched_against_itself_is_exactly_zero(tiny):
    found = rows(tiny, Perplexity(**WINDOWS, prefill=200))
    for name in ("identity", "unpatched again"):
        assert found[name]["paired"]["low"] == found[name]["paired"]["high"] == 0
    assert found["identity"]["verdict"].startswith("the same loss to the last digit")


def test_eviction_shows_through_the_cache(tiny):
    found = rows(tiny, Perplexity(**WINDOWS, prefill=200), [NARROW])["narrow"]
    assert found["paired"]["difference"] != 0 and found["paired"]["p_value"] is None
    assert found["effect"][0]["fired"]["count"] == 2
    assert "cache not exercised" in Perplexity(**WINDOWS, prefill=0).title
    assert not Perplexity(**WINDOWS, prefill=0).through_cache


def test_text_of_ones_own(tiny, tmp_path):
    model, tokenizer = tiny
    (tmp_path / "b.txt").write_text("second " * 50)
    (tmp_path / "a.txt").write_text("first " * 50)
    item = Perplexity(tokens=100, windows=1, prefill=50, text_folder=tmp_path).items(tokenizer, model)[0]
    assert tokenizer.decode(item.prompt.input_ids).startswith("first first")


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(tokens=300, prefill=300), "prefill from 0 to tokens - 1"),
        (dict(tokens=5000, prefill=100), "this model takes"),
        (dict(tokens=300, prefill=10, text_folder="empty"), "holds no .txt files"),
    ],
)
def test_refused(tiny, tmp_path, options, words):
    if "text_folder" in options:
        options = {**options, "text_folder": tmp_path}
    with pytest.raises(PatchError, match=words):
        Perplexity(**options).items(tiny[1], tiny[0])
