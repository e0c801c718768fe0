"""ACT's Triton kernels against the formula, on a GPU or (TRITON_INTERPRET=1) in Triton's interpreter."""

import pytest
import torch

from infer_patch.kernels import calibrated_triton
from infer_patch.kernels.calibrated_attention import lower_columns, reference_probabilities
from infer_patch.kernels.row_attention import key_lists, lse_and_column_sums, row_lse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(50, 50), (1, 1), (7, 61), (70, 130)]
SUBSETS = [(2, (0, 0, 0, 1, 1, 1)), (4, (1, 1, 3)), (1, (0,))]


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
    for known in (lse, None):
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
