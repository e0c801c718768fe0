"""`infer-patch eval`, from the command line to the page, in one process and in two."""

import json
import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from infer_patch.cli import app

GRID = ["--length", 700, "--length", 900, "--depth", 0, "--depth", 0.5, "--depth", 1]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def quality(folder):
    """A summary without its times, and the samples without theirs."""
    summary = json.loads((folder / "summary.json").read_text())
    rows = [{k: v for k, v in row.items() if k not in ("cost", "verdict")} for row in summary["rows"]]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return {**summary, "rows": rows}, [(s["plan"], s["item"], s["batch"], s["output"], s["score"]) for s in samples]


@pytest.fixture
def narrow(tmp_path):
    plan = tmp_path / "narrow.yaml"
    plan.write_text("name: narrow\nmethods:\n- {method: sink_window, window: 64, evict: true, dense_below: 0}\n")
    return plan


def test_needle_writes_a_whole_result(folder, narrow, tmp_path):
    ran = invoke("eval", "needle", folder, "--plan", narrow, "--plan", "identity", *GRID, "--out", tmp_path / "r")
    assert ran.exit_code == 0, ran.output
    assert "6 items" in ran.output and "unpatched again" in " ".join(ran.output.split())
    assert "floor is zero" in " ".join(ran.output.split())
    manifest = json.loads((tmp_path / "r" / "manifest.json").read_text())
    assert manifest["status"] == "done" and manifest["kind"] == "eval needle"
    assert str(tmp_path) not in (tmp_path / "r" / "manifest.json").read_text().replace(manifest["command"], "")
    page = (tmp_path / "r" / "report.html").read_text()
    assert "narrow minus unpatched" in page and "Quality against time" in page


def test_a_plan_that_never_fires_is_exit_code_1(folder, tmp_path):
    ran = invoke("eval", "needle", folder, "--plan", "envelope", *GRID, "--out", tmp_path / "r")
    assert ran.exit_code == 1 and "never took effect" in " ".join(ran.output.split())


def test_ruler_and_ppl(folder, narrow, tmp_path):
    tasks = ["--task", "niah_single_1", "--task", "vt", "--length", 1900, "--samples", 1]
    ran = invoke("eval", "ruler", folder, "--plan", narrow, *tasks, "--out", tmp_path / "ruler")
    assert ran.exit_code == 0, ran.output
    sizes = ["--tokens", 300, "--prefill", 250, "--windows", 2]
    ran = invoke("eval", "ppl", folder, "--plan", narrow, *sizes, "--out", tmp_path / "ppl")
    assert ran.exit_code == 0 and "nats" in ran.output, ran.output


def test_report_joins_runs(folder, narrow, tmp_path):
    for name, length in (("short", 700), ("long", 900)):
        asked = ["--length", length, "--depth", 0.5, "--out", tmp_path / name]
        assert invoke("eval", "needle", folder, "--plan", narrow, *asked).exit_code == 0
    ran = invoke("report", tmp_path / "short", tmp_path / "long", "--out", tmp_path / "both.html")
    assert ran.exit_code == 0 and "both.html" in ran.output, ran.output
    page = (tmp_path / "both.html").read_text()
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and {"run-1-top", "run-2-numbers"} <= set(ids)
    assert set(re.findall(r'aria-labelledby="([^"]+)"', page)) <= set(ids)
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    (tmp_path / "empty").mkdir()
    ran = invoke("report", tmp_path / "short", tmp_path / "empty", "--out", tmp_path / "none.html")
    assert ran.exit_code == 2 and "not a finished result folder" in " ".join(ran.output.split())
    assert not (tmp_path / "none.html").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["pope", "FOLDER", "--scenes", 1], "takes text only"),
        (["pope", "FOLDER", "--questions", "a.json"], "--images"),
        (["pope", "FOLDER", "--questions", "a.json", "--images", ".", "--hub", "x"], "give one"),
        (["needle", "FOLDER", "--length", 100000], "2,048"),
        (["needle", "FOLDER", "--depth", 1.5], "depth"),
        (["ruler", "FOLDER", "--task", "niah_nothing"], "niah_nothing"),
    ],
)
def test_refused_in_words(folder, narrow, tmp_path, arguments, words):
    arguments = [folder if a == "FOLDER" else a for a in arguments]
    ran = invoke("eval", *arguments, "--plan", narrow, "--out", tmp_path / "r")
    assert ran.exit_code == 2, ran.output
    assert words in " ".join(ran.output.split())
    assert not (tmp_path / "r").exists()


def test_two_processes_give_what_one_gives(folder, narrow, tmp_path):
    pytest.importorskip("accelerate")
    arguments = ["-m", "infer_patch", "eval", "needle", folder, "--plan", narrow, *GRID, "--device", "cpu", "--out"]
    arguments = [str(a) for a in arguments]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, command in {"one": arguments, "two": launch + arguments}.items():
        command = [sys.executable, *command, str(tmp_path / name)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
        assert ran.returncode == 0, ran.stderr[-3000:]
    machines = [json.loads((tmp_path / name / "manifest.json").read_text())["machine"] for name in ("one", "two")]
    assert [machine["processes"] for machine in machines] == [1, 2]
    assert quality(tmp_path / "one") == quality(tmp_path / "two")
    assert not list((tmp_path / "two").glob("rows-*"))
