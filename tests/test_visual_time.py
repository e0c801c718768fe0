"""The script that holds time against visual tokens: what it times, counts and writes. No time is judged."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from infer_patch import Plan, patch
from infer_patch.errors import PatchError
from infer_patch.evals.visual_cost import causal_ratio
from infer_patch.patches import FastV

FILE = Path(__file__).parents[1] / "benchmarks" / "visual_time.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("visual_time", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_every_side_is_timed_and_counted(script, tmp_path, capsys):
    script.main(["--tiny", "--rounds", "2", "--shares", "0.5", "--pictures", "1", "2", "--json", str(tmp_path / "f")])
    found = json.loads((tmp_path / "f").read_text())
    rows = {(row["visual_tokens"], row["side"]): row for row in found["results"]}
    names = {"unpatched", "unpatched again", "fastv 0.5", "random 0.5", "vtc_cls 0.5", "g_search to 0.5"}
    names |= {"p_sigmoid 0.5", "dyvte, exit after 2", "dyvte, exit after 4"}
    assert {n for v, n in rows if v == 16} == names and {n for v, n in rows if v == 32} == names
    for row in rows.values():
        assert len(row["raw_milliseconds"]) == 2 and min(row["raw_milliseconds"]) > 0
        for share in ("work", "macs"):
            assert row[f"time_over_{share}"]["median"] == pytest.approx(row["ratio"]["median"] / row[share], rel=2e-3)
    assert rows[16, "unpatched"]["work"] == 1 and rows[16, "unpatched"]["ratio"]["median"] == 1
    assert rows[16, "fastv 0.5"]["counts"] == [16, 16, 8, 8, 8, 8, 8, 8]
    assert rows[32, "vtc_cls 0.5"]["counts"] == [16] * 8
    assert rows[16, "dyvte, exit after 2"]["counts"] == [16] * 3 + [0] * 5
    assert rows[16, "fastv 0.5"]["work"] > rows[16, "vtc_cls 0.5"]["work"]
    assert found["settings"]["sizes"]["hidden"] == 64 and found["machine"]["cores"] >= 1
    assert "| 16 | fastv 0.5 |" in capsys.readouterr().out


def test_work_of_a_causal_decoder_with_a_gated_mlp():
    """Counted by hand: d = 2, m = 3; 10 tokens and 6, of which 2 are text."""
    whole, less = (4 * n * 4 + n * n * 2 + 3 * n * 2 * 3 for n in (10, 6))
    assert causal_ratio([8, 4], 2, 8, 2, 3) == (whole + less) / (2 * whole)
    assert causal_ratio([8, 8], 2, 8, 2, 3) == 1


def test_a_side_that_leaves_other_numbers_of_tokens_is_not_timed(script):
    sizes = script.Sizes(hidden=64, intermediate=96, heads=2, image=56, tower_layers=2, text=9, layers=3)
    model = script.build(sizes)
    for side, message in (
        (script.Side("fastv", FastV(drop_ratio=0.25), [16.0, 16.0, 8.0]), "should leave"),
        (script.Side("fastv", FastV(drop_ratio=0), [16.0] * 3), "did nothing"),
    ):
        with patch(model, Plan((side.method,))) as handle:
            model(**script.prompt(sizes, 1))
            with pytest.raises(PatchError, match=message):
                script.check(side, handle.report())
            handle.report(reset=True)
