"""How far a run drifts from the unpatched one, token by token, and where it first says something else.

Teacher-forced: both runs read the unpatched greedy output, after a prefill and one token at a time through the cache,
so that what a plan does to the cache shows. Free-running: the first token that differs.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from infer_patch.evals.cost import quantile
from infer_patch.evals.schema import TokenDrift

MATH_LIMIT = 6 * 2**30  # bytes of scores the control on another backend may take


@dataclass(frozen=True)
class Distances:
    """Per token: KL divergence in nats, whether both rank the same token first, and the largest logit difference."""

    kl: list[float]
    top1: list[bool]
    gap: list[float]


def distances(reference: Tensor, other: Tensor) -> Distances:
    """Compare the logits [n, V] of two runs over the same n tokens: KL(reference || other), agreement, largest gap."""
    kl = []
    for p, q in zip(reference, other):  # a row at a time: float64 over a whole answer could be gigabytes
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        terms = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q))
        kl.append(max(float(terms.sum()), 0.0))
    gap = (reference - other).abs().nan_to_num(0.0, posinf=0.0)  # -inf on both sides is no difference
    return Distances(kl, (reference.argmax(-1) == other.argmax(-1)).tolist(), gap.amax(-1).tolist())


def pool(parts: Sequence[Distances]) -> TokenDrift | None:
    """One figure each over all tokens of several prompts; None when there are no tokens."""
    kl, top1, gap = ([x for part in parts for x in getattr(part, name)] for name in ("kl", "top1", "gap"))
    if not kl:
        return None
    return {
        "tokens": len(kl),
        "kl_mean": statistics.fmean(kl),
        "kl_p99": quantile(kl, 0.99),
        "top1": sum(top1) / len(top1),
        "max_logit_gap": max(gap),
    }


def first_difference(reference: Sequence[int], other: Sequence[int]) -> int | None:
    """Position of the first token that differs (or that only one of them has); None when both are the same."""
    for position, (a, b) in enumerate(zip(reference, other)):
        if a != b:
            return position
    return None if len(reference) == len(other) else min(len(reference), len(other))


@contextmanager
def other_backend() -> Iterator[None]:
    """PyTorch's plain SDPA backend: the same attention, rounded differently."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def why_no_other_backend(model: Any, length: int) -> str | None:
    """Why the unpatched model cannot run on another backend at this length, or None when it can."""
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa":
        return f"the model runs {config._attn_implementation} attention, which has no second backend here"
    needed = 3 * config.num_attention_heads * length**2 * 4  # scores, their softmax and a mask, in float32
    if needed > MATH_LIMIT:
        return f"at {length:,} tokens it would take {needed / 2**30:.0f} GiB"
    return None
