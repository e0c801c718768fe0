"""Decode rows of ACT: the short way against the general one, what is kept of them, and calls with gradients."""

import pytest
import torch
from test_act import HEADS, LOW, PARTS, call, draw, run
from test_calibrated_attention import probabilities

from infer_patch.column_sums import LoweredRow
from infer_patch.kernels.calibrated_attention import lower_columns, reference_probabilities
from infer_patch.kernels.calibrated_row import lower_row, running_row
from infer_patch.kernels.row_attention import newest_row, row_lse
from infer_patch.patches import ACT
from infer_patch.patches import act as act_file


def inputs(batch, kv_heads, kv, dtype=torch.float32, keys=60):
    g = torch.Generator().manual_seed(3)
    q = torch.randn(batch, len(kv), 1, 16, generator=g) * 2
    k, v = (torch.randn(batch, kv_heads, keys, 16, generator=g) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kv_heads, kv", [(2, (0, 0, 0, 1, 1, 1)), (4, (1, 2)), (4, (1, 1, 3)), (1, (0,))])
def test_one_row_equals_the_columns_lowered(batch, kv_heads, kv, dtype, tolerance):
    q, k, v = inputs(batch, kv_heads, kv, dtype)
    k[:, :, 5] = 3 * q[:, :1, 0].expand(-1, kv_heads, -1)  # takes nearly everything in some heads
    a, lse = newest_row(q, k, kv, 0.3)
    torch.testing.assert_close(a[:, :, None], reference_probabilities(q, k, kv, 0.3), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, row_lse(q, k, kv, 0.3), atol=1e-5, rtol=1e-5)
    listed = torch.rand(batch, len(kv), 60, generator=torch.Generator().manual_seed(1)) < 0.1
    listed[..., 5], listed[0, 0] = True, False  # one head has nothing to lower
    output = (a[:, :, None].double() @ v.double()[:, list(kv)]).to(dtype)
    expected, rows = lower_columns(output, q, k, v, kv, listed, 0.4, 0.3, implementation="reference")
    found, changed = lower_row(output, a, v, kv, torch.tensor(kv), listed.flatten(0, 1).nonzero(as_tuple=True), 0.4)
    assert torch.equal(changed, rows) and found.dtype == dtype
    assert (a[..., 5] > 0.9).any()  # such rows are computed afresh
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(found[0, 0], output[0, 0])


def step(batch, kv_heads, kv, dtype=torch.float32, keys=60, size_v=16):
    """What `running_row` takes up to `kv_index`: keys 0, 5, 11, -12 and -2 are sinks, in one head none is. Keys 5 and
    -12 take nearly everything in some heads."""
    q, k, v = inputs(batch, kv_heads, kv, dtype, keys)
    if keys > 20:
        for head, key_head in enumerate(kv):
            k[:, key_head, 5], k[:, key_head, -12] = 2 * q[:, head, 0], 1.95 * q[:, head, 0]
    v = v.repeat(1, 1, 1, 2)[..., :size_v]
    seen_by = torch.arange(keys, 1, -1.0)
    sums = 0.05 * seen_by * torch.rand(batch, len(kv), keys - 1, generator=torch.Generator().manual_seed(2))
    sinks = [i for i in (0, 5, 11, keys - 12, keys - 2) if 0 <= i < keys - 1]
    sums[..., sinks] = 0.3 * seen_by[sinks]
    sums[0, 0] = 0
    a = reference_probabilities(q, k, kv, 0.3)
    output = (a.double() @ v.double()[:, list(kv)]).to(dtype)
    return output, q, k, v, sums, kv, torch.tensor(kv)


def lowered_by_hand(output, q, k, v, sums, kv, threshold, spare, min_queries, beta):
    """The definition, one head at a time; also the row's factor c."""
    keys, new, a = k.shape[2], output.double().clone(), probabilities(q, k, kv, 0.3)[:, :, 0]
    sums = torch.cat([sums, torch.zeros_like(sums[..., :1])], -1) + a
    changed, factor = torch.zeros(a.shape[:2], dtype=torch.bool), torch.ones(a.shape[:2])
    for b in range(a.shape[0]):
        for h in range(a.shape[1]):
            sinks = [j for j in range(keys) if sums[b, h, j] / (keys - j) > threshold and keys - j >= min_queries]
            listed = [j for j in sinks if j > 0] if spare == "first_token" else sinks[1:]
            others = [j for j in range(keys) if j not in listed]
            if len(listed):
                factor[b, h] = c = 1 + (1 - beta) * a[b, h, listed].sum() / a[b, h, others].sum()
                row = c * a[b, h]
                row[listed] = beta * a[b, h, listed]
                new[b, h, 0], changed[b, h] = row @ v[b, kv[h]].double(), True
    return new, changed[..., None], sums, factor


RULES = [("first_detected", 1), ("first_token", 1), ("first_detected", 6), ("first_token", 56)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kv_heads, kv", [(2, (0, 0, 0, 1, 1, 1)), (4, (1, 1, 3)), (1, (0,))])
@pytest.mark.parametrize("spare, min_queries", RULES)
@pytest.mark.parametrize("keys", [2, 60])
def test_a_whole_step_equals_the_definition(keys, spare, min_queries, batch, kv_heads, kv, dtype, tolerance):
    call = step(batch, kv_heads, kv, dtype, keys, 24)
    output, q, k, *_ = call
    new, changed, sums, factor = lowered_by_hand(*call[:-1], 0.1, spare, min_queries, 0.4)
    if keys == 60 and min_queries == 1 and len(kv) * batch > 1:
        assert factor.max() > 4 and not changed.all()
    for name in ("reference", "cpu"):
        found = running_row(*call, 0.1, spare, min_queries, 0.4, 0.3, implementation=name)
        assert torch.equal(found[1], changed) and found[0].dtype == dtype
        torch.testing.assert_close(found[0].double(), new, atol=tolerance, rtol=tolerance)
        assert torch.equal(found[0][~changed], output[~changed])
        torch.testing.assert_close(found[2], sums.float(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[3], row_lse(q, k, kv, 0.3), atol=1e-5, rtol=1e-5)


def all_on_one_key(keys=40):
    """A step in which one listed key takes all of a head's attention, to the last digit."""
    q, k = torch.zeros(1, 2, 1, 16), torch.randn(1, 1, keys, 16, generator=torch.Generator().manual_seed(4))
    q[:, 0, :, 0], k[:, :, 7, 0] = 100, 100
    sums = torch.zeros(1, 2, keys - 1)
    sums[..., 7] = keys
    return torch.full((1, 2, 1, 16), 0.5), q, k, k, sums, (0, 0), torch.tensor([0, 0])


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_a_row_with_mass_on_nothing_else_is_left_as_it_is(name):
    call = all_on_one_key()
    found, changed, *_ = running_row(*call, 0.1, "first_token", 1, 0.4, 0.3, implementation=name)
    assert changed.flatten().tolist() == [False, True]
    assert torch.equal(found[:, 0], call[0][:, 0]) and not torch.equal(found[:, 1], call[0][:, 1])


@pytest.mark.parametrize("spare", ["first_detected", "first_token"])
@pytest.mark.parametrize("min_queries", [1, 6])
@pytest.mark.parametrize("batch", [1, 2])
def test_steps_on_other_devices_equal_rows_that_come_together(spare, min_queries, batch, monkeypatch):
    """What GPUs run, on the torch path."""

    def step(call, output, known, heads, kv, *_):
        chosen = call.q[:, list(heads)], output[:, list(heads)]
        new, rows = runtime._step_by_all_keys(0, call, *chosen, known)
        kept = [memory.pop(runtime.key) for memory in call.memory]
        return LoweredRow(output.index_copy(1, torch.tensor(heads), new), int(rows), kept)

    method = ACT(**LOW, spare=spare, min_queries=min_queries)
    tensors = [x[:batch] for x in draw()]
    together, _, one = run(method, tensors, [30, 10])
    runtime = method.runtime(PARTS, (0,))
    monkeypatch.setattr(act_file, "lower_newest_row", step)
    monkeypatch.setattr(act_file, "are_few", lambda threshold, keys: True)
    singly, _, other = run(method, tensors, [30, *[1] * 10], runtime)
    torch.testing.assert_close(singly, together, atol=1e-5, rtol=1e-4)
    for a, b in zip(one, other):
        (a,), (b,) = a.values(), b.values()
        torch.testing.assert_close(a.sums, b.sums, atol=1e-5, rtol=1e-4)
        assert b.waiting == 0 and b.candidates is None
        for x, y in zip(zip(*a.recent), zip(*b.recent)):
            torch.testing.assert_close(torch.cat(x, 1), torch.cat(y, 1), atol=1e-5, rtol=1e-4)


def test_gradients_after_inference_mode():
    """Index tensors made in inference mode could not be saved for the backward pass."""
    q, k, v = draw(12)
    runtime, heads = ACT(**LOW).runtime(PARTS, (0,)), torch.zeros(2, HEADS, 12, 16)
    with torch.inference_mode():
        runtime.calibrate(0, call(q, k, v, 12, [{}, {}]), heads)
    q.requires_grad_()
    memory = [{}, {}]
    runtime.calibrate(0, call(q, k, v, 11, memory, 11), heads[:, :, :11])
    found = runtime.calibrate(0, call(q, k, v, 1, memory), v.repeat_interleave(3, 1)[:, :, -1:])
    assert torch.autograd.grad(found.sum(), q)[0][:, :, -1].abs().sum() > 0
