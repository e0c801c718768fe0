"""The question fed after the context: the same answers unpatched, and cache methods show in one-token answers."""

import pytest
import torch
from miniatures import MINIATURES, text_inputs, vision_inputs
from test_evaluate import IDENTITY, NARROW, WIDE, Echo

from infer_patch import Plan
from infer_patch.availability import continues_3d_positions
from infer_patch.errors import PatchError
from infer_patch.evals.evaluate import evaluate
from infer_patch.evals.generation import generate_batch
from infer_patch.evals.needle import NeedleGrid
from infer_patch.evals.perplexity import Perplexity
from infer_patch.evals.prompts import Prompt, question_length
from infer_patch.evals.question_last import feeds_question_last
from infer_patch.patches import FastV

VISION = [mini for mini in MINIATURES.values() if mini.kind == "vision" and mini.bidirectional != "prompt"]


@pytest.mark.parametrize("mini", VISION, ids=lambda mini: mini.name)
def test_it_changes_no_answer_of_the_unpatched_model(mini):
    """Left-padded batch, different pictures: context first, question after, equals the prompt whole."""
    model = mini.build()
    if hasattr(model.model, "rope_deltas") and not continues_3d_positions():
        pytest.skip("transformers 5.2 continues with wrong positions; evaluate refuses")
    inputs = vision_inputs(mini, images=(1, 2), text=[(5, 9), (3, 12)], seed=1)
    whole = generate_batch(model, inputs, 6)
    assert generate_batch(model, inputs, 6, question_tokens=7).ids == whole.ids


def test_text_models_too():
    model = MINIATURES["llama"].build()
    inputs = text_inputs(MINIATURES["llama"], lengths=(40, 25), seed=1)
    assert generate_batch(model, inputs, 6, question_tokens=5).ids == generate_batch(model, inputs, 6).ids


def test_where_the_question_begins():
    ids = torch.tensor([[1, 9, 9, 5, 9, 7, 8, 6]])
    assert question_length(Prompt(), ids, (9,)) == 3
    assert question_length(Prompt(), ids, (4,)) is None
    assert question_length(Prompt(question_tokens=2), ids, (9,)) == 2


def test_needles_know_their_question(tiny):
    model, tokenizer = tiny
    item = NeedleGrid(lengths=(600,), depths=(0.5,)).items(tokenizer, model)[0]
    tail = tokenizer.decode(item.prompt.input_ids[-item.prompt.question_tokens :])
    assert tail.startswith("What is the special magic number") and item.prompt.answer not in tail


def test_plans_that_change_the_cache_are_asked_afterwards(tiny):
    """Eviction after the prefill costs a one-token answer nothing, until the question reads what is left."""
    task = NeedleGrid(lengths=(600,), depths=(0.25, 0.75), max_new_tokens=1)
    auto = evaluate(*tiny, task, [NARROW, IDENTITY])
    assert auto.summary["question_last"] and auto.manifest["settings"]["question_last"]
    assert not evaluate(*tiny, task, [WIDE]).summary["question_last"]  # keeps everything in the cache
    assert not evaluate(*tiny, task, [NARROW], question_last=False).summary["question_last"]
    rows = {row["name"]: row for row in auto.summary["rows"]}
    assert rows["identity"]["identical"] == rows["unpatched again"]["identical"] == {"count": 2, "of": 2}


def test_it_refuses_where_there_is_no_question(tiny):
    with pytest.raises(PatchError, match="no question at their end"):
        evaluate(*tiny, Echo(), [IDENTITY], question_last=True)
    assert not evaluate(*tiny, Echo(count=2), [NARROW]).summary["question_last"]
    ppl = Perplexity(tokens=300, windows=1, prefill=200)
    assert not evaluate(*tiny, ppl, [NARROW]).summary["question_last"]


def test_pruning_plans_read_the_question_in_the_prefill(tiny):
    """A pruning method is led by the question: with the context alone it would have nothing to go by."""
    item = NeedleGrid(lengths=(600,)).items(tiny[1], tiny[0])[0]
    plans = [NARROW, Plan((FastV(),), "fastv")]
    assert feeds_question_last(*tiny, NeedleGrid(), [NARROW], item, None)
    assert not feeds_question_last(*tiny, NeedleGrid(), plans, item, None)
    with pytest.raises(PatchError, match="prune visual tokens must read the question"):
        feeds_question_last(*tiny, NeedleGrid(), plans, item, True)
