"""The script that times methods that correct attention: what it times and writes. No time is judged."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from infer_patch.errors import PatchError
from infer_patch.patches import VAR

FOLDER = Path(__file__).parents[1] / "benchmarks"
SIDES = {"unpatched", "unpatched again", "var", "paint", "act, 1/4 of the heads", "retrieval_heads, 1/4", "damro"}


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(FOLDER))
    try:
        import calibration_time
    finally:
        sys.path.remove(str(FOLDER))
    yield calibration_time
    for name in ("calibration_time", "planted", "visual_time"):
        sys.modules.pop(name)


def test_every_side_is_timed_in_prefill_and_decode(script, tmp_path, capsys, monkeypatch):
    streams = []

    class Counted(script.Damro):
        def __call__(self, input_ids, scores):
            streams.append(input_ids.shape[1])
            return super().__call__(input_ids, scores)

    monkeypatch.setattr(script, "Damro", Counted)
    script.main(["--tiny", "--rounds", "2", "--steps", "3", "--pictures", "1", "2", "--json", str(tmp_path / "f")])
    found = json.loads((tmp_path / "f").read_text())
    rows = {(row["visual_tokens"], row["phase"], row["side"]): row for row in found["results"]}
    assert set(rows) == {(v, phase, side) for v in (16, 32) for phase in ("prefill", "decode") for side in SIDES}
    for (visual, phase, _), row in rows.items():
        assert len(row["raw_milliseconds"]) == (2 if phase == "prefill" else 6) and min(row["raw_milliseconds"]) > 0
        unpatched = rows[visual, phase, "unpatched"]["raw_milliseconds"]
        ratios = sorted(s / u for s, u in zip(row["raw_milliseconds"], unpatched))
        middle = (ratios[(len(ratios) - 1) // 2] + ratios[len(ratios) // 2]) / 2
        assert row["ratio"]["median"] == pytest.approx(middle, rel=0.01)
    assert streams == [*[25, 26, 27, 28] * 3, *[41, 42, 43, 44] * 3]  # in step with the first stream
    layer = rows[32, "decode", "var"]["effect"]["corrected"]["2"]
    assert layer["visual_sinks"] == 8 and layer["text_sinks"] == 1
    assert layer["rows"] == layer["rows_asked"] == 4 * (5 + 3)  # heads x (words behind the pictures + steps)
    masked = rows[16, "prefill", "retrieval_heads, 1/4"]["effect"]["corrected"]
    assert masked == {str(i): {"rows": 4} for i in range(4)}  # the prompt's last row and three steps
    assert rows[16, "prefill", "act, 1/4 of the heads"]["effect"]["corrected"]["1"]["calibrated_columns"] > 0
    assert "| 16 | decode | damro |" in capsys.readouterr().out


def test_sides_of_the_model_that_counts(script):
    sides = script.sides(script.Sizes())
    assert len(sides["act, 1/4 of the heads"].heads) == 8 * 12 // 4
    assert sides["retrieval_heads, 1/12"].heads == tuple(f"{i}-0" for i in range(8))
    assert sides["var"] == VAR(dims=script.DIMS)  # the official thresholds


@pytest.mark.filterwarnings("ignore:.*never took effect")
def test_a_side_that_does_nothing_is_not_timed(script, monkeypatch):
    sizes = script.SHORT
    monkeypatch.setattr(script, "sides", lambda _: {"unpatched": None, "var": VAR(dims=script.DIMS, tau=7.0)})
    given = argparse.Namespace(rounds=1, steps=1, clock="wall")
    with pytest.raises(PatchError, match="var did nothing"):
        script.measure(script.build(sizes), sizes, 1, given, lambda text: None)  # nothing is planted
