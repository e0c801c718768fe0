"""The log-sum-exp of the model's own attention: the same output to the bit, and when it is not to be had."""

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from infer_patch.dense_lse import dense_with_lse

SDPA = ALL_ATTENTION_FUNCTIONS["sdpa"]


class Attention(nn.Module):
    is_causal = True

    def __init__(self, groups):
        super().__init__()
        if groups > 1:
            self.num_key_value_groups = groups


def draw(rows, keys, groups, dtype=torch.float32, size=16):
    g = torch.Generator().manual_seed(rows)
    q = torch.randn(2, rows, 2 * groups, size, generator=g).transpose(1, 2)
    k, v = (torch.randn(2, 2, keys + 9, size, generator=g)[:, :, :keys] for _ in range(2))  # as caches are
    return tuple(x.to(dtype) for x in (q, k, v))


def ask(q, k, v, mask=None, dense=SDPA, **kwargs):
    return dense_with_lse(dense, Attention(q.shape[1] // k.shape[1]), q, k, v, mask, {"scaling": 0.3, **kwargs})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("rows, keys", [(1, 1), (1, 700), (5, 5), (700, 700)])
@torch.no_grad()
def test_output_to_the_bit_and_the_sum(rows, keys, groups, dtype):
    q, k, v = draw(rows, keys, groups, dtype)
    expected, _ = SDPA(Attention(groups), q, k, v, None, scaling=0.3, dropout=0.0)
    output, lse = ask(q, k, v, dropout=0.0, position_ids=torch.arange(rows))
    assert torch.equal(output, expected) and output.is_contiguous()
    z = 0.3 * q.float() @ k.float().repeat_interleave(groups, 1).transpose(-1, -2)
    seen = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    exact = z.masked_fill(~seen, float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse, exact, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=1e-5)
    assert lse.dtype == torch.float32


@torch.no_grad()
def test_rows_that_see_everything():
    q, k, v = draw(6, 6, 1)
    expected, _ = SDPA(Attention(1), q, k, v, None, scaling=0.3, is_causal=False)
    output, lse = ask(q, k, v, is_causal=False)
    assert torch.equal(output, expected)
    torch.testing.assert_close(lse, (0.3 * q @ k.transpose(-1, -2)).logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_calls_that_are_left_to_the_model():
    q, k, v = draw(5, 5, 1)
    with torch.no_grad():
        assert ask(q, k, v) is not None
        assert ask(q, k, v, mask=torch.ones(2, 1, 5, 5, dtype=torch.bool)) is None
        assert ask(q, k, v, dropout=0.1) is None
        assert ask(q, k, v, softcap=30.0) is None
        assert ask(q[:, :, 3:], k, v) is None  # several rows behind a cache: a mask of their own
        assert ask(q, k, v[..., :8]) is None
        assert ask(q, k, v, dense=ALL_ATTENTION_FUNCTIONS["flash_attention_2"]) is None
        assert ask(q, k, v, dense=lambda *args, **kwargs: None) is None
    assert ask(q.requires_grad_(), k, v) is None
