"""Decode rows of ACT: the short way against the general one, what is kept of them, and calls with gradients."""

import pytest
import torch
from test_act import HEADS, LOW, PARTS, call, draw

from infer_patch.kernels.calibrated_attention import lower_columns, reference_probabilities
from infer_patch.kernels.calibrated_row import lower_row
from infer_patch.kernels.row_attention import newest_row, row_lse
from infer_patch.patches import ACT


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
