"""`eval drift`: zero against itself, the formula on plain forwards, first difference and flips, refusals."""

import pytest
import torch
from test_evaluate import IDENTITY, NARROW, WIDE

from infer_patch import patch
from infer_patch.errors import PatchError
from infer_patch.evals.drift_task import Drift
from infer_patch.evals.evaluate import evaluate
from infer_patch.evals.generation import generate
from infer_patch.evals.prompts import encode

TASK = Drift(lengths=(300,), samples=2, max_new_tokens=8)


@pytest.fixture(scope="module")
def found(tiny):
    return evaluate(*tiny, TASK, [NARROW, IDENTITY, WIDE], control_batches=2)


def by_name(found):
    return {row["name"]: row for row in found.summary["rows"]}


def test_unpatched_and_identity_are_exactly_zero(found):
    for name in ("unpatched", "identity", "unpatched again"):
        metrics = by_name(found)[name]["metrics"]
        assert (metrics["top1"], metrics["kl"], metrics["max_logit_gap"], metrics["same_output"]) == (1, 0, 0, 1)
    assert by_name(found)["identity"]["verdict"].startswith("the same logits to the last bit")
    assert "floor is zero" in by_name(found)["unpatched again"]["verdict"]


def test_the_other_backend_is_the_numerical_floor(found):
    row = by_name(found)["unpatched, math SDPA"]
    assert row["role"] == "control" and 0 <= row["metrics"]["kl"] < 1e-6
    assert row["verdict"].startswith("the same model, rounded differently")


def test_a_broken_plan_is_called_worse(found):
    row = by_name(found)["narrow"]
    assert row["status"] == "worse" and "WORSE than unpatched" in row["verdict"]
    assert row["metrics"]["kl"] > by_name(found)["wide"]["metrics"]["kl"] >= 0
    assert [r["role"] for r in found.summary["rows"]].count("plan") == 3


def test_kl_is_that_of_plain_forwards_over_the_unpatched_output(tiny, found):
    """The plan reads prompt and output through its cache; here every prefix is prefilled anew, which must agree."""
    model, tokenizer = tiny
    item = TASK.items(tokenizer, model)[0]
    inputs = encode(item.prompt, tokenizer, model)
    ids = generate(model, inputs, TASK.max_new_tokens).ids
    whole = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)

    def logits():
        with torch.no_grad():
            out = model(whole).logits[0].double()
        return out[inputs["input_ids"].shape[1] - 1 : -1].log_softmax(-1)

    plain = logits()
    with patch(model, NARROW):
        patched = logits()
    expected = (plain.exp() * (plain - patched)).sum(-1).mean()
    sample = next(s for s in found.samples if s["plan"] == "narrow" and s["item"] == item.name)
    assert sample["score"]["kl"] == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
    agreed = (plain.argmax(-1) == patched.argmax(-1)).tolist()
    assert sample["score"]["agreed_tokens"] == (agreed.index(False) if False in agreed else len(agreed))
    assert sample["score"]["top1"] == pytest.approx(sum(agreed) / len(agreed))


def test_the_first_differing_token_is_that_of_the_free_run(tiny, found):
    model, tokenizer = tiny
    checked = 0
    for item in TASK.items(tokenizer, model):
        inputs = encode(item.prompt, tokenizer, model)
        plain = generate(model, inputs, TASK.max_new_tokens).ids
        with patch(model, NARROW):
            free = generate(model, inputs, TASK.max_new_tokens).ids
        sample = next(s for s in found.samples if s["plan"] == "narrow" and s["item"] == item.name)
        common = next((i for i, (a, b) in enumerate(zip(plain, free)) if a != b), min(len(plain), len(free)))
        assert sample["score"]["agreed_tokens"] == common and sample["output"] == tokenizer.decode(free)
        checked += common < len(plain)
    assert checked  # at least one of them differs


def test_flips_count_answers_only(found):
    paired = by_name(found)["narrow"]["paired"]
    correct = [s["score"]["correct"] for s in found.samples if s["plan"] == "unpatched"]
    assert correct.count(None) == 2 and len(correct) == 4  # continuations have no answer
    assert paired["lost"] == correct.count(True) - sum(
        s["score"]["correct"] is True for s in found.samples if s["plan"] == "narrow"
    )


def test_prompts_of_ones_own_and_the_page(tiny, tmp_path):
    task = Drift(texts=("a text to go on with " * 20, "another one " * 30), max_new_tokens=4)
    found = evaluate(*tiny, task, [NARROW], out=tmp_path / "r")
    assert len([s for s in found.samples if s["plan"] == "narrow"]) == 2
    assert by_name(found)["narrow"]["paired"]["p_value"] is None  # no answers, so nothing flips
    page = found.page.read_text()
    assert "Drift from the unpatched model" in page and "in other words" in page
    again = evaluate(
        *tiny, task, [NARROW], out=tmp_path / "r", on_progress=lambda done, total, _: done == total or 1 / 0
    )
    assert again.summary == found.summary


def test_it_refuses(tiny):
    with pytest.raises(PatchError, match="batch_size=1"):
        evaluate(*tiny, TASK, [IDENTITY], batch_size=2)
    with pytest.raises(PatchError, match="without a prompt"):
        Drift(images=("a.png",))
    with pytest.raises(PatchError, match="this model takes"):
        evaluate(*tiny, Drift(lengths=(10**7,)), [IDENTITY])
