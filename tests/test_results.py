"""The result folder: what is written when, and what is refused."""

import json

import pytest

from infer_patch import PatchError, Plan
from infer_patch.evals import results
from infer_patch.evals.results import ResultFolder
from infer_patch.patches import Envelope


def manifest(**values):
    return {"schema": 1, "status": "running", "error": None, "seconds": None, "plans": [], **values}


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_manifest_and_plans_stand_before_the_run(tmp_path):
    plan = Plan((Envelope(budget=512),), "a quarter / of it")
    ResultFolder(tmp_path / "run").start(manifest(plans=[plan.to_dict()]), [plan])
    written = load(tmp_path / "run" / "manifest.json")
    assert written["status"] == "running" and written["plans"] == [plan.to_dict()]
    assert Plan.load(tmp_path / "run" / "plans" / "a-quarter-of-it.yaml") == plan
    assert not (tmp_path / "run" / "summary.json").exists()


def test_finish_writes_the_final_manifest_into_the_page(tmp_path):
    folder = ResultFolder(tmp_path)
    folder.start(manifest(), [])
    folder.add({"plan": "unpatched"})
    folder.add({"plan": "ünïcode\n"})
    folder.finish({"schema": 1, "rows": []}, lambda final: f"page of a run that is {final['status']}")
    final, summary, samples = results.read(tmp_path)
    assert final["status"] == "done" and final["seconds"] >= 0 and summary["rows"] == []
    assert [s["plan"] for s in samples] == ["unpatched", "ünïcode\n"]
    assert (tmp_path / "report.html").read_text() == "page of a run that is done"


def test_failure_is_visible(tmp_path):
    folder = ResultFolder(tmp_path)
    folder.start(manifest(), [])
    folder.fail(KeyboardInterrupt())
    assert load(tmp_path / "manifest.json") == manifest(status="failed", error="KeyboardInterrupt") | {
        "seconds": load(tmp_path / "manifest.json")["seconds"]
    }


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(PatchError, match="not a result folder"):
        ResultFolder(tmp_path).start(manifest(), [])
    with pytest.raises(PatchError, match="is a file"):
        ResultFolder(tmp_path / "thesis.tex").start(manifest(), [])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_earlier_result_is_replaced(tmp_path):
    folder = ResultFolder(tmp_path)
    folder.start(manifest(), [Plan(name="old")])
    folder.add({"plan": "old"})
    folder.finish({"schema": 1}, lambda final: "old")
    ResultFolder(tmp_path).start(manifest(), [Plan(name="new")])
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "manifest.json",
        "plans",
        "plans/new.yaml",
    ]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    results.write_json(path, {"kept": True})
    with pytest.raises(UnicodeEncodeError):
        results.write_text(path, "half of it, then \ud800")
    assert load(path) == {"kept": True} and list(tmp_path.iterdir()) == [path]


def test_reading_what_is_no_result(tmp_path):
    with pytest.raises(PatchError, match="not a finished result folder"):
        results.read(tmp_path)
    results.write_json(tmp_path / "manifest.json", {})
    results.write_json(tmp_path / "summary.json", {"schema": 99})
    (tmp_path / "samples.jsonl").touch()
    with pytest.raises(PatchError, match="schema 99"):
        results.read(tmp_path)


def test_plain_values_are_those_that_json_gives_back():
    values = results.plain({1: (0.123456789, 2), "x": None})
    assert values == {"1": [0.123457, 2], "x": None} == json.loads(json.dumps(values))
