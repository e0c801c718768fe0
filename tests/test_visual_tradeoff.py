"""The trade-off script: budgets of its controls, tokens per layer, and what its table says."""

import importlib.util
from pathlib import Path

import pytest
from miniatures import MINIATURES

from infer_patch import Plan
from infer_patch.families import describe
from infer_patch.patches import DyVTE, FastV, GSearch, RandomPruning

FILE = Path(__file__).parents[1] / "benchmarks" / "visual_tradeoff.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("visual_tradeoff", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("layers", [8, 32])
def test_linear_schedules_keep_the_budget(script, layers):
    for share in script.SHARES:
        budget = (2 + share * (layers - 2)) / layers
        rates = script.linear(budget, layers)
        assert sum(rates) / layers == pytest.approx(budget, abs=1e-6)
        assert rates[:2] == (1.0, 1.0) and list(rates) == sorted(rates, reverse=True)
        GSearch(keep_rate=rates)


def test_tokens_per_layer(script):
    parts = describe(MINIATURES["llava"].build())

    def counts(method, samples=()):
        return script.counts_per_layer(Plan((method,)), samples, parts, 16)

    assert counts(FastV(layer=2, drop_ratio=0.75)) == [16, 16, 4, 4]
    assert counts(RandomPruning(layer=1, drop_ratio=0.5)) == [16, 8, 8, 8]
    assert counts(GSearch(keep_rate=(1, 1, 0.5, 0))) == [16, 16, 8, 0]
    batch = {"methods": {"dyvte": {"samples_emptied": {"2": 1, "3": 2}}}}
    rows = [{"effect": batch}, {"effect": None}, {"effect": None}, {"effect": {"methods": {"dyvte": {}}}}]
    assert counts(DyVTE(gates="x"), rows) == [16, 16, 12, 4]  # one of four left before layer 2, two more before 3


def test_the_table_says_where_random_is_better(script):
    points = [(0.2, 0.5), (0.6, 0.9), (1.0, 1.0)]
    assert [script.interpolated(points, x) for x in (0.2, 0.4, 0.8)] == pytest.approx([0.5, 0.7, 0.95])
    assert script.interpolated(points, 0.1) is None and script.interpolated(points, 0.195) == 0.5
    common = {"last_kept": 0.1, "work": 0.5, "f1": 0.8, "yes_ratio": 0.5, "mean_kept": 0.4, "random_accuracy": 0.7}
    common["first_token_ratio"] = 0.625
    change = {"difference": -0.1, "p_value": 0.01}
    rows = [
        {"plan": "unpatched", "kind": "unpatched", "accuracy": 0.9, "paired": None, **common, "random_accuracy": None}
        | {"first_token_ratio": None},
        {"plan": "fastv 0.5", "kind": "fastv", "accuracy": 0.6, "paired": change, **common},
        {"plan": "dyvte 0.5", "kind": "dyvte", "accuracy": 0.8, "paired": change, **common},
    ]
    table = script.as_text(rows, ["a against b"]).splitlines()
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in table}
    assert "**random is better**" in lines["fastv 0.5"] and "random is better" not in lines["dyvte 0.5"]
    assert "-10.0 (p 0.01)" in lines["fastv 0.5"] and table[-1] == "- a against b"
    assert table[2].startswith("| unpatched")
    column = table[0].split(" | ").index("time to first token")
    assert [line.split(" | ")[column] for line in table[2:5]] == ["-", "0.62 x", "0.62 x"]


def test_the_plot(script, tmp_path):
    rows = [
        {"kind": kind, "work": w, "accuracy": a} for kind, w, a in (("a", 0.5, 0.8), ("a", 1, 0.9), ("b", 0.4, 0.7))
    ]
    script.draw(rows, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
