"""ACT's Triton kernels on a GPU: the cases of the interpreter, and a long prompt in bfloat16."""

import os

import pytest
import torch

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("triton")

from calibrated_cases import *  # noqa: F403

from infer_patch.kernels.calibrated_attention import lower_columns
from infer_patch.kernels.dense_attention import dense_attention
from infer_patch.kernels.dispatch import triton_refusal
from infer_patch.kernels.row_attention import lse_and_column_sums

if triton_refusal("cuda"):
    pytest.skip(triton_refusal("cuda"), allow_module_level=True)


@pytest.mark.parametrize("size", [64, 80, 128, 256])
def test_long_prompts_in_half_precision(size):
    generator = torch.Generator("cuda").manual_seed(size)
    shape = dict(device="cuda", dtype=torch.bfloat16, generator=generator)
    q, (k, v) = torch.randn(1, 4, 8192, size, **shape), (torch.randn(1, 2, 8192, size, **shape) for _ in range(2))
    kv, scale = (0, 0, 1, 1), size**-0.5
    found, expected = (lse_and_column_sums(q, k, kv, scale, implementation=name) for name in ("triton", "cpu"))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    listed = torch.rand(1, 4, 8192, device="cuda", generator=generator) < 0.01
    output = dense_attention(q, k, v, scale)
    new, old = (lower_columns(output, q, k, v, kv, listed, 0.4, scale, implementation=x) for x in ("triton", "cpu"))
    assert torch.equal(new[1], old[1])
    torch.testing.assert_close(new[0], old[0], atol=2e-2, rtol=2e-2)
