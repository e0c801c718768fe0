"""Scoring retrieval heads: the score by hand, heads that are built to copy, tests that do not count, resuming."""

import json

import pytest
import torch
from miniatures import GREEDY, MINIATURES, text_inputs
from typer.testing import CliRunner

import infer_patch
from infer_patch.calibration import retrieval_heads as calibration
from infer_patch.calibration.retrieval_heads import Settings, answer_with_attention, calibrate
from infer_patch.calibration.retrieval_scores import copy_scores, find_span, most_attended, recall_of_words
from infer_patch.cli import app
from infer_patch.errors import PatchError
from infer_patch.head_scores import HeadScores
from infer_patch.patches import RetrievalHeads

QUICK = Settings(lengths=(400,), depths=(0.0, 1.0), repeats=1, answer_tokens=6)
PROMPT = [9, 5, 6, 7, 9, 9, 2]  # the needle is 5 6 7, at [1, 4)


def attended(*steps):
    """One head; the key it attends to most at each step."""
    return torch.tensor(steps)[:, None, None]


def score(steps, produced, unique=False, prompt=PROMPT, span=(1, 4)):
    return float(copy_scores(attended(*steps), produced, prompt, span, unique))


def test_a_perfect_copier_scores_1():
    assert score([1, 2, 3, 6], [5, 6, 7, 2]) == pytest.approx(1)
    assert score([1, 2, 3, 6], [5, 6, 7, 2], unique=True) == pytest.approx(1)


def test_what_is_no_copy_scores_0():
    assert score([0, 4, 5, 6], [9, 9, 9, 2]) == 0  # right tokens, outside the needle
    assert score([1, 2, 3], [6, 7, 5]) == 0  # inside the needle, other tokens


def test_the_output_of_a_step_counts_and_not_its_input():
    # an induction head attends to what it is fed: the token of the step before
    assert score([1, 2, 3], [6, 7, 2]) == 0 and score([1, 2, 3], [5, 6, 7]) == pytest.approx(1)


def test_a_repeated_answer_counts_again_unless_unique():
    steps, produced = [1, 2, 3, 1, 2, 3], [5, 6, 7, 5, 6, 7]
    assert score(steps, produced) == pytest.approx(2)
    assert score(steps, produced, unique=True) == pytest.approx(1)
    assert score([1, 1, 1], [5, 5, 5], unique=True) == pytest.approx(1 / 3)


def test_what_was_generated_is_outside_the_prompt():
    assert score([7, 8, 1], [5, 6, 5]) == pytest.approx(1 / 3)


def test_spans():
    assert find_span(PROMPT, [5, 6, 7]) == (1, 4)
    assert find_span(PROMPT, [6, 7, 5]) == (1, 4)  # as sets
    assert find_span(PROMPT, [5, 6, 8]) is None and find_span(PROMPT, []) is None and find_span([], [5]) is None
    long = list(range(20, 40))
    assert find_span([1, 2, *long[:-1], 99, 3], long) == (1, 21)  # 19 of 20: the first such window, a token early
    assert find_span([1, 2, *long[:-2], 98, 99, 3], long) is None  # 18 of 20 is not more than 90 %


def test_the_first_of_equal_keys_wins_and_windows_hide_the_rest():
    k = torch.zeros(1, 1, 6, 2)
    k[0, 0, 1], k[0, 0, 3], k[0, 0, 5] = (torch.tensor(x) for x in ((2.0, 0), (2.0, 0), (1.0, 0)))
    q = torch.tensor([[1.0, 0], [-1.0, 0]])[None, :, None]  # two query heads of one key head
    assert most_attended(q, k).tolist() == [[1, 0]]
    assert most_attended(q, k, window=4).tolist() == [[3, 2]]
    assert most_attended(q, k, window=1).tolist() == [[5, 5]]


@pytest.mark.parametrize(
    "output, share",
    [("The code is 123.", 1), ("", 0), ("code", 0.5), ("a code, a code", 0.5), ("123 CODE", 1)],
)
def test_recall_of_words(output, share):
    assert recall_of_words(output, "code 123") == share


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "qwen3"])
def test_recorded_keys_are_those_of_eager_attention(family):
    mini = MINIATURES[family]
    ids = text_inputs(mini, lengths=(40,))["input_ids"][0].tolist()
    most, produced = answer_with_attention(mini.build(), ids, 5)
    eager = mini.build(attn_implementation="eager")
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, 40, dtype=torch.long)}
    out = eager.generate(
        **inputs, **GREEDY | {"max_new_tokens": 5}, output_attentions=True, return_dict_in_generate=True
    )
    assert out.sequences[0, 40:].tolist() == produced and most.shape == (5, 4, 4)
    for step, layers in enumerate(out.attentions):
        for layer, rows in enumerate(layers):
            hidden = 40 + step - rows.shape[-1]  # a window's cache has let go of them
            assert torch.equal(rows[0, :, -1].argmax(-1) + hidden, most[step, layer]), (step, layer)


def plant(monkeypatch, answers):
    """Answers instead of the model's, from a head 2-1 that copies and a head 0-0 that copies the first half."""

    def answer(model, prompt_ids, max_new_tokens):
        tokenizer = answers["tokenizer"]
        text = tokenizer.decode(prompt_ids)
        number = next(w.strip(".") for w in text.split() if w.strip(".").isdigit())
        said = tokenizer(" " + (number if answers["right"](text) else "none") + "\nmore").input_ids
        span = calibration.needle_span(tokenizer, prompt_ids, number)
        most = torch.zeros(len(said), 4, 4, dtype=torch.long)
        copied = torch.arange(len(said)) + span[0]
        most[:, 2, 1] = copied
        most[:3, 0, 0] = copied[:3]
        answers["calls"] += 1
        return most, said

    monkeypatch.setattr(calibration, "answer_with_attention", answer)


def test_scores_resume_and_failed_tests_do_not_count(tiny, tmp_path, monkeypatch):
    model, tokenizer = tiny
    answers = {"tokenizer": tokenizer, "calls": 0, "right": lambda text: True}
    plant(monkeypatch, answers)
    first = calibrate(model, tokenizer, QUICK, tmp_path / "work")
    scores = HeadScores.from_dict(first, "first")
    assert scores.ranked()[:2] == [(2, 1), (0, 0)]
    assert scores.mean((2, 1)) == pytest.approx(1) and scores.mean((0, 0)) == pytest.approx(0.5, abs=1e-4)
    assert answers["calls"] == 2 and first["tests"] == {"run": 2, "passed": 2}
    assert sum(map(bool, (scores.mean(h) for h in scores.ranked()))) == 2

    lines = tmp_path / "work" / "tests.jsonl"
    lines.write_text(lines.read_text() + '{"test": "cut o')
    answers["right"] = lambda text: False
    wider = Settings(lengths=(400,), depths=(0.0, 0.5, 1.0), repeats=1, answer_tokens=6)
    told = []
    second = calibrate(model, tokenizer, wider, tmp_path / "work", on_progress=lambda *a: told.append(a))
    assert answers["calls"] == 3 and told[0][:2] == (2, 3) and told[-1] == (3, 3, "done")
    assert second["tests"] == {"run": 3, "passed": 2} and second["scores"] == first["scores"]
    assert [json.loads(line)["passed"] for line in lines.read_text().splitlines()] == [True, True, False]

    with pytest.raises(PatchError, match="other values of seed"):
        calibrate(model, tokenizer, Settings(lengths=(400,), answer_tokens=6, seed=1), tmp_path / "work")
    with pytest.raises(PatchError, match="passed none of 2 tests"):
        calibrate(model, tokenizer, QUICK, tmp_path / "other")


def test_what_cannot_be_scored_is_refused_before_any_work(tiny, tmp_path):
    model, tokenizer = tiny
    with pytest.raises(PatchError, match="takes 2,048"):
        calibrate(model, tokenizer, Settings(lengths=(2048,)), tmp_path / "work")
    with infer_patch.patch(model, "identity"), pytest.raises(PatchError, match="is patched"):
        calibrate(model, tokenizer, QUICK, tmp_path / "work")
    assert not (tmp_path / "work").exists()
    for wrong in ({"lengths": (50,)}, {"depths": (1.5,)}, {"repeats": 0}, {"lengths": (400, 400)}):
        with pytest.raises(PatchError):
            Settings(**wrong)


def test_the_command_writes_a_file_that_plans_read(tiny, folder, tmp_path, monkeypatch):
    answers = {"tokenizer": tiny[1], "calls": 0, "right": lambda text: True}
    plant(monkeypatch, answers)
    out, picture = tmp_path / "scores.json", tmp_path / "scores.png"
    asked = ["--lengths", "400", "--depths", "2", "--repeats", "1", "--answer-tokens", "6", "--picture", str(picture)]
    ran = CliRunner().invoke(app, ["calibrate", "retrieval-heads", str(folder), "--out", str(out), *asked])
    assert ran.exit_code == 0, ran.output
    assert "2 of 2 tests passed" in ran.output and "2-1" in ran.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    model = MINIATURES["llama"].build()
    parts = infer_patch.families.describe(model)
    assert RetrievalHeads(scores_file=str(out), top=2).chosen(parts) == [(0, 0), (2, 1)]
    bad = CliRunner().invoke(app, ["calibrate", "retrieval-heads", str(folder), "--out", str(tmp_path / "scores.txt")])
    assert bad.exit_code == 2 and "must be a .json file" in bad.output
