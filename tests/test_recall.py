"""`bench recall`: exact mass, the oracle as an upper bound, chance, and what the command writes."""

import itertools
import json

import pytest
import torch
from miniatures import MINIATURES
from typer.testing import CliRunner

from infer_patch.availability import is_available
from infer_patch.cli import app
from infer_patch.errors import MissingDependencyError, PatchError, PlanError
from infer_patch.evals.attention_mass import block_mass, listed_mass, lists_of, oracle_lists, random_lists
from infer_patch.evals.recall import Settings, measure, query_blocks
from infer_patch.kernels.block_mask import BlockMask
from infer_patch.patches import Envelope, FastV, SinkWindow
from infer_patch.plan import Plan
from infer_patch.report import recall_plot

PLANS = [Plan((SinkWindow(),), "sink_window"), Plan((Envelope(),), "envelope")]


def qk(queries=300, keys=500, heads=4, kv_heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(2, heads, queries, 16, generator=generator)
    return q, torch.randn(2, kv_heads, keys, 16, generator=generator)


def test_block_mass_is_the_softmax_summed_over_blocks():
    q, k = qk()
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.25
    p = scores.masked_fill(torch.arange(500) > torch.arange(200, 500)[:, None], float("-inf")).softmax(-1)
    for start, stop, block in ((320, 384, 64), (448, 500, 64), (256, 320, 16)):
        found = block_mass(q, k, start, stop, block, 0.25)
        n_k = -(-500 // block)
        expected = torch.stack(
            [p[:, :, start - 200 : stop - 200, j * block : (j + 1) * block].sum(-1) for j in range(n_k)], -1
        )
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))


@pytest.mark.parametrize("lists", [1, 2, 4])
def test_listed_mass(lists):
    q, k = qk()
    mass = block_mass(q, k, 448, 500, 64, 0.25)
    every = torch.arange(8).expand(2, lists, -1)
    full = torch.full((2, lists), 8)
    torch.testing.assert_close(listed_mass(mass, every, full), torch.ones(2, 4, 52))
    some = torch.tensor([1, 7, 10**6, -3]).expand(2, lists, -1)  # nothing past the count may matter
    torch.testing.assert_close(listed_mass(mass, some, torch.full((2, lists), 2)), mass[..., [1, 7]].sum(-1))


def test_every_list_head_belongs_to_its_query_heads():
    q, k = qk()
    mass = block_mass(q, k, 448, 500, 64, 0.25)
    lists = torch.tensor([[0], [3]]).expand(2, 2, 1)
    found = listed_mass(mass, lists, torch.ones(2, 2, dtype=torch.long))
    torch.testing.assert_close(found, torch.cat([mass[:, :2, :, 0], mass[:, 2:, :, 3]], 1))


def test_the_list_of_a_position():
    mask = BlockMask(torch.arange(8).view(1, 1, 2, 4), torch.tensor([[[1, 2]]]), 128, 64)  # query blocks 2 and 3
    assert mask.diagonal(200, 500) == (2, 2)
    found = {position: lists_of(mask, position, 200, 500) for position in (300, 383, 384, 499)}
    assert [lists[0, 0].tolist()[0] for lists, _ in found.values()] == [0, 0, 4, 4]
    assert [count.item() for _, count in found.values()] == [1, 1, 2, 2]


def test_no_choice_of_equal_size_beats_the_oracle():
    q, k = qk(seed=1)
    mass = block_mass(q, k, 448, 500, 64, 0.25)
    best = oracle_lists(mass, 2, 4, (0, 7))
    count = torch.full((2, 2), 4)
    assert all({0, 7} <= set(entries) for entries in best.flatten(0, 1).tolist())
    reached = listed_mass(mass, best, count).unflatten(1, (2, 2)).mean((2, 3))
    for pair in itertools.combinations(range(1, 7), 2):
        lists = torch.tensor([0, *pair, 7]).expand(2, 2, -1)
        assert (listed_mass(mass, lists, count).unflatten(1, (2, 2)).mean((2, 3)) <= reached + 1e-6).all()


def test_random_lists():
    generator = torch.Generator().manual_seed(0)
    lists = random_lists(1, 200, 10, 4, (0, 9), generator)[0]
    assert all(len(set(x)) == 4 and {0, 9} <= set(x) and max(x) <= 9 for x in lists.tolist())
    drawn = torch.bincount(lists.flatten(), minlength=10)[1:9]  # 2 of 8: each about 50 times of 200
    assert drawn.min() > 25 and drawn.max() < 80
    assert random_lists(1, 1, 3, 10, (0, 2), generator).shape[-1] == 3


@pytest.mark.parametrize("keys, count", [(512, 1), (512, 3), (512, 100), (4093, 8), (640, 5)])
def test_query_blocks_lie_in_the_second_half(keys, count):
    blocks = query_blocks(keys, count)
    last = keys // 64 - 1
    assert blocks == sorted(set(blocks)) and blocks[-1] == last and blocks[0] >= keys // 64 // 2
    assert len(blocks) == min(count, last - keys // 64 // 2 + 1)


@pytest.fixture(scope="module")
def measured():
    model = MINIATURES["llama"].build()
    with torch.no_grad():
        for layer in model.model.layers:  # sharper than at birth, so that choosing matters
            layer.self_attn.q_proj.weight *= 30
    ids = torch.randint(8, 100, (1, 1000), generator=torch.Generator().manual_seed(0))
    before = model(ids).logits
    calls = []
    results = measure(model, PLANS, [ids[0].tolist()], Settings((192, 384, 1024)), lambda *x: calls.append(x))
    assert torch.equal(model(ids).logits, before)
    layers = model.config.num_hidden_layers
    assert [c[:2] for c in calls] == [(i, layers) for i in range(layers)]
    return {(r["plan"], r["budget"]): r for r in results}, layers


def test_recall_by_layer(measured):
    rows, layers = measured
    assert list(rows) == [(p, b) for b in (192, 384, 1024) for p in ("sink_window", "envelope", "oracle", "random")]
    json.dumps(list(rows.values()))
    for (name, budget), row in rows.items():
        if (name, budget) == ("envelope", 1024):  # more than there is: dense everywhere
            assert row["recall"] is None and row["tokens_read"] is None and not row["by_layer"]
            assert set(row["dense_layers"]) == set(range(layers))
            continue
        assert set(row["by_layer"]) == set(range(layers)) and not row["dense_layers"]
        mean = sum(x["recall"] for x in row["by_layer"].values()) / layers
        assert row["recall"] == pytest.approx(mean, abs=1e-3) and 0 <= row["p10"] <= row["recall"]
        assert row["tokens_read"] == (
            budget if budget < 1024 else pytest.approx(11.5 * 64)
        )  # blocks 8 to 14 of queries


def test_the_oracle_bounds_every_plan_and_all_blocks_hold_everything(measured):
    rows, layers = measured
    for budget, layer in itertools.product((192, 384), range(layers)):
        found = {name: rows[name, budget]["by_layer"][layer]["recall"] for name, b in rows if b == budget}
        assert max(found, key=found.get) == "oracle", found
        assert rows["oracle", budget]["recall"] > rows["random", budget]["recall"] + 0.02
    for name in ("sink_window", "oracle", "random"):  # the budget covers the prompt, so every block is listed
        assert rows[name, 1024]["recall"] == rows[name, 1024]["p10"] == 1


@pytest.mark.parametrize(
    "change, error, complaint",
    [
        ({"ids": [5] * 100}, PatchError, "too short to select from: give 512 or more"),
        ({"ids": [5] * 100_000}, PatchError, "more than the"),
        ({"plans": [PLANS[0], PLANS[0]]}, PatchError, "different names"),
        ({"plans": [Plan((FastV(),), "pruned")]}, PlanError, "pruned selects no key blocks|fastv"),
    ],
)
def test_recall_refuses(change, error, complaint):
    model = MINIATURES["llama"].build()
    with pytest.raises(PatchError, match=complaint) as caught:
        measure(model, change.get("plans", PLANS), [change.get("ids", [5] * 600)], Settings((192,)))
    assert isinstance(caught.value, error) or "fastv" in str(caught.value)


def test_recall_settings_are_checked():
    with pytest.raises(PatchError, match="budgets must be multiples of 64 from 128 up"):
        Settings((100,))
    with pytest.raises(PatchError, match="query blocks"):
        Settings(query_blocks=0)


def test_bench_recall(folder, tmp_path):
    out, plot, text = tmp_path / "recall.json", tmp_path / "recall.svg", tmp_path / "texts"
    text.mkdir()
    for name in ("a", "b"):
        (text / f"{name}.txt").write_text("".join(f"{name} {i} is a number. " for i in range(60)))
    arguments = ["bench", "recall", "--model", str(folder), "--length", "700", "--budget", "192", "--budget", "256"]
    plans = ["--plan", "envelope", "--plan", "sink_window", "--text", str(text), "--device", "cpu"]
    drawn = is_available("matplotlib")
    done = CliRunner().invoke(app, [*arguments, *plans, "--json", str(out), *(["--plot", str(plot)] if drawn else [])])
    assert done.exit_code == 0, done.output
    document = json.loads(out.read_text())
    assert document["benchmark"] == "recall" and document["tokens"] == [700, 700] and document["text"] == "texts"
    assert {r["plan"] for r in document["results"]} == {"envelope", "sink_window", "oracle", "random"}
    assert str(tmp_path) not in out.read_text() and "--budget 192 --budget 256" in document["command"]
    drawing = plot.read_text() if drawn else ""
    for words in ("envelope", "oracle", "192 tokens per query block", "256 tokens per query block", "layer"):
        assert words in drawing or not drawn
    assert "tokens read" in done.stdout and "oracle" in done.stdout

    short = CliRunner().invoke(app, [*arguments[:5], "9000", *plans])
    assert short.exit_code == 2 and "shorter than 9000 tokens: a.txt, b.txt" in " ".join(short.output.split())


def test_a_plot_needs_a_known_suffix(tmp_path):
    with pytest.raises(PatchError, match=r"ends in .png, .svg, .pdf; got .*recall.xlsx"):
        recall_plot.check(tmp_path / "recall.xlsx")


def test_a_plot_needs_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr("infer_patch.availability.installed_version", lambda name: None)
    with pytest.raises(MissingDependencyError, match="Plotting needs the package 'matplotlib'"):
        recall_plot.check(tmp_path / "recall.png")


def test_lines_are_told_apart_without_colour():
    names = [*"abcdefghij", "oracle", "random"]
    styles = recall_plot._styles(names)
    assert len({(s.get("marker"), s["linestyle"]) for s in styles.values()}) == len(names)
