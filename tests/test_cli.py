"""The command line: what each command prints, and that user errors are one line with exit code 2."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import infer_patch
from infer_patch.cli import app
from infer_patch.cli.list import paragraphs

TINY = ["bench", "overhead", "--model", "tiny", "--lengths", "24", "--new-tokens", "2", "--rounds", "1"]


def call(*arguments, code=0):
    done = CliRunner().invoke(app, list(arguments))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done


def test_help_names_every_command():
    text = call("--help").stdout
    for command in ("demo", "compare", "list", "doctor", "bench"):
        assert re.search(rf"\b{command}\b", text)


def test_version():
    assert infer_patch.__version__ in call("--version").stdout


def test_runs_as_a_module():
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "infer_patch", "bench", "--help"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "infer-patch bench" in done.stdout, done.stderr


def test_list_names_all_methods_and_presets():
    text = call("list").stdout
    for name in [*infer_patch.methods(), *infer_patch.presets()]:
        assert name in text


@pytest.mark.parametrize("name", infer_patch.methods())
def test_a_method_has_a_page_with_its_options(name):
    text = call("list", name).stdout
    cls = infer_patch.methods()[name]
    assert cls.__doc__.splitlines()[0][:40] in text
    for field in dataclasses.fields(cls):
        assert field.name in text


@pytest.mark.parametrize("name", infer_patch.presets())
def test_a_preset_is_shown_as_yaml(name):
    text = call("list", name).stdout
    for method in infer_patch.Plan.preset(name):
        assert f"method: {method.name}" in text


def test_list_as_json():
    found = json.loads(call("list", "--json").stdout)
    assert [m["name"] for m in found["methods"]] == list(infer_patch.methods())
    assert [p["name"] for p in found["presets"]] == infer_patch.presets()
    envelope = next(m for m in found["methods"] if m["name"] == "envelope")
    stride = next(option for option in envelope["options"] if option["name"] == "stride")
    assert (stride["type"], stride["default"]) == ("int", 4)
    assert "refuses" in envelope["models"]
    assert [m["name"] for m in json.loads(call("list", "fastv", "--json").stdout)["methods"]] == ["fastv"]


def test_docstrings_are_wrapped_anew():
    doc = "One\ntwo.\n\nParameters\n----------\nx : int\n    Long\n    line.\ny : int\n    Other."
    assert paragraphs(doc) == [
        (0, "One two."),
        (0, ""),
        (0, "Parameters"),
        (0, "----------"),
        (0, "x : int"),
        (4, "Long line."),
        (0, "y : int"),
        (4, "Other."),
    ]


def test_doctor():
    assert "The core is fine" in call("doctor").stdout
    found = json.loads(call("doctor", "--json").stdout)
    assert found["ok"] and not found["problems"]
    assert found["core"]["torch"]["ok"] and found["machine"]["cores"] >= 1
    assert found["kernels"]["block_sparse_attention"]["cpu"] == "cpu"
    for entry in found["optional"].values():
        assert (entry["install"] is None) == (entry["state"] == "ok")


def test_doctor_finds_a_wrong_kernel_setting(monkeypatch):
    monkeypatch.setenv("INFER_PATCH_KERNELS", "nonsense")
    text = call("doctor", code=1).stdout
    assert "INFER_PATCH_KERNELS" in text and "The core is fine" not in text


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["list", "nonsense"], "no method or preset is called 'nonsense'"),
        ([*TINY, "--plan", "nonsense"], "unknown preset 'nonsense'"),
        ([*TINY, "--lengths", "4000"], "more than the 2048"),
        ([*TINY, "--json", "no/such/folder/x.json"], "folder does not exist"),
        ([*TINY, "--model", "demo", "--dtype", "float12"], "unknown dtype 'float12'"),
    ],
)
def test_user_errors_are_one_line(arguments, words):
    done = call(*arguments, code=2)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and words in lines[0], done.stderr
    assert "Traceback" not in done.output


def test_overhead_writes_its_result(tmp_path):
    file = tmp_path / "overhead.json"
    done = call(*TINY, "--json", str(file))
    assert "control: unpatched once more" in done.stdout
    found = json.loads(file.read_text())
    assert found["plans"] == [{"name": "identity", "methods": []}]
    assert found["machine"]["versions"]["torch"] and found["command"].startswith(
        "infer-patch bench overhead --model tiny"
    )
    assert [(r["length"], r["phase"]) for r in found["results"]] == [(24, "prefill"), (24, "decode")]
    for result in found["results"]:
        assert result["verdict"] == "undecided: fewer than 6 measurements"
        assert set(result["milliseconds"]) == {"unpatched", "patched", "control"}
        assert result["ratio"]["control"]["median"] > 0 and result["measurements"] == len(
            result["raw_milliseconds"]["patched"]
        )


def test_overhead_of_several_plans_side_by_side(tmp_path):
    file = tmp_path / "overhead.json"
    done = call(*TINY, "--plan", "identity", "--plan", "sink_window-evict", "--json", str(file))
    found = json.loads(file.read_text())
    assert found["command"].count("--plan") == 2 and found["goal"] is None
    rows = [(r["phase"], r["plan"]) for r in found["results"]]
    assert rows == [(phase, plan) for phase in ("prefill", "decode") for plan in ("identity", "sink_window-evict")]
    identity, evicting = found["results"][:2]
    assert identity["raw_milliseconds"]["control"] == evicting["raw_milliseconds"]["control"]
    assert identity["raw_milliseconds"]["patched"] != evicting["raw_milliseconds"]["patched"]
    assert set(evicting["effect"]) == {"sink_window"} and not identity["effect"]
    assert done.stdout.count("control") == 3  # two phases, and the line that explains it


def test_overhead_refuses_what_it_cannot_measure():
    done = call(*TINY, "--prose", code=2)
    assert "the tiny model has no tokenizer" in done.stderr
    done = call(*TINY, "--plan", "identity", "--plan", "identity", code=2)
    assert "give plans of different names" in done.stderr


def test_overhead_ends_stdout_with_json_and_names_silent_methods():
    done = call(*TINY, "--plan", "sink_window-evict", "--json", "-")
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["goal"] is None
    assert all(result["never_fired"] == ["sink_window"] for result in found["results"])
    assert "never took effect" in done.stdout


def test_an_interrupted_calibration_says_how_to_go_on(monkeypatch, tmp_path):
    def interrupted(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("infer_patch.evals.loading.load", interrupted)
    done = CliRunner().invoke(app, ["calibrate", "act", "demo", "--out", str(tmp_path / "heads.json")])
    assert (
        done.exit_code == 130 and "Stopped." in done.output and "run it again to go on" in " ".join(done.output.split())
    )
