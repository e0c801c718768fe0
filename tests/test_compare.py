"""Comparisons on a miniature: drift, order, proof of effect, verdicts and what is left when a run breaks off."""

import json

import pytest
import torch
from miniatures import MINIATURES, text_inputs, vision_inputs

from infer_patch import PatchError, Plan, is_patched
from infer_patch.evals import drift
from infer_patch.evals.compare import Settings, compare
from infer_patch.evals.cost import Measurement, costs, interval, overlap, rotated
from infer_patch.evals.prompts import Prompt, encode, prompt_hash
from infer_patch.evals.summary import OTHER_BACKEND, REPEATED
from infer_patch.evals.verdict import never_took_effect
from infer_patch.patches import Envelope, FastV, SinkWindow

LLAMA = MINIATURES["llama"]
QUICK = Settings(max_new_tokens=5, rounds=1, warm_up=False)
WINDOW = Plan((SinkWindow(window=64, dense_below=0),), "window")
EVICT = Plan((SinkWindow(window=64, evict=True),), "evict")
LAZY = Plan((Envelope(budget=1024),), "lazy")  # covers all of the prompts here


class Words:
    """Stands for a tokenizer: token 7 is the word w7."""

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(f"w{i}" for i in ids)


@pytest.fixture(scope="module")
def model():
    return LLAMA.build()


def prompts(count=1, **values):
    return [Prompt(inputs=text_inputs(LLAMA, lengths=(300,) * count, only=i), **values) for i in range(count)]


def run(model, plans, settings=QUICK, on=None, **values):
    return compare(model, Words(), plans, on or prompts(), settings, **values)


def row(comparison, name):
    return next(r for r in comparison.summary["rows"] if r["name"] == name)


def test_unpatched_against_itself_is_exactly_zero(model):
    found = run(model, [Plan()], on=prompts(2))
    for name in ("identity", REPEATED):
        assert row(found, name)["drift"] == {
            "tokens": 10,
            "kl_mean": 0,
            "kl_p99": 0,
            "top1": 1,
            "max_logit_gap": 0,
        }
    floor = row(found, OTHER_BACKEND)["drift"]
    assert 0 < floor["max_logit_gap"] < 1e-3 and floor["kl_mean"] < 1e-6
    assert row(found, "identity")["identical"] == {"count": 2, "of": 2} and not found.failed
    assert "same output as unpatched, to the last bit" in found.verdicts["identity"]


def test_the_order_of_plans_changes_no_output(model):
    forth, back = (run(model, plans, on=prompts(2)) for plans in ([WINDOW, EVICT, LAZY], [LAZY, EVICT, WINDOW]))

    def results(comparison):
        return {(s["plan"], s["prompt"]): (s["output_ids"], s["drift"], s["effect"]) for s in comparison.samples}

    assert results(forth) == results(back) and len(results(forth)) == 8


def test_drift_reads_the_reference_through_the_cache(model):
    """What `compare` calls drift is that of a plain loop: prefill, then the unpatched tokens one by one."""
    import infer_patch

    found = run(model, [EVICT])
    unpatched, evict = found.samples
    assert evict["output_ids"] != unpatched["output_ids"] and evict["first_difference"] is not None
    inputs = prompts()[0].inputs
    logits = {}
    for name in ("unpatched", "evict"):
        handle = infer_patch.patch(model, EVICT) if name == "evict" else None
        with torch.no_grad():
            out = model(**inputs, use_cache=True)
            steps = [out.logits[:, -1]]
            for token in unpatched["output_ids"][:-1]:
                out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
                steps.append(out.logits[:, -1])
        logits[name] = torch.cat(steps)
        if handle is not None:
            handle.remove()
    expected = drift.pool([drift.distances(logits["unpatched"], logits["evict"])])
    assert expected is not None and row(found, "evict")["drift"] == pytest.approx(expected, rel=1e-3)


def test_a_plan_that_never_fires_fails_unless_it_may(model):
    found = run(model, [LAZY, WINDOW])
    assert found.failed == ["lazy"]
    assert "FAILED" in found.verdicts["lazy"] and "never took effect" in found.verdicts["lazy"]
    assert "the budget covers every key" in found.verdicts["lazy"]
    allowed = run(model, [LAZY], Settings(max_new_tokens=3, rounds=1, warm_up=False, may_stay_dense=("lazy",)))
    assert allowed.failed == [] and row(allowed, "lazy")["status"] == "dense"
    assert "ran dense throughout (the budget covers every key)" in allowed.verdicts["lazy"]
    assert "to the last bit" in allowed.verdicts["lazy"]


def test_the_verdict_on_a_plan_that_corrected_nothing_says_why():
    counts = {"corrected": {}, "left_alone": {"no visual token is a sink": 10}}
    fired = {"count": 0, "of": 1}
    said = never_took_effect([{"method": "var", "fired": fired, "words": "", "figures": counts}])
    assert "var (10 attention calls were left as they are: no visual token is a sink) never took effect" in said
    assert "something to correct" in said and "longer prompts" not in said


def test_one_silent_method_of_two_is_named(model):
    both = Plan((SinkWindow(window=64, evict=True, layers=(0, 1)), Envelope(budget=1024, layers=(2, 3))), "both")
    found = run(model, [both])
    assert found.failed == ["both"] and "envelope (" in found.verdicts["both"]
    assert "sink_window" not in found.verdicts["both"]


def test_a_plan_that_fires_now_and_then_says_so(model):
    on = [*prompts(), Prompt(inputs=text_inputs(LLAMA, (40,)))]
    found = run(model, [WINDOW], on=on)
    assert not found.failed and "sink_window took effect on 1 of 2 prompts only" in found.verdicts["window"]


def test_answers_cache_and_flags(model):
    first = run(model, [EVICT]).samples[0]
    found = run(model, [EVICT], on=prompts(answer=first["output"].split()[0].upper()))
    assert row(found, "unpatched")["found"] == {"count": 1, "of": 1}
    assert row(found, "evict")["found"]["count"] in (0, 1)
    assert ("finds 0 of 1 (unpatched 1)" in found.verdicts["evict"]) == (row(found, "evict")["found"]["count"] == 0)
    cost = row(found, "evict")["cost"][0]
    assert cost["cache_bytes"] < row(found, "unpatched")["cost"][0]["cache_bytes"]
    assert "instead of" in found.verdicts["evict"] and "measured once: too few to judge" in found.verdicts["evict"]
    assert not is_patched(model)


def test_every_speed_word_names_the_length(model):
    found = run(model, [WINDOW], Settings(max_new_tokens=4, rounds=3))
    assert row(found, "window")["cost"][0]["first_token_s"]["n"] == 3
    words = [w for w in found.verdicts["window"].split("; ") if "prefill" in w or "decode" in w]
    assert len(words) == 2 and "at 300 tokens" in words[0] and "at this length" in words[1]


def test_pictures(tmp_path):
    mini = MINIATURES["llava"]
    model = mini.build()
    prompt = Prompt("what is it?", inputs=vision_inputs(mini, images=(1,)))
    found = run(model, [Plan((FastV(layer=1),), "fastv")], on=[prompt], out=tmp_path)
    figures = row(found, "fastv")["effect"][0]["figures"]
    assert figures["visual_tokens_kept"] == {"1": 8} and figures["visual_tokens"] == {"1": 16}
    assert "Visual tokens kept" in found.page.read_text()


def test_a_broken_run_leaves_a_failed_manifest(model, tmp_path, monkeypatch):
    seen = {}

    def breaks(*args, **kwargs):
        seen.update(json.loads((tmp_path / "manifest.json").read_text()))
        raise RuntimeError("the machine caught fire")

    monkeypatch.setattr("infer_patch.evals.session.generate", breaks)
    with pytest.raises(RuntimeError, match="caught fire"):
        run(model, [WINDOW], out=tmp_path, command="infer-patch compare x")
    assert seen["status"] == "running" and seen["plans"] == [WINDOW.to_dict()]
    assert seen["command"] == "infer-patch compare x" and seen["model"]["parameters"] > 0
    left = json.loads((tmp_path / "manifest.json").read_text())
    assert left["status"] == "failed" and left["error"] == "RuntimeError: the machine caught fire"
    assert not is_patched(model) and not (tmp_path / "summary.json").exists()


def test_progress_counts_to_its_total(model):
    told = []
    run(model, [WINDOW], on=prompts(2), on_progress=lambda *step: told.append(step))
    assert [done for done, _, _ in told] == list(range(len(told)))
    assert {total for _, total, _ in told} == {told[-1][0]} and told[-1][2] == "done"


@pytest.mark.parametrize(
    ("plans", "on", "words"),
    [
        ([], None, "at least one plan"),
        ([WINDOW, WINDOW], None, "window stands for more than one"),
        ([Plan(name="unpatched")], None, "different names"),
        ([Plan(name="a b"), Plan(name="a-b")], None, "a-b stands for more than one"),
        ([WINDOW], prompts(2, name="twin"), "twin stands for more than one"),
        ([Plan((FastV(),))], None, "fastv"),
        ([WINDOW], [Prompt()], "empty"),
        ([WINDOW], [Prompt(input_ids=(9,) * 4000)], "4,000 tokens"),
        ([WINDOW], [Prompt("look", images=("picture",))], "takes text only"),
        ([WINDOW], [Prompt(inputs=text_inputs(LLAMA))], "one row of tokens"),
    ],
)
def test_refusals_come_before_anything_is_written(model, tmp_path, plans, on, words):
    with pytest.raises(PatchError, match=words):
        run(model, plans, on=on, out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not is_patched(model)


def test_chat_template_is_asked_for_in_vain(model):
    with pytest.raises(PatchError, match="no chat template"):
        encode(Prompt("hello"), Words(), model, chat=True)


def test_prompt_hash_is_that_of_the_inputs(model):
    a, b = (encode(p, Words(), model) for p in prompts(2))
    assert prompt_hash(a) == prompt_hash(dict(reversed(a.items()))) != prompt_hash(b)


def test_first_difference():
    assert drift.first_difference([1, 2, 3], [1, 2, 3]) is None
    assert drift.first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert drift.first_difference([1, 2, 3], [1, 2]) == 2


def test_distances_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    found = drift.distances(p.log(), q.log())
    assert found.kl[0] == pytest.approx(0.5 * torch.log(torch.tensor(4 / 3)).item())
    assert found.gap[0] == pytest.approx(torch.log(torch.tensor(2.0)).item()) and found.top1 == [False]
    masked = torch.tensor([[0.0, -torch.inf]])
    assert drift.distances(masked, masked) == drift.Distances([0.0], [True], [0.0])


def test_costs_by_length_and_against_the_first():
    times = {"unpatched": 2.0, "half": 1.0}
    measured = [Measurement(n, t, 4, s, s, None, 10) for n, s in times.items() for t in (1000, 980, 100)]
    table = costs(measured, list(times), rough=True)
    assert [c["prompt_tokens"] for c in table["half"]] == [990, 100]
    assert table["half"][0]["first_token_ratio"] == 0.5 and table["unpatched"][0]["first_token_ratio"] is None


def test_intervals_and_turns():
    assert interval([1, 2, 3, 4, 5, 6]) == {"median": 3.5, "p20": 2.0, "p80": 5.0, "low": 1, "high": 6, "n": 6}
    assert overlap(interval([1, 2, 3]), interval([2, 3, 4])) and not overlap(interval([1, 2]), interval([3, 4]))
    apart = interval([*range(10), 100]), interval([*range(20, 30), 0])  # but for an outlier each
    assert not overlap(*apart) and overlap(interval([1, 2, 9]), interval([5, 5, 5]))
    assert [rotated("abc", turn) for turn in range(4)] == [list(x) for x in ("abc", "bca", "cab", "abc")]
