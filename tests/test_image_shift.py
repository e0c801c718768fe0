"""VAR's rows: streaming corrections against probabilities written out, one row at a time."""

import pytest
import torch
from test_calibrated_attention import _blocks, draw, probabilities  # noqa: F401  (a fixture of every test here)

from infer_patch.kernels.image_shift import ImageRule, VisualKeys, reference_shifted, shift_row, shift_to_images
from infer_patch.kernels.row_attention import key_heads, row_lse

RULES = [ImageRule(0.5, 0.2, 0.4), ImageRule(0.8, 0.05, 0.6), ImageRule(1.0, 0.0, 1.0)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("queries, keys", [(70, 70), (1, 70), (9, 61)])
@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (4, 4), (4, 1)])
def test_shifted_rows_equal_the_written_out_form(queries, keys, heads, kv_heads, rule):
    q, k, v = draw(queries, keys, kv_heads, heads)
    visual = torch.zeros(2, keys, dtype=torch.bool)
    visual[0, 4:20], visual[1, 7:15] = True, True
    visual[1, 18:30] = True  # two pictures
    sinks = torch.zeros_like(visual)
    sinks[:, 0] = sinks[0, 9] = sinks[1, 8] = sinks[1, 25] = True
    asked = torch.arange(keys - queries, keys) >= torch.tensor([[20], [30]])
    kv = key_heads(heads, kv_heads)
    a = probabilities(q, k, kv, 0.2)
    output = (a @ v.double()[:, list(kv)]).float()
    expected, rows = written_out(a, sinks, visual, asked, rule)
    assert rows.any() and torch.equal(reference_shifted(a, sinks, visual, asked, rule)[1], rows)
    for name, lse in (("reference", None), ("cpu", None), ("cpu", row_lse(q, k, kv, 0.2))):
        tensors = output, q, k, v, sinks, visual, asked
        found, chosen = shift_to_images(*tensors, rule, 0.2, lse, implementation=name)
        assert torch.equal(chosen, rows)
        torch.testing.assert_close(found, (expected @ v.double()[:, list(kv)]).float(), atol=2e-5, rtol=1e-4)
        assert torch.equal(found[~rows], output[~rows])


def written_out(a, sinks, visual, asked, rule):
    """The definition, one row at a time."""
    new, rows = a.clone(), torch.zeros(a.shape[:3], dtype=torch.bool)
    for b in range(a.shape[0]):
        non_sink = visual[b] & ~sinks[b]
        for h in range(a.shape[1]):
            for i in asked[b].nonzero().flatten().tolist():
                row = a[b, h, i]
                m, s = row[visual[b]].sum(), row[visual[b] & sinks[b]].sum()
                if s / (m + 1e-6 * visual[b].sum()) > rule.sink_portion or m < rule.least_mass:
                    continue
                rows[b, h, i] = True
                budget = rule.move * row[sinks[b]].sum()
                new[b, h, i, sinks[b]] *= 1 - rule.move
                new[b, h, i, non_sink] += budget * row[non_sink] / row[non_sink].sum()
    return new, rows


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_one_row_of_one_sample(dtype, tolerance, heads, kv_heads, rule):
    """As decoding brings it: keys of a span that holds text, too, and sinks on both sides of it."""
    q, k, v = draw(1, 70, kv_heads, heads, batch=1, dtype=dtype)
    visual, sinks = torch.zeros(1, 70, dtype=torch.bool), torch.zeros(1, 70, dtype=torch.bool)
    visual[0, 7:15] = visual[0, 18:30] = True
    sinks[0, [0, 8, 16, 25, 50]] = True
    kv = key_heads(heads, kv_heads)
    a = probabilities(q, k, kv, 0.2)
    output = (a @ v.double()[:, list(kv)]).to(dtype)
    expected, rows = written_out(a, sinks, visual, torch.ones(1, 1, dtype=torch.bool), rule)
    known = VisualKeys.of(sinks[0], visual[0])
    assert (known.span.start, known.span.stop, known.outside.tolist()) == (7, 30, [0, 50])
    found, chosen = shift_row(output, q, k, v, row_lse(q, k, kv, 0.2), known, rule, 0.2)
    assert torch.equal(chosen, rows) and found.dtype == dtype
    target = (expected @ v.double()[:, list(kv)]).to(dtype)
    torch.testing.assert_close(found, target, atol=tolerance, rtol=tolerance)
    assert torch.equal(found[~rows], output[~rows])
