"""ACT: the formula and its invariants, rows that come later, what is kept of a sample, head lists, refusals."""

import json
from types import SimpleNamespace

import pytest
import torch
from miniatures import GREEDY, MINIATURES, text_inputs

import infer_patch
from infer_patch import column_sums
from infer_patch.errors import PlanError, UnsupportedCallError, UnsupportedModelError
from infer_patch.head_lists import read_heads
from infer_patch.kernels.calibrated_attention import lowered_probabilities
from infer_patch.patches import ACT, SinkWindow
from infer_patch.patches.act import find_sinks, received_attention, without_spared
from infer_patch.run import AttentionCall

HEADS, KV_HEADS, CHOSEN = 6, 2, (0, 2, 4)
PARTS = SimpleNamespace(num_heads=HEADS, num_kv_heads=KV_HEADS)
LOW = dict(threshold=0.06, heads=tuple((0, h) for h in CHOSEN))


def draw(rows=40, seed=0, batch=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shape = batch, rows, 16
    q = torch.randn(shape[0], HEADS, *shape[1:], generator=g) * 1.5
    k, v = (torch.randn(shape[0], KV_HEADS, *shape[1:], generator=g) for _ in range(2))
    return tuple(x.to(dtype) for x in (q, k, v))


def attention(q, k, first=0):
    """Probabilities of rows first.. in double, [b, H, T, S]."""
    rows, keys = q.shape[2], k.shape[2]
    z = q.double() @ k.double().repeat_interleave(HEADS // KV_HEADS, 1).transpose(-1, -2) / 4
    seen = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    return z.masked_fill(~seen, float("-inf")).softmax(-1)[:, :, first:]


def published(a, method, listed=None):
    """One head's square map, step by step as in the paper: [T, T] -> [T, T]."""
    keys = a.shape[0]
    received = [sum(float(a[i, j]) for i in range(j, keys)) / (keys - j) for j in range(keys)]
    threshold = method.threshold / (keys if method.threshold_mode == "relative" else 1)
    sinks = [j for j in range(keys) if received[j] > threshold and keys - j >= method.min_queries]
    rest = [j for j in sinks if j > 0] if method.spare == "first_token" else sinks[1:]
    new = a.clone()
    for i in range(keys):
        b = sum(float(a[i, j]) for j in rest)
        if 1 - b <= 0:
            continue
        for j in range(keys):
            new[i, j] = method.beta * a[i, j] if j in rest else a[i, j] * (1 + (1 - method.beta) * b / (1 - b))
    return new, rest


def call(q, k, v, rows, memory, until=None):
    """The call that brings the last `rows` of the first `until` tokens."""
    until = k.shape[2] if until is None else until
    return AttentionCall(
        q=q[:, :, until - rows : until],
        k=k[:, :, :until],
        v=v[:, :, :until],
        scale=0.25,
        samples=list(range(len(q))),
        tokens=None,
        positions=None,
        memory=memory,
    )


def run(method, inputs, splits, runtime=None, memory=None):
    """Corrected outputs of tokens that come in `splits`, and what was counted."""
    q, k, v = inputs
    runtime = runtime or method.runtime(PARTS, (0,))
    memory = memory or [{} for _ in range(len(q))]
    outputs, until = [], 0
    for rows in splits:
        until += rows
        this = call(q, k, v, rows, memory, until)
        plain = (attention(this.q, this.k) @ this.v.double().repeat_interleave(3, 1)).to(q.dtype)
        found = runtime.calibrate(0, this, plain)
        outputs.append(plain if isinstance(found, str) else found)
    return torch.cat(outputs, 2), this.counts, memory


OPTIONS = [
    dict(LOW),
    dict(LOW, beta=0.0),
    dict(LOW, threshold=2.0, threshold_mode="relative"),
    dict(LOW, spare="first_token"),
    dict(LOW, min_queries=6),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_prompt_equals_the_published_steps(options):
    method, (q, k, v) = ACT(**options), draw()
    found, counts, _ = run(method, (q, k, v), [40])
    a, wide = attention(q, k), v.double().repeat_interleave(3, 1)
    columns = 0
    for sample in range(2):
        for head in range(HEADS):
            new, rest = published(a[sample, head], method) if head in CHOSEN else (a[sample, head], [])
            columns += len(rest)
            torch.testing.assert_close(found[sample, head], (new @ wide[sample, head]).float(), atol=1e-5, rtol=1e-4)
    assert columns == int(counts["calibrated_columns"]) > 6
    assert 0 < int(counts["rows"]) < 2 * len(CHOSEN) * 40


def test_invariants_of_the_formula():
    q, k, _ = draw()
    a = attention(q, k).float()
    seen_by = torch.arange(40, 0, -1)
    received = received_attention(a.sum(2), seen_by)
    torch.testing.assert_close(received[..., 0], a[..., 0].mean(-1))
    calibrated = without_spared(find_sinks(received, seen_by, 0.06))
    assert (calibrated.sum(-1) == find_sinks(received, seen_by, 0.06).sum(-1) - 1).all()
    new = lowered_probabilities(a, calibrated[:, :, None], 0.4)[0]
    torch.testing.assert_close(new.sum(-1), torch.ones_like(new.sum(-1)))
    assert (new.triu(1) == 0).all()
    assert torch.equal(new[:, :, 0], a[:, :, 0])
    ratio, listed = new / a.clamp(min=1e-30), calibrated[:, :, None].expand_as(a)
    torch.testing.assert_close(ratio[listed & (a > 0)], torch.full_like(ratio[listed & (a > 0)], 0.4))
    elsewhere = ratio.masked_fill(listed | (a == 0), float("nan"))
    low, high = elsewhere.nan_to_num(9e9).amin(-1), elsewhere.nan_to_num(-1.0).amax(-1)
    torch.testing.assert_close(low, high)
    assert (high >= 1 - 1e-6).all()
    assert torch.equal(lowered_probabilities(a, calibrated[:, :, None], 1.0)[0], a)
    one = torch.zeros_like(calibrated)
    one[..., 7] = True
    assert torch.equal(lowered_probabilities(a, without_spared(one)[:, :, None], 0.4)[0], a)


def test_a_row_with_everything_on_calibrated_keys_is_left_alone():
    a = torch.tensor([[[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.2, 0.5, 0.3]]]])
    new = lowered_probabilities(a, torch.tensor([[[[False, True, False]]]]), 0.5)[0]
    torch.testing.assert_close(new[0, 0], torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0.3, 0.25, 0.45]]))


def test_other_heads_keep_every_bit():
    inputs = draw()
    found, _, _ = run(ACT(**LOW), inputs, [40])
    plain = (attention(*inputs[:2]) @ inputs[2].double().repeat_interleave(3, 1)).float()
    others = [h for h in range(HEADS) if h not in CHOSEN]
    assert torch.equal(found[:, others], plain[:, others])
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("splits", [[30, *[1] * 10], [30, 4, 1, 5], [1, 39]])
def test_running_rows_equal_recomputing_for_the_new_row(options, splits):
    """The released code takes the row itself for the column mean, and its rows do not sum to 1."""
    method, (q, k, v) = ACT(**options), draw()
    found, _, _ = run(method, (q, k, v), splits)
    a, wide = attention(q, k), v.double().repeat_interleave(3, 1)
    for row in range(splits[0], 40, 3):
        for sample, head in ((0, 0), (1, 4)):
            new, _ = published(a[sample, head, : row + 1, : row + 1], method)
            torch.testing.assert_close(new[-1].sum(), torch.ones((), dtype=torch.float64))
            expected = (new[-1] @ wide[sample, head, : row + 1]).float()
            torch.testing.assert_close(found[sample, head, row], expected, atol=1e-5, rtol=1e-4)


def test_frozen_rows_use_the_sinks_of_the_prompt():
    method, (q, k, v) = ACT(**LOW, decode="frozen"), draw()
    found, _, _ = run(method, (q, k, v), [30, 1, 4, 1, 4])
    a, wide = attention(q, k), v.double().repeat_interleave(3, 1)
    for head in CHOSEN:
        rest = published(a[0, head, :30, :30], method)[1]
        listed = torch.zeros(1, 1, 40, dtype=torch.bool)
        listed[..., rest] = True
        expected = lowered_probabilities(a[:1, head : head + 1, 30:], listed[:, :, None], 0.4)[0][0, 0] @ wide[0, head]
        torch.testing.assert_close(found[0, head, 30:], expected.float(), atol=1e-5, rtol=1e-4)


def test_off_leaves_later_rows_alone():
    method, inputs = ACT(**LOW, decode="off"), draw()
    found, _, _ = run(method, inputs, [30, 1, 9])
    plain = (attention(*inputs[:2]) @ inputs[2].double().repeat_interleave(3, 1)).float()
    torch.testing.assert_close(found[:, :, 30:], plain[:, :, 30:])
    assert not torch.equal(found[:, :, :30], plain[:, :, :30])


@pytest.mark.parametrize("decode", ["running", "frozen"])
@pytest.mark.parametrize("drafted", [1, 4])
def test_rows_that_are_taken_back_leave_no_trace(decode, drafted):
    method, (q, k, v), (other, _, _) = ACT(**LOW, decode=decode), draw(), draw(seed=9)
    expected, _, _ = run(method, (q, k, v), [30, 2, 1, 1, 6])
    runtime, memory = method.runtime(PARTS, (0,)), [{}, {}]
    run(method, (q, k, v), [30, 2], runtime, memory)
    wrong = [torch.cat([x[:, :, :32], y[:, :, :8]], 2) for x, y in zip((q, k, v), draw(seed=9))]
    for step in range(drafted):  # drafts in one call, or one by one; taken back by a crop of the cache
        runtime.calibrate(0, call(*wrong, 1, memory, 33 + step), other[:, :, :1])
    found = runtime.calibrate(0, call(q, k, v, 8, memory), torch.zeros(2, HEADS, 8, 16))
    again = runtime.calibrate(0, call(q, k, v, 6, memory), expected[:, :, -6:])
    assert again.shape == (2, HEADS, 6, 16) and found.isfinite().all()
    plain = (attention(q, k, 34) @ v.double().repeat_interleave(3, 1)).float()
    torch.testing.assert_close(
        runtime.calibrate(0, call(q, k, v, 6, memory), plain)[:, list(CHOSEN)],
        expected[:, CHOSEN, 34:],
        atol=1e-5,
        rtol=1e-4,
    )


def test_more_taken_back_than_is_known(monkeypatch):
    monkeypatch.setattr(column_sums, "RECENT", 4)
    method, (q, k, v) = ACT(**LOW), draw()
    runtime, memory = method.runtime(PARTS, (0,)), [{}, {}]
    run(method, (q, k, v), [30, 2], runtime, memory)
    with pytest.raises(UnsupportedCallError, match=r"20 tokens were taken back .* Start again"):
        runtime.calibrate(0, call(q, k, v, 1, memory, 13), torch.zeros(2, HEADS, 1, 16))


def test_a_new_prompt_knows_nothing_of_the_last():
    method, inputs = ACT(**LOW), draw()
    expected, _, memory = run(method, inputs, [30, 10])
    runtime = method.runtime(PARTS, (0,))
    run(method, draw(seed=5), [40], runtime, memory)
    found, _, _ = run(method, inputs, [30, 10], runtime, memory)
    assert torch.equal(found, expected)


def test_a_cache_that_was_filled_without_the_plan_is_left_alone():
    q, k, v = draw()
    said = ACT(**LOW).runtime(PARTS, (0,)).calibrate(0, call(q, k, v, 1, [{}, {}]), torch.zeros(2, HEADS, 1, 16))
    assert said == "not all rows so far were read under this plan"


@pytest.mark.parametrize("decode", ["running", "frozen"])
def test_beams_carry_their_own_sums(decode):
    """The score of the winning beam is that of its tokens fed one by one."""
    mini = MINIATURES["llama"]
    model, inputs = mini.build(), text_inputs(mini, lengths=(60,), seed=3)
    heads = tuple((3, h) for h in range(4))
    with infer_patch.patch(model, ACT(heads=heads, threshold=0.02, decode=decode)), torch.no_grad():
        out = model.generate(
            **inputs, **GREEDY, num_beams=4, output_scores=True, return_dict_in_generate=True, length_penalty=0.0
        )
        step = model(**inputs, use_cache=True)
        total = torch.zeros(())
        for token in out.sequences[0, 60:]:
            total = total + step.logits[0, -1].log_softmax(-1)[token]
            step = model(token.view(1, 1), past_key_values=step.past_key_values)
    assert len(set(out.beam_indices[0].tolist()) - {-1}) > 1, "no beam was ever left: nothing is tested"
    torch.testing.assert_close(out.sequences_scores[0], total, atol=1e-4, rtol=1e-4)


def test_head_files(tmp_path):
    ours, published_list = tmp_path / "ours.json", tmp_path / "published.json"
    ours.write_text(json.dumps({"model": "x", "beta": 0.4, "heads": {"3": [2, 0], "1": [1]}}))
    published_list.write_text("[[1, 0], [], [3]]")
    assert read_heads(ours, "act", "").heads == {1: (1,), 3: (0, 2)}
    assert read_heads(ours, "act", "").facts["beta"] == 0.4
    assert read_heads(published_list, "act", "").heads == {2: (0, 1), 4: (3,)}  # its first row is layer 2
    model = MINIATURES["llama"].build()
    with infer_patch.patch(model, ACT(heads_file=str(ours), threshold=0.01)) as handle:
        model(**text_inputs(MINIATURES["llama"], lengths=(50,)))
        report = handle.report()
    assert sorted(report.methods["act"]["corrected"]) == [1, 3]
    assert "attention rows in 2 layers" in str(report)
    with pytest.raises(PlanError, match="names head 3 of layer 4; this model has 4 layers of 4 heads"):
        infer_patch.patch(model, ACT(heads_file=str(published_list)))


@pytest.mark.parametrize(
    "text, complaint",
    [("[", "not valid JSON"), ('{"heads": [1]}', "should be an object with `heads`"), ('{"heads": {}}', "no head")],
)
def test_head_files_that_are_no_such_thing(tmp_path, text, complaint):
    file = tmp_path / "heads.json"
    file.write_text(text)
    with pytest.raises(PlanError, match=complaint):
        infer_patch.patch(MINIATURES["llama"].build(), ACT(heads_file=str(file)))


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({}, "give heads_file or heads, one of them"),
        ({"heads": ((0, 0),), "heads_file": "x.json"}, "give heads_file or heads, one of them"),
        ({"heads": (1, 2)}, "pairs of numbers"),
        ({"heads": ((0, -1),)}, "pairs of numbers"),
        ({"heads": ((0, 0),), "beta": 1.5}, "beta is a share"),
        ({"heads": ((0, 0),), "threshold_mode": "percent"}, "absolute, relative"),
        ({"heads": ((0, 0),), "decode": "cached"}, "running, frozen, off"),
        ({"heads": ((0, 0),), "min_queries": 0}, "min_queries"),
    ],
)
def test_values_that_make_no_sense(options, complaint):
    with pytest.raises(PlanError, match=complaint):
        ACT(**options)


def test_plans_go_through_yaml_and_conflicts_are_named():
    plan = infer_patch.Plan.of(ACT(heads=((3, 1), (1, 0)), beta=0.3))
    assert infer_patch.Plan.from_yaml(plan.to_yaml()) == plan
    model = MINIATURES["llama"].build()
    for other in (SinkWindow(), SinkWindow(evict=True)):
        with pytest.raises(PlanError, match=r"act and sink_window both act on layers 1, 3"):
            infer_patch.patch(model, [plan.methods[0], other])
    with pytest.raises(UnsupportedModelError, match=r"layers \[0\] .* window of their own"):
        infer_patch.patch(MINIATURES["gemma3_text"].build(), ACT(heads=((0, 0),)))
    with pytest.raises(UnsupportedModelError, match="soft-caps"):
        infer_patch.patch(MINIATURES["gemma2"].build(), ACT(heads=((1, 0),)))
