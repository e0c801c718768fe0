"""ACT's and VAR's Triton kernels against the formula, on a GPU or (TRITON_INTERPRET=1) in Triton's interpreter."""

import pytest
import torch
from kernel_cases import poisoned_memory
from test_calibrated_row import RULES as STEP_RULES
from test_calibrated_row import all_on_one_key, lowered_by_hand, step
from test_image_shift import RULES

from infer_patch.kernels import calibrated_row_triton, calibrated_triton, image_shift_triton
from infer_patch.kernels.calibrated_attention import lower_columns, reference_probabilities
from infer_patch.kernels.image_shift import shift_to_images
from infer_patch.kernels.row_attention import key_heads, key_lists, lse_and_column_sums, row_lse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(50, 50), (1, 1), (7, 61), (66, 101)]
SUBSETS = [(2, (0, 0, 1, 1)), (4, (1, 1, 3)), (1, (0,))]


def draw(queries, keys, kv_heads, heads, size=16, size_v=16, dtype=torch.float32):
    g = torch.Generator().manual_seed(queries + keys)
    q = torch.randn(2, queries, heads, size, generator=g).transpose(1, 2) * 2
    k, v = (torch.randn(2, kv_heads, keys + 9, n, generator=g)[:, :, :keys] for n in (size, size_v))  # as caches are
    return (x.to(DEVICE, dtype) for x in (q, k, v))


@pytest.mark.parametrize("queries, keys", SHAPES)
@pytest.mark.parametrize("kv_heads, kv", SUBSETS)
@pytest.mark.parametrize("size, dtype", [(16, torch.float32), (24, torch.float32), (64, torch.float16)])
def test_sums(queries, keys, kv_heads, kv, size, dtype):
    q, k, _ = draw(queries, keys, kv_heads, len(kv), size, dtype=dtype)
    lse, sums = lse_and_column_sums(q, k, kv, 0.2, implementation="triton")
    exact = reference_probabilities(q.double().float(), k, kv, 0.2)
    torch.testing.assert_close(lse, row_lse(q, k, kv, 0.2), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(sums, exact.sum(2), atol=1e-4, rtol=1e-4)
    alone, nothing = calibrated_triton.lse_and_column_sums(q, k, kv, 0.2, sums=False)
    assert nothing is None and torch.equal(alone, lse)


@pytest.mark.parametrize("share", [0.05, 0.6])
@pytest.mark.parametrize("queries, keys", SHAPES)
@pytest.mark.parametrize("kv_heads, kv", SUBSETS)
@pytest.mark.parametrize(
    "size, size_v, dtype, tolerance",
    [(16, 24, torch.float32, 2e-5), (40, 16, torch.float32, 2e-5), (64, 64, torch.float16, 3e-3)],
)
def test_lowered_columns(queries, keys, kv_heads, kv, share, size, size_v, dtype, tolerance):
    q, k, v = draw(queries, keys, kv_heads, len(kv), size, size_v, dtype)
    if queries > 20:
        q[:, :, 15:18] += 6 * k[:, list(kv), 3:4]  # rows that read little but one key
    listed = torch.rand(2, len(kv), keys, generator=torch.Generator().manual_seed(1)).to(DEVICE) < share
    listed[..., 3:4] = True
    listed[0, 0] = False
    a = reference_probabilities(q, k, kv, 0.3)
    output = (a.double() @ v.double()[:, list(kv)]).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    expected, rows = lower_columns(output, q, k, v, kv, listed, 0.4, 0.3, implementation="reference")
    lse = row_lse(q, k, kv, 0.3)
    for known in (lse, None) if share < 0.1 else (lse,):
        found, changed = lower_columns(output, q, k, v, kv, listed, 0.4, 0.3, known, implementation="triton")
        assert torch.equal(changed, rows) and found.dtype == dtype
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=10 * tolerance)
        assert torch.equal(found[~rows], output[~rows])
    if share < 0.1 and keys > 1:  # the kernel itself, where no row is computed afresh
        new, mass = calibrated_triton.lower_columns(output, q, k, v, kv, key_lists(listed), 0.4, 0.3, lse)
        torch.testing.assert_close(mass, (a * listed[:, :, None]).sum(-1), atol=1e-4, rtol=1e-4)
        some = mass < 0.5
        assert some.any()
        torch.testing.assert_close(new[some], expected[some], atol=tolerance, rtol=10 * tolerance)


def test_nothing_listed():
    q, k, v = draw(30, 30, 2, 4)
    output = torch.randn(2, 4, 30, 16, device=DEVICE)
    nothing = torch.zeros(2, 4, 30, dtype=torch.bool, device=DEVICE)
    found, rows = lower_columns(output, q, k, v, (0, 0, 1, 1), nothing, 0.4, 0.3, implementation="triton")
    assert torch.equal(found, output) and not rows.any()


def picture(queries, keys):
    """Sinks, visual tokens and asked rows of two samples, one of them with two pictures."""
    visual = torch.zeros(2, keys, dtype=torch.bool)
    visual[0, 4:20], visual[1, 7:15] = True, True
    visual[1, 18:45] = True
    sinks = torch.zeros_like(visual)
    sinks[:, 0] = sinks[0, 9] = sinks[1, 8] = sinks[1, 40] = True
    asked = torch.arange(keys - queries, keys) >= torch.tensor([[20], [45]])
    return (x.to(DEVICE) for x in (sinks, visual, asked))


def compare_shifted(q, k, v, sinks, visual, asked, rule, tolerance, scale=0.2):
    kv = key_heads(q.shape[1], k.shape[1])
    a = reference_probabilities(q, k, kv, scale)
    output = (a.double() @ v.double()[:, list(kv)]).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    call = output, q, k, v, sinks, visual, asked, rule, scale
    expected, rows = shift_to_images(*call, implementation="reference")
    with poisoned_memory():
        found, chosen = shift_to_images(*call, implementation="triton")
    assert torch.equal(chosen, rows) and chosen.dtype == torch.bool and found.dtype == q.dtype
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=10 * tolerance)
    assert torch.equal(found[~rows], output[~rows])
    return rows, (found - output).abs().amax(-1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("queries, keys", [(70, 70), (1, 70), (9, 50)])
@pytest.mark.parametrize(
    "heads, kv_heads, size, size_v, dtype, tolerance",
    [
        (6, 2, 16, 24, torch.float32, 2e-5),
        (3, 3, 40, 16, torch.float32, 2e-5),
        (4, 1, 64, 64, torch.float16, 3e-3),
    ],
)
def test_shifted_rows(heads, kv_heads, queries, keys, rule, size, size_v, dtype, tolerance):
    q, k, v = draw(queries, keys, kv_heads, heads, size, size_v, dtype)
    sinks, visual, asked = picture(queries, keys)
    rows, differ = compare_shifted(q, k, v, sinks, visual, asked, rule, tolerance)
    assert rows.any() and (differ[rows] > 10 * tolerance).any()
    assert not rows.all() or queries == 1


def test_rows_within_a_picture():
    """Rows see no listed key behind them, and themselves."""
    q, k, v = draw(50, 50, 2, 4)
    sinks, visual, asked = picture(50, 50)
    rows, _ = compare_shifted(q, k, v, sinks, visual, asked | True, RULES[2], 2e-5)
    assert rows[0, :, 10:20].any() and rows[1, :, 10:15].any() and not rows[:, :, :8].any()


def test_samples_without_rows_to_shift():
    """No visual sink in the first sample; no row asked of either; and no picture at all."""
    q, k, v = draw(30, 70, 2, 4)
    sinks, visual, asked = picture(30, 70)
    sinks[0] &= ~visual[0]
    rows, _ = compare_shifted(q, k, v, sinks, visual, asked, RULES[2], 2e-5)
    assert rows[1].any() and not rows[0].any()
    for marks in ((sinks, visual, asked & False), (sinks, visual & False, asked), (sinks & False, visual, asked)):
        for some in (slice(None), slice(29, None)):
            rows, _ = compare_shifted(q[:, :, some], k, v, *marks[:2], marks[2][:, some], RULES[2], 2e-5)
            assert not rows.any()


@pytest.mark.parametrize("queries", [1, 5])
def test_log_sums_of_few_rows_and_of_many(queries, monkeypatch):
    q, k, _ = draw(queries, 300, 2, 6)
    expected = row_lse(q, k, key_heads(6, 2), 0.3)
    for few in (image_shift_triton._FEW_ROWS, 0):
        monkeypatch.setattr(image_shift_triton, "_FEW_ROWS", few)
        found = image_shift_triton._row_lse(q, k, 0.3)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


STEPS = [
    # batch, key heads, key head of each, keys, size of values, splits, dtype, tolerance
    (2, 2, (0, 0, 1), 61, 24, 2, torch.float32, 2e-5),
    (1, 4, (1, 1, 3), 700, 16, None, torch.float32, 2e-5),
    (3, 1, (0,), 600, 24, 1, torch.float16, 3e-3),
    (2, 4, (0, 2), 2, 16, None, torch.bfloat16, 2e-2),
    (2, 4, (1, 2), 900, 24, 5, torch.bfloat16, 2e-2),
]


@pytest.mark.parametrize("spare, min_queries", STEP_RULES)
@pytest.mark.parametrize("batch, kv_heads, kv, keys, size_v, splits, dtype, tolerance", STEPS)
def test_steps(batch, kv_heads, kv, keys, size_v, splits, dtype, tolerance, spare, min_queries):
    """One new row of each head, from its scores to its output."""
    call = step(batch, kv_heads, kv, dtype, keys, size_v)
    new, changed, sums, factor = lowered_by_hand(*call[:-1], 0.1, spare, min_queries, 0.4)
    output, q, k, v, held, _, index = (x.to(DEVICE) if torch.is_tensor(x) else x for x in call)
    limit = 2.0 if dtype == torch.bfloat16 else 4.0
    rule = 0.1, spare == "first_token", min_queries, 0.4, 0.3, limit
    with poisoned_memory():
        found = calibrated_row_triton.running_row(output, q, k, v, held, index, *rule, splits=splits)
    result, rows, total, lse = (x.cpu() for x in found)
    assert torch.equal(rows, changed) and result.dtype == dtype
    torch.testing.assert_close(result.double(), new, atol=tolerance, rtol=tolerance)
    assert torch.equal(result[~changed], call[0][~changed])
    torch.testing.assert_close(total, sums.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, row_lse(call[1], call[2], kv, 0.3), atol=1e-4, rtol=1e-5)
    if keys > 60 and min_queries == 1:  # of every kind: as it was, multiplied, afresh
        assert changed.any() and factor.max() > limit


@pytest.mark.parametrize("splits", [None, 3])
def test_steps_with_mass_on_nothing_else(splits):
    output, q, k, v, held, _, index = (x.to(DEVICE) if torch.is_tensor(x) else x for x in all_on_one_key())
    rule = 0.1, True, 1, 0.4, 0.3, 4.0
    found, changed, *_ = calibrated_row_triton.running_row(output, q, k, v, held, index, *rule, splits=splits)
    assert changed.flatten().tolist() == [False, True]
    assert torch.equal(found[:, 0], output[:, 0]) and not torch.equal(found[:, 1], output[:, 1])
