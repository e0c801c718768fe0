"""ACT's decode steps on CPUs, by the keys that can be sinks, against rows that come together."""

import copy

import pytest
import torch
from test_act import HEADS, LOW, PARTS, attention, call, draw, run

from infer_patch import column_sums
from infer_patch.kernels import sink_candidates
from infer_patch.kernels.sink_candidates import SinkCandidates, are_few
from infer_patch.patches import ACT
from infer_patch.patches import act as act_file


@pytest.fixture(autouse=True)
def _short_texts_too(monkeypatch):
    """By candidates at any length: `ACT` makes no choice where most keys can be sinks."""
    monkeypatch.setattr(act_file, "are_few", lambda threshold, keys: True)


OPTIONS = [
    dict(LOW),
    dict(LOW, beta=0.0),
    dict(LOW, spare="first_token"),
    dict(LOW, min_queries=6),
    dict(LOW, threshold=0.12),
    dict(LOW, threshold=2.0, threshold_mode="relative"),
    dict(LOW, threshold=0.0),  # every key is a sink
    dict(LOW, threshold=40.0),  # none can be
]


def settled(sample, k):
    (kept,) = sample.values()
    return kept.settled(k, (0, 0, 1), 0.25)


@pytest.mark.parametrize("rows", [3, 32], ids=["a new choice every 3 rows", "every 32"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("batch", [1, 2])
def test_steps_equal_rows_that_come_together(options, rows, batch, monkeypatch):
    monkeypatch.setattr(sink_candidates, "ROWS", rows)
    method, tensors = ACT(**options), [x[:batch] for x in draw(100)]
    together, _, one = run(method, tensors, [30, 70])
    singly, _, other = run(method, tensors, [30, *[1] * 70])
    torch.testing.assert_close(singly, together, atol=1e-5, rtol=1e-4)
    plain = (attention(*tensors[:2]) @ tensors[2].double().repeat_interleave(3, 1)).float()
    assert torch.equal(singly[:, :, 30:], plain[:, :, 30:]) == (method.threshold == 40)
    for i, (a, b) in enumerate(zip(one, other)):
        a, b = (settled(x, tensors[1][i]) for x in (a, b))
        assert a.rows == b.rows == 100
        torch.testing.assert_close(a.sums, b.sums, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_half_precision(dtype, tolerance):
    method, tensors = ACT(**LOW), [x.to(dtype) for x in draw(70)]
    together, _, _ = run(method, tensors, [30, 40])
    singly, _, _ = run(method, tensors, [30, *[1] * 40])
    assert singly.dtype == dtype
    torch.testing.assert_close(singly, together, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_a_row_with_nearly_everything_on_sinks_is_computed_afresh(dtype, tolerance):
    q, k, v = draw(60)
    k[:, :, 5] = 2 * q[:, ::3, 30:].mean(2)  # a key that all heads read
    q[:, :, 50:] += 30 * k[:, :, 5:6].repeat_interleave(3, 1)
    tensors = [x.to(dtype) for x in (q, k, v)]
    assert attention(q, k)[:, :, 50:, 5].max() > 0.99
    method = ACT(**LOW, spare="first_token")
    together, _, _ = run(method, tensors, [30, 30])
    singly, _, _ = run(method, tensors, [30, *[1] * 30])
    torch.testing.assert_close(singly.float(), together.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("taken_back", [1, 3, 20, 45])
def test_rows_that_are_taken_back_leave_the_sums_again(taken_back, monkeypatch):
    """Whether they had been added or were still waiting."""
    monkeypatch.setattr(sink_candidates, "ROWS", 8)
    method, (q, k, v) = ACT(**LOW), draw(90)
    runtime, memory = method.runtime(PARTS, (0,)), [{}, {}]
    run(method, (q, k, v), [30, *[1] * 50], runtime, memory)
    left = 80 - taken_back
    after = [torch.cat([x[:, :, :left], x[:, :, 80:]], 2) for x in (q, k, v)]
    expected, _, _ = run(method, after, [30, *[1] * (after[0].shape[2] - 30)])
    for row in range(10):
        this = call(*after, 1, memory, left + row + 1)
        plain = (attention(this.q, this.k) @ this.v.double().repeat_interleave(3, 1)).float()
        found = runtime.calibrate(0, this, plain)
        torch.testing.assert_close(found, expected[:, :, left + row : left + row + 1], atol=1e-5, rtol=1e-4)


def test_samples_that_were_one_go_on_apart(monkeypatch):
    """As beams do: they share what they knew, and neither sees what the other adds."""
    monkeypatch.setattr(sink_candidates, "ROWS", 8)
    method, one, other = ACT(**LOW), draw(60, batch=1), draw(60, seed=7, batch=1)
    other = [torch.cat([a[:, :, :40], b[:, :, 40:]], 2) for a, b in zip(one, other)]
    expected = [run(method, x, [30, *[1] * 30])[0][:, :, 40:] for x in (one, other)]
    runtime, memory = method.runtime(PARTS, (0,)), [{}]
    run(method, [x[:, :, :40] for x in one], [30, *[1] * 10], runtime, memory)
    memories = [dict(memory[0]), dict(memory[0])]
    for row in range(40, 60):
        for tensors, mine, target in zip((one, other), memories, expected):
            this = call(*tensors, 1, [mine], row + 1)
            plain = (attention(this.q, this.k) @ this.v.double().repeat_interleave(3, 1)).float()
            found = runtime.calibrate(0, this, plain)
            torch.testing.assert_close(found[:, :, 0], target[:, :, row - 40], atol=1e-5, rtol=1e-4)


def test_copied_caches_go_on_alike():
    method, (q, k, v) = ACT(**LOW), draw(50)
    runtime, memory = method.runtime(PARTS, (0,)), [{}, {}]
    run(method, (q, k, v), [30, *[1] * 5], runtime, memory)
    kept = copy.deepcopy(memory)
    plain = torch.randn(2, HEADS, 1, 16, generator=torch.Generator().manual_seed(0))
    first = runtime.calibrate(0, call(q, k, v, 1, memory, 36), plain)
    assert torch.equal(runtime.calibrate(0, call(q, k, v, 1, kept, 36), plain), first)


def test_few_pieces_of_recent_rows_are_kept(monkeypatch):
    """However many steps: every step counts the cache's bytes, piece by piece."""
    monkeypatch.setattr(column_sums, "RECENT", 12)
    monkeypatch.setattr(sink_candidates, "ROWS", 4)
    _, _, memory = run(ACT(**LOW), draw(), [10, *[1] * 30])
    for sample in memory:
        (kept,) = sample.values()
        assert len(kept.recent) <= column_sums.PIECES
        assert 12 <= kept.known <= 12 + column_sums.PIECES


def test_only_keys_that_can_become_sinks_are_looked_at():
    """At a threshold of 0.5, a key that 100 rows see needs 18 more of attention than it has: not within 32 rows."""
    sums = torch.zeros(2, 200)
    sums[0, 40] = 79.0  # of 160 rows
    sums[1, 50] = 40.0  # of 150: 35 too few
    k = v = torch.randn(1, 200, 8)
    found = SinkCandidates(sums, k, v, (0, 0), 0.5)
    assert found.columns[: found.count].tolist() == [40, *range(137, 200)]
    assert found.nbytes > 2 * found.count * 2 * 8 * 4


def test_a_choice_is_made_where_few_keys_qualify():
    assert are_few(0.1, 4096) and not are_few(0.1, 500)
    assert not are_few(5 / 4096, 4096)  # the paper's threshold: within 32 rows every key can be a sink
