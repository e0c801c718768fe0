"""`bench prefill` and `bench decode`: what runs, what is counted, what is said about it. No time is tested."""

import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from infer_patch.cli import app
from infer_patch.errors import PatchError, PlanError
from infer_patch.evals import attention_sides as sides
from infer_patch.evals.attention_bench import Settings, measure, smaller_caches, starts_to_win, warnings_of
from infer_patch.evals.attention_rounds import Rounds
from infer_patch.evals.budgets import BUDGETS, always_sparse, budget_for_share, default_plans, with_budget
from infer_patch.evals.stopwatch import Stopwatch
from infer_patch.evals.transformers_caches import CacheSide, held_bytes, installed
from infer_patch.kernels.block_mask import BlockMask, causal_blocks
from infer_patch.kernels.block_sparse_attention import block_sparse_attention, token_mask
from infer_patch.kernels.dense_attention import dense_attention
from infer_patch.patches import Envelope, KVQuant, SinkWindow, VerticalSlash, ZipVL
from infer_patch.plan import Plan

CPU, FP32 = torch.device("cpu"), torch.float32
SMALL = {"heads": 4, "kv_heads": 2, "head_dim": 16, "layers": 6, "rounds": 1, "steps": 3}
WINDOW = Plan((SinkWindow(window=65, dense_below=0),), "window")
ENVELOPE = Plan((Envelope(budget=192, dense_below=0),), "envelope")
EVICTING = Plan((SinkWindow(window=64, evict=True),), "evicting")


def tensors(keys, queries=None, seed=0, heads=4):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads, queries or keys, 16, generator=generator)
    return q, *(torch.randn(2, 2, keys, 16, generator=generator) for _ in range(2))


def plan_side(plan, layer=None):
    return sides.PlanSide(plan, sides.llama_parts(4, 2, 16, 6, 4096), Stopwatch(CPU), layer)


def by_side(found):
    return {(r["length"], r["side"]): r for r in found["results"]}


def test_prefill_results():
    found = measure([WINDOW, ENVELOPE], Settings("prefill", (128, 640), **SMALL), CPU, FP32)
    json.dumps(found)
    rows = by_side(found)
    assert [side for _, side in rows] == ["dense", "dense again", "window", "envelope"] * 2
    assert rows[128, "envelope"]["ran_dense"] == "the budget covers every key"
    assert rows[128, "envelope"]["kept_share"] == 1 and rows[128, "dense"]["kept_share"] == 1
    for name in ("window", "envelope"):  # three blocks of 64 at most: 1 + 2 + 3 * 8 of 55
        row = rows[640, name]
        assert row["ran_dense"] is None and row["kept_share"] == pytest.approx(27 / 55, abs=1e-4)
        assert row["efficiency"] == pytest.approx(row["kept_share"] / row["ratio"]["median"], abs=1e-3)
        assert 0 < row["selection_ms"] < row["milliseconds"]["median"]
        assert row["selection_ms"] + row["attention_ms"] == pytest.approx(row["milliseconds"]["median"], abs=1e-3)
        assert row["plan"]["methods"][0]["method"] in ("sink_window", "envelope")
    assert rows[640, "dense"]["ratio"]["median"] == 1 and rows[640, "dense"]["selection_ms"] is None
    assert set(found["starts_to_win"]) == {"window", "envelope"}
    assert {s["side"] for s in found["skipped"]} == {"flash-attn", "flex_attention"}


def test_decode_results():
    plans = [WINDOW, ENVELOPE, EVICTING, Plan((VerticalSlash(),), "slash")]
    found = measure(plans, Settings("decode", (640,), **SMALL), CPU, FP32)
    rows = by_side(found)
    assert [side for _, side in rows][-1] == "dense, folded"
    # 641 keys: 3 of 11 blocks for a window of 65 and for a budget of 192
    assert rows[640, "window"]["kept_share"] == rows[640, "envelope"]["kept_share"] == pytest.approx(3 / 11, abs=1e-4)
    assert rows[640, "evicting"]["ran_dense"] is None
    assert "decoding is dense" in rows[640, "slash"]["ran_dense"]
    assert all(len(row["raw_milliseconds"]) == 1 and row["first_step_ms"] > 0 for row in rows.values())


def test_decode_with_the_cache_in_the_time():
    quantised = Plan((KVQuant(),), "4 bits")
    found = measure([WINDOW, quantised], Settings("decode", (640,), with_cache=True, **SMALL), CPU, FP32)
    rows = by_side(found)
    assert [side for _, side in rows][:4] == ["dense", "dense again", "window", "4 bits"]
    assert (640, "dense, folded") not in rows
    assert rows[640, "dense"]["cache_bytes"] == 2 * 2 * 642 * 16 * 4
    assert rows[640, "4 bits"]["cache_bytes"] < 0.6 * rows[640, "dense"]["cache_bytes"]
    others = {"quanto, 4 bits", "quanto, 2 bits", "hqq, 4 bits", "hqq, 2 bits"}
    skipped = {s["side"] for s in found["skipped"]}
    assert others <= skipped | {side for _, side in rows}  # they run where their packages are installed
    with pytest.raises(PatchError, match="with_cache is for decode"):
        Settings("prefill", with_cache=True)


def test_a_cache_layer_of_transformers_grows_inside_the_timed_part(monkeypatch):
    marks = []
    monkeypatch.setattr(Stopwatch, "mark", lambda self: marks.append("mark") or float(len(marks)))
    monkeypatch.setattr(CacheSide, "extend", lambda self, k, v, keys: marks.append(f"extend {keys}"))
    monkeypatch.setattr(CacheSide, "attend", lambda self, q: marks.append("attend"))
    for with_cache, expected in (
        (True, ["mark", "extend 9", "attend", "mark"]),
        (False, ["extend 9", "mark", "attend", "mark"]),
    ):
        bench = Rounds(Settings("decode", (8,), with_cache=with_cache, **SMALL), 8, [], Stopwatch(CPU), CPU, FP32)
        marks.clear()
        bench._timed(CacheSide("dense"), bench.q[:, :, :1], 9)
        assert marks == expected


def test_a_cache_side_is_dense_attention_over_all_tokens():
    q, k, v = tensors(40, queries=3)
    side = CacheSide("dense")
    side.start()
    side.extend(k, v, 37)
    for step in range(3):
        side.extend(k, v, 38 + step)
        seen = slice(0, 38 + step)
        expected = dense_attention(q[:, :, step : step + 1], k[:, :, seen], v[:, :, seen], 0.25).transpose(1, 2)
        torch.testing.assert_close(side.attend(q[:, :, step : step + 1]), expected, atol=1e-5, rtol=1e-5)
    assert side.cache_bytes() == 2 * k.numel() * 4
    side.start()
    side.extend(k, v, 5)
    assert side.k.shape[2] == 5


def test_bytes_count_every_tensor_once():
    x, y = torch.zeros(3), torch.zeros(2, dtype=torch.int8)
    assert held_bytes(SimpleNamespace(a=x, b=(x, {"scale": y}), name="x")) == 14
    assert held_bytes(SimpleNamespace(nbytes=lambda: 5)) == 5
    assert not installed("no_such_package.inside") and installed("torch.nn")


@pytest.mark.parametrize("plan", [WINDOW, ENVELOPE], ids=lambda plan: plan.name)
def test_a_plan_computes_what_its_lists_say(plan):
    q, k, v = tensors(640)
    side = plan_side(plan)
    side.start()
    side.extend(k, v, 640)
    out = side.attend(q)
    assert isinstance(side.choice, BlockMask) and len(side.selection) == 1
    expected = block_sparse_attention(q, k, v, side.choice, implementation="reference").transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert out.is_contiguous()


def test_decode_steps_share_one_state():
    q, k, v = tensors(660, queries=20)
    side = plan_side(ENVELOPE)
    side.start()
    side.extend(k, v, 640)
    states = []
    for step in range(20):
        side.extend(k, v, 641 + step)
        out = side.attend(q[:, :, step : step + 1])
        seen = token_mask(side.choice, 4, 1, 641 + step)
        keys, values = (x[:, :, : 641 + step].repeat_interleave(2, 1) for x in (k, v))
        scores = (q[:, :, step : step + 1] @ keys.transpose(-1, -2) / 4).masked_fill(~seen, float("-inf"))
        torch.testing.assert_close(out, (scores.softmax(-1) @ values).transpose(1, 2), atol=1e-5, rtol=1e-5)
        states.append(next(iter(side._held.state.values())))
    assert all(state is states[0] for state in states) and states[0]
    side.start()
    assert not side._held.state


def test_dense_forms_agree():
    q, k, v = tensors(300)
    expected = dense_attention(q, k, v, 0.25).transpose(1, 2)
    torch.testing.assert_close(sides.sdpa(q, k, v), expected, atol=1e-5, rtol=1e-5)
    new = q[:, :, -1:]
    for kernel in (sides.sdpa, sides.folded_sdpa):
        torch.testing.assert_close(kernel(new, k, v), expected[:, -1:], atol=1e-5, rtol=1e-5)
    assert sides.why_no_flash_attn(q) is not None


def test_a_fallback_is_dense_attention():
    q, k, v = tensors(128)
    side = plan_side(Plan((SinkWindow(),)))
    side.start()
    side.extend(k, v, 128)
    torch.testing.assert_close(side.attend(q), sides.sdpa(q, k, v))
    assert side.choice == "at most 2048 keys"


@pytest.mark.parametrize("length, heads_of_lists", [(640, 2), (600, 1), (65, 4)])
def test_lists_for_flex_attention(length, heads_of_lists):
    generator = torch.Generator().manual_seed(1)
    n = -(-length // 64)
    listed = (torch.rand(2, heads_of_lists, n, n, generator=generator) < 0.5).tril() | torch.eye(n, dtype=torch.bool)
    idx = torch.where(listed, torch.arange(n), 10**6).sort(-1).values
    mask = BlockMask(idx, listed.sum(-1))
    found = sides.flex_mask(mask, 2, 4, length)
    assert torch.equal(found.to_dense().bool(), listed.repeat_interleave(4 // heads_of_lists, 1))
    assert torch.equal(found.kv_num_blocks, torch.ones(2, 4, n, dtype=torch.int32))  # the diagonal is masked, no other
    assert torch.equal(found.kv_indices[..., 0], torch.arange(n).expand(2, 4, -1).int())


@pytest.mark.slow
def test_flex_attention_computes_what_the_lists_say():
    q, k, v = tensors(640)
    plan = plan_side(ENVELOPE)
    plan.start()
    plan.extend(k, v, 640)
    expected = plan.attend(q)
    flex = sides.Flex(plan)
    flex.extend(k, v, 640)
    torch.testing.assert_close(flex.attend(q), expected, atol=1e-4, rtol=1e-4)
    assert flex.kept_share == plan.kept_share()


def test_flex_says_why_it_cannot():
    found = measure([ENVELOPE], Settings("prefill", (128,), flex=True, **SMALL), CPU, FP32)
    reasons = {s["side"]: s["reason"] for s in found["skipped"]}
    assert "the budget covers every key" in reasons["flex: envelope"]


def row(length, median, side="p", kind="plan", ran_dense=None):
    return {"length": length, "side": side, "kind": kind, "ran_dense": ran_dense, "ratio": {"median": median}}


@pytest.mark.parametrize(
    "ratios, start",
    [([1.5, 0.9, 0.5], 2), ([0.9, 1.1, 0.5], 3), ([0.9, 0.8, 1.1], None), ([0.5, 0.4, 0.3], 1)],
)
def test_where_a_plan_starts_to_win(ratios, start):
    results = [row(i + 1, ratio) for i, ratio in enumerate(ratios)]
    assert starts_to_win([*results, row(1, 1.0, "dense", "dense")]) == {"p": start}


def test_a_dense_run_is_no_win_and_no_loss():
    results = [row(1, 0.9, ran_dense="short"), row(2, 0.8)]
    assert starts_to_win(results) == {"p": 2}
    assert starts_to_win([row(1, 0.9, ran_dense="short")]) == {"p": None}
    assert warnings_of([row(1, 1.2, ran_dense="short"), row(2048, 1.25)]) == [
        "p is slower than dense at 2,048 tokens (1.25 times its time)"
    ]


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"phase": "both"}, "phase"),
        ({"lengths": (1,)}, "lengths"),
        ({"lengths": (64, 64)}, "different"),
        ({"rounds": 0}, "rounds 0"),
        ({"keep": 1.5}, "keep must be a share"),
        ({"keep": 0.1, "budget": 256}, "not both"),
    ],
)
def test_settings_are_checked(settings, complaint):
    with pytest.raises(PatchError, match=complaint):
        Settings(**{"phase": "prefill", **settings})


def test_what_does_not_go_together_is_refused_before_timing():
    with pytest.raises(PatchError, match="heads must be a multiple of kv-heads, got 5 and 2"):
        measure([WINDOW], Settings("prefill", (128,), heads=5, kv_heads=2), CPU, FP32)
    with pytest.raises(PatchError, match="different names"):
        measure([WINDOW, WINDOW], Settings("prefill", (128,)), CPU, FP32)
    with pytest.raises(PlanError, match="identity selects nothing"):
        measure([Plan()], Settings("prefill", (128,)), CPU, FP32)
    with pytest.raises(PlanError, match="window does not act on layer 9; it acts on 0, 1"):
        measure([WINDOW], Settings("prefill", (128,), layer=9, layers=6), CPU, FP32)
    with pytest.raises(PatchError, match="clock must be wall or cpu"):
        Stopwatch(CPU, "sundial")
    with pytest.raises(PatchError, match="does not see the work of a GPU"):
        Stopwatch(torch.device("cuda"), "cpu")


@pytest.mark.parametrize("name", default_plans())
@pytest.mark.parametrize("budget", [256, 512, 1024])
def test_budgets_on_random_tensors(name, budget):
    """Fixed lists are as long as the budget; searched ones no longer, but for HiP, whose pieces scatter here."""
    keys = 2560
    q, k, v = tensors(keys, 64, heads=2)
    side = sides.PlanSide(
        with_budget(always_sparse(Plan.preset(name)), budget, clustered=False),
        sides.llama_parts(2, 2, 16, 6, 4096),
        Stopwatch(CPU),
    )
    side.start()
    side.extend(k, v, keys)
    side.attend(q)
    read = side.choice.count.float().mean() * 64
    if name in ("envelope", "sink_window"):
        assert read == budget
    elif name == "vertical_slash":
        assert 256 <= read <= budget
    else:
        assert read >= budget / 2


def test_budgets_that_cannot_be_kept_are_refused():
    with pytest.raises(PlanError, match="a multiple of 64 tokens, got 100"):
        with_budget(ENVELOPE, 100)
    for name in default_plans():
        with pytest.raises(PlanError, match=f"{name} cannot keep to a budget of 64 tokens"):
            with_budget(Plan.preset(name), 64)
    with pytest.raises(PlanError, match="not known which option of strange is its budget; methods with one: envelope"):
        with_budget(Plan((Strange(),), "strange"), 256)


class Strange(SinkWindow):
    name = "strange"


def test_a_share_is_turned_into_a_budget():
    assert budget_for_share(0.1, 8192, 8192) == 7 * 64
    assert budget_for_share(0.1, 1, 32768) == 51 * 64
    assert budget_for_share(0.1, 1024, 1024) == 4 * 64  # at least four blocks
    assert budget_for_share(1.0, 640, 640) == 640
    for queries, keys in ((6400, 6400), (640, 6400)):
        first, last = (keys - queries) // 64, keys // 64
        most = budget_for_share(0.3, queries, keys) // 64
        share = sum(min(i, most) for i in range(first + 1, last + 1)) / causal_blocks(queries, keys, 64, 64)
        assert share == pytest.approx(0.3, abs=0.01)


def test_default_plans_have_budgets():
    names = default_plans()
    assert {"envelope", "sink_window", "vertical_slash"} <= set(names) and "sink_window-evict" not in names
    assert all(m.name in BUDGETS for name in names for m in Plan.preset(name))


# The commands

SIZES = ["--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--layers", "6", "--rounds", "1", "--device", "cpu"]


def call(*arguments, code=0):
    done = CliRunner().invoke(app, ["bench", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done


def test_bench_prefill(tmp_path):
    out, plan = tmp_path / "prefill.json", tmp_path / "narrow.yaml"
    WINDOW.save(plan)
    text = call(
        "prefill", *SIZES, "--lengths", "128,640", "--plan", "envelope", "--plan", str(plan), "--json", str(out)
    ).stdout
    document = json.loads(out.read_text())
    assert document["benchmark"] == "prefill" and document["schema"] == 1 and document["machine"]["versions"]["torch"]
    assert document["settings"]["heads"] == 4 and len(document["results"]) == 8
    assert "--plan envelope --plan narrow.yaml" in document["command"] and str(tmp_path) not in out.read_text()
    assert all(len(line) <= 80 for line in text.splitlines())
    flat = " ".join(text.split())
    assert "640 tokens" in flat and "dense again" in flat
    assert "envelope ran dense at 640 tokens: the budget covers every key." in flat
    assert "envelope is faster than dense: never within the measured lengths." in flat
    assert "Not timed: flash-attn" in flat


def test_bench_decode_with_a_share():
    arguments = ("--lengths", "1280", "--steps", "2", "--keep", "0.25", "--force", "--dtype", "bfloat16", "--json", "-")
    document = json.loads(call("decode", *SIZES, *arguments).stdout.splitlines()[-1])
    rows = {r["side"]: r for r in document["results"]}
    assert document["dtype"] == "bfloat16" and set(default_plans()) < set(rows)
    assert rows["sink_window"]["kept_share"] == rows["envelope"]["kept_share"] == pytest.approx(5 / 21, abs=1e-4)


def test_packed_caches_stand_beside_the_others():
    plans = [Plan((KVQuant(window=32, recent=32),), "packed"), Plan((ZipVL(window=32, recent=32),), "zipped"), EVICTING]
    rows = by_side(measure(plans, Settings("decode", (640,), **SMALL), CPU, FP32))
    whole = rows[640, "dense"]["cache_bytes"]
    for name in ("packed", "zipped"):
        assert rows[640, name]["ran_dense"] is None and rows[640, name]["kept_share"] is None
        assert 0 < rows[640, name]["cache_bytes"] < 0.5 * whole  # recent tokens and head size 16 weigh a lot
    said = smaller_caches(list(rows.values()))
    assert len(said) == 3 and said[0].startswith("packed at 640 tokens: a cache layer of ")


def test_bench_refuses_in_one_line(tmp_path):
    assert "numbers with commas" in call("prefill", "--lengths", "many", code=2).output
    assert "not both" in call("decode", "--keep", "0.1", "--budget", "256", code=2).output
    gone = str(tmp_path / "gone" / "x.json")
    assert "its folder does not exist" in " ".join(call("prefill", "--json", gone, code=2).output.split())
