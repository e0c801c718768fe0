"""Calibrated attention: streaming corrections against probabilities written out, and the primitives below them."""

import pytest
import torch

from infer_patch.kernels import row_attention
from infer_patch.kernels.calibrated_attention import lower_columns, lowered_probabilities, reference_probabilities
from infer_patch.kernels.row_attention import key_heads, key_lists, lse_and_column_sums, per_key_head

SHAPES = [(50, 50), (1, 1), (1, 70), (7, 61), (130, 200)]
# key heads, and the one of each chosen query head: all of a model, some, one
SUBSETS = [(2, (0, 0, 0, 1, 1, 1)), (4, (1, 1, 3)), (1, (0,))]


@pytest.fixture(params=[1 << 20, 300], ids=["one block", "many blocks"], autouse=True)
def _blocks(request, monkeypatch):
    monkeypatch.setitem(row_attention._SCORES_PER_BLOCK, "cpu", request.param)


def draw(queries, keys, kv_heads, heads, seed=0, dtype=torch.float32, batch=2, size=16):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, queries, size, generator=g) * 2
    k, v = (torch.randn(batch, kv_heads, keys, size, generator=g) for _ in range(2))
    return (x.to(dtype) for x in (q, k, v))


def probabilities(q, k, kv, scale):
    """The textbook form, in double."""
    rows, keys = q.shape[2], k.shape[2]
    z = q.double() @ k.double()[:, list(kv)].transpose(-1, -2) * scale
    seen = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    return z.masked_fill(~seen, float("-inf")).softmax(-1)


@pytest.mark.parametrize("queries, keys", SHAPES)
@pytest.mark.parametrize("kv_heads, kv", SUBSETS)
def test_log_sums_and_column_sums(queries, keys, kv_heads, kv):
    q, k, v = draw(queries, keys, kv_heads, len(kv))
    a = probabilities(q, k, kv, 0.3)
    lse, sums = lse_and_column_sums(q, k, kv, 0.3)
    torch.testing.assert_close(sums, a.sum(2).float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reference_probabilities(q, k, kv, 0.3), a.float(), atol=1e-6, rtol=1e-5)
    z = q.double() @ k.double()[:, list(kv)].transpose(-1, -2) * 0.3
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    torch.testing.assert_close(lse, z.masked_fill(~seen, float("-inf")).logsumexp(-1).float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(row_attention.row_lse(q, k, kv, 0.3), lse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        per_key_head(a.float(), v, kv), (a @ v.double()[:, list(kv)]).float(), atol=1e-5, rtol=1e-5
    )


def test_lists_of_keys():
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    assert key_lists(mask).tolist() == [[1, 3, 4], [0, -1, -1], [-1, -1, -1]]
    assert key_lists(mask[2:]).shape == (1, 0)


@pytest.mark.parametrize("share", [0.1, 0.6])
@pytest.mark.parametrize("queries, keys", SHAPES)
@pytest.mark.parametrize("kv_heads, kv", SUBSETS)
def test_lowered_columns_equal_the_written_out_form(queries, keys, kv_heads, kv, share):
    q, k, v = draw(queries, keys, kv_heads, len(kv))
    a = probabilities(q, k, kv, 0.3)
    listed = torch.rand(2, len(kv), keys, generator=torch.Generator().manual_seed(1)) < share
    output = (a @ v.double()[:, list(kv)]).float()
    b, rest = (a * listed[:, :, None]).sum(-1, keepdim=True), (a * ~listed[:, :, None]).sum(-1, keepdim=True)
    changed = torch.where(listed[:, :, None], 0.4 * a, a * (1 + 0.6 * b / rest))
    changed = torch.where((b > 0) & (rest > 0), changed, a)
    expected = (changed @ v.double()[:, list(kv)]).float()
    for name in ("reference", "cpu"):
        found, rows = lower_columns(output, q, k, v, kv, listed, 0.4, 0.3, implementation=name)
        assert torch.equal(rows, ((b > 0) & (rest > 0))[..., 0])
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        assert torch.equal(found[b[..., 0] == 0], output[b[..., 0] == 0])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_rows_that_read_little_but_the_listed_keys(dtype, tolerance):
    """Here the plain output is multiplied by a large factor: it must not carry its rounding along."""
    q, k, v = draw(60, 60, 2, 4, dtype=dtype)
    k[:, :, 3] = 3 * q[:, ::2].float().mean(2).to(dtype)  # a key that most rows read
    q[:, :, 20:40] += 4 * k[:, :, 3:4].repeat_interleave(2, 1)
    kv = key_heads(4, 2)
    a = probabilities(q, k, kv, 0.25)
    listed = torch.zeros(2, 4, 60, dtype=torch.bool)
    listed[..., 3] = True
    output = (a @ v.double()[:, list(kv)]).to(dtype)
    b = a[..., 3:4]
    assert (1 - b[..., 20:40, :]).min() < 1e-4
    changed, rows = lowered_probabilities(a, listed[:, :, None], 0.4)
    torch.testing.assert_close(changed.sum(-1), torch.ones_like(changed.sum(-1)))
    found, _ = lower_columns(output, q, k, v, kv, listed, 0.4, 0.25)
    exact = torch.where(rows[..., None], changed @ v.double()[:, list(kv)], output.double())
    torch.testing.assert_close(found.double(), exact, atol=tolerance, rtol=tolerance)


def test_gradients_reach_queries_keys_and_values():
    q, k, v = (x.requires_grad_() for x in draw(20, 20, 2, 4))
    kv, listed = key_heads(4, 2), torch.zeros(2, 4, 20, dtype=torch.bool)
    listed[..., [2, 5]] = True
    found = []
    for name in ("reference", "cpu"):
        output = reference_probabilities(q, k, kv, 0.25) @ v.repeat_interleave(2, 1)
        new, _ = lower_columns(output, q, k, v, kv, listed, 0.4, 0.25, implementation=name)
        found.append(torch.autograd.grad(new.square().sum(), (q, k, v)))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_unknown_implementations():
    q, k, v = draw(3, 3, 1, 1)
    with pytest.raises(ValueError, match="unknown kernel implementation 'cuda'"):
        lower_columns(q, q, k, v, (0,), torch.zeros(2, 1, 3, dtype=torch.bool), 0.4, 1.0, implementation="cuda")
