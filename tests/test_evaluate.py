"""`evaluate`: pairing, resuming, order, controls, refusals and verdicts, on a miniature with a task of its own."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from infer_patch import Plan, is_patched
from infer_patch.errors import PatchError
from infer_patch.evals.eval_summary import eval_verdict
from infer_patch.evals.evaluate import evaluate
from infer_patch.evals.generation import collate
from infer_patch.evals.prompts import Prompt
from infer_patch.evals.task import Item, Task
from infer_patch.patches import Envelope, SinkWindow

NARROW = Plan((SinkWindow(window=64, sinks=0, evict=True, dense_below=0),), "narrow")
WIDE = Plan((Envelope(budget=192, dense_below=0),), "wide")
IDENTITY = Plan((), "identity")


@dataclass(frozen=True)
class Echo(Task):
    """Right is what the unpatched miniature answers: nothing else can be right for random weights."""

    name: ClassVar[str] = "echo"
    title: ClassVar[str] = "Echo"
    headline: ClassVar[str] = "accuracy"
    count: int = 8
    max_new_tokens: int = 6
    answers: tuple[str, ...] = ()

    def items(self, processor, model):
        texts = [f"{i} " + f"word {i * 7} of {i}. " * (12 + i) for i in range(self.count)]
        answers = self.answers or ("",) * self.count
        return [
            Item(f"item {i}", Prompt(text), answers[i], f"group {i // 2}", {"half": i < self.count // 2})
            for i, text in enumerate(texts)
        ]

    def score(self, item, output):
        return {"correct": output == item.reference}

    def metrics(self, rows):
        return {"accuracy": sum(row["score"]["correct"] for row in rows) / len(rows)}


@pytest.fixture(scope="module")
def task(tiny):
    found = evaluate(*tiny, Echo(), [IDENTITY], control_batches=0)
    return Echo(answers=tuple(s["output"] for s in found.samples if s["plan"] == "unpatched"))


def quality(found):
    """A summary without its times."""
    rows = [{k: v for k, v in row.items() if k not in ("cost", "verdict")} for row in found.summary["rows"]]
    return {**found.summary, "rows": rows}


def by_name(found):
    return {row["name"]: row for row in found.summary["rows"]}


def test_unpatched_against_itself_is_exactly_zero(tiny, task):
    found = evaluate(*tiny, task, [IDENTITY], batch_size=2, control_batches=4)
    rows = by_name(found)
    for name in ("identity", "unpatched again"):
        paired = rows[name]["paired"]
        assert (paired["difference"], paired["low"], paired["high"], paired["lost"], paired["won"]) == (0, 0, 0, 0, 0)
        assert rows[name]["identical"] == {"count": 8, "of": 8}
    assert "floor is zero" in rows["unpatched again"]["verdict"]
    assert not is_patched(tiny[0]) and found.folder is None


def test_a_broken_plan_is_called_worse(tiny, task):
    found = evaluate(*tiny, task, [NARROW, IDENTITY])
    rows = by_name(found)
    assert rows["unpatched"]["metrics"]["accuracy"] == 1
    assert rows["narrow"]["metrics"]["accuracy"] < 0.2 and rows["narrow"]["verdict"].startswith("WORSE than unpatched")
    assert (rows["narrow"]["status"], rows["identity"]["status"]) == ("worse", "ok")
    assert rows["narrow"]["effect"][0]["fired"] == {"count": 8, "of": 8}
    assert rows["identity"]["verdict"].startswith("no answer changes")


@pytest.mark.parametrize(
    "difference, low, high, lost, won, p, words",
    [
        (-0.5, -0.8, -0.2, 5, 0, 0.0625, "WORSE than unpatched"),  # few items: the interval warns before p does
        (-0.1, -0.2, 0.0, 9, 1, 0.02, "WORSE than unpatched"),
        (-0.1, -0.2, 0.1, 5, 4, 1.0, "no difference shown"),
        (0.5, 0.2, 0.8, 0, 5, 0.0625, "no difference shown"),
        (0.5, 0.2, 0.8, 0, 9, 0.004, "better than unpatched"),
        (0.0, 0.0, 0.0, 0, 0, 1.0, "no answer changes"),
    ],
)
def test_verdicts_warn_early_and_praise_late(tiny, task, difference, low, high, lost, won, p, words):
    rows = evaluate(*tiny, task, [IDENTITY]).summary["rows"]
    paired = dict(difference=difference, low=low, high=high, lost=lost, won=won, p_value=p, groups=4)
    assert eval_verdict({**rows[1], "paired": paired}, rows[0], task).startswith(words)


def test_a_plan_that_never_fires_fails(tiny, task):
    found = evaluate(*tiny, task, [Plan((Envelope(budget=4096),), "everything")])
    assert found.failed == ["everything"] and "never took effect" in by_name(found)["everything"]["verdict"]


@pytest.mark.parametrize("stop_after", [1, 5, 11])
def test_an_interrupted_run_goes_on_to_the_same_summary(tiny, task, tmp_path, stop_after):
    whole = evaluate(*tiny, task, [NARROW, WIDE], batch_size=2, out=tmp_path / "whole")

    def stop(done, total, what):
        if done == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(*tiny, task, [NARROW, WIDE], batch_size=2, out=tmp_path / "cut", on_progress=stop)
    assert not is_patched(tiny[0])
    rows = tmp_path / "cut" / "rows-0.jsonl"
    assert json.loads((tmp_path / "cut" / "manifest.json").read_text())["status"] == "failed"
    rows.write_text(rows.read_text() + '[{"plan": "narrow", "it')  # killed in the middle of a line
    calls = []
    again = evaluate(
        *tiny, task, [NARROW, WIDE], batch_size=2, out=tmp_path / "cut", on_progress=lambda *call: calls.append(call)
    )
    assert calls[0][0] == stop_after and calls[-1][0] == calls[-1][1] == 16
    assert quality(again) == quality(whole)
    assert not rows.exists() and (tmp_path / "cut" / "report.html").is_file()
    outputs = [[(s["plan"], s["item"], s["output"]) for s in found.samples] for found in (again, whole)]
    assert outputs[0] == outputs[1] and len(outputs[0]) == 8 * 4


def test_a_finished_run_is_read_back(tiny, task, tmp_path):
    first = evaluate(*tiny, task, [NARROW], out=tmp_path / "r")
    again = evaluate(
        *tiny, task, [NARROW], out=tmp_path / "r", on_progress=lambda done, total, _: done == total or 1 / 0
    )
    assert again.summary == first.summary


def test_the_order_of_plans_changes_no_number(tiny, task):
    one = {row["name"]: row for row in quality(evaluate(*tiny, task, [NARROW, WIDE]))["rows"]}
    two = {row["name"]: row for row in quality(evaluate(*tiny, task, [WIDE, NARROW]))["rows"]}
    assert one == two


def test_another_run_in_the_folder_is_refused(tiny, task, tmp_path):
    evaluate(*tiny, task, [IDENTITY], out=tmp_path / "r")
    with pytest.raises(PatchError, match="differs in plans; give another folder, or --overwrite"):
        evaluate(*tiny, task, [NARROW], out=tmp_path / "r")
    with pytest.raises(PatchError, match="differs in settings"):
        evaluate(*tiny, task, [IDENTITY], batch_size=4, out=tmp_path / "r")
    assert "narrow" in by_name(evaluate(*tiny, task, [NARROW], out=tmp_path / "r", overwrite=True))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(PatchError, match="is not a result folder"):
        evaluate(*tiny, task, [NARROW], out=tmp_path / "mine", overwrite=True)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(plans=[]), "give at least one plan"),
        (dict(plans=[IDENTITY, IDENTITY]), "different names"),
        (dict(task=Echo(count=0)), "it needs at least one"),
        (dict(batch_size=0), "batch_size must be 1 or more"),
    ],
)
def test_refused_before_any_work(tiny, task, tmp_path, change, words):
    asked = {"task": task, "plans": [IDENTITY], **change}
    with pytest.raises(PatchError, match=words):
        evaluate(*tiny, asked.pop("task"), asked.pop("plans"), out=tmp_path / "r", **asked)
    assert not (tmp_path / "r").exists()


def test_collate_pads_columns_on_the_left():
    short = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2), "pixel_values": torch.zeros(1, 3)}
    long = {
        "input_ids": torch.tensor([[7, 8, 9]]),
        "attention_mask": torch.ones(1, 3),
        "pixel_values": torch.ones(1, 3),
    }
    batch = collate([short, long], pad_token_id=2)
    assert batch["input_ids"].tolist() == [[2, 5, 6], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert batch["pixel_values"].shape == (2, 3)
    with pytest.raises(PatchError, match="cannot be batched: pixel_values"):
        collate([short, {**long, "pixel_values": torch.ones(1, 4)}], 0)
