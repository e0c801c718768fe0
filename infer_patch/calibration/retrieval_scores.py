"""The retrieval score of an attention head, from what it attended to while an answer was generated (arXiv 2404.15574).

At every step a head has one key that it attends to most. Where that key is a token of the needle and the very token
that the step produces, the head has copied it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

COVERED = 0.9  # of the needle's different ids a window must hold more than this


def find_span(prompt_ids: Sequence[int], needle_ids: Sequence[int]) -> tuple[int, int] | None:
    """First and one-past-last place of the needle in the prompt: the first window of its length that holds more than
    90 % of its different ids, so that a token changed at a seam does no harm. None without such a window."""
    wanted, length = set(needle_ids), len(needle_ids)
    for start in range(len(prompt_ids) - length + 1 if wanted else 0):
        if len(wanted & set(prompt_ids[start : start + length])) > COVERED * len(wanted):
            return start, start + length
    return None


def copy_scores(
    most: Tensor, produced: Sequence[int], prompt_ids: Sequence[int], span: tuple[int, int], unique: bool = False
) -> Tensor:
    """Share of the needle that each head copied.

    Parameters
    ----------
    most : int64 Tensor [steps, L, H]
        Place of the key that each head attends to most, from the step that reads the last prompt token on.
    produced : sequence of int
        The token that each of these steps produced: its output, not its input.
    prompt_ids : sequence of int
    span : (int, int)
        Of the needle in the prompt.
    unique : bool
        Count every different token once, as the paper defines the score, at most 1. The released code, and the
        default here, counts occurrences over the needle's length: a repeated answer counts again.

    Returns
    -------
    float32 Tensor [L, H]
    """
    start, stop = span
    inside = (most >= start) & (most < stop)
    attended = torch.tensor(list(prompt_ids))[most.clamp(0, len(prompt_ids) - 1)]
    copied = inside & (attended == torch.tensor(list(produced))[:, None, None])
    if not unique:
        return copied.sum(0) / (stop - start)
    needle = sorted(set(prompt_ids[start:stop]))
    ids = torch.tensor(list(produced))
    return torch.stack([copied[ids == token].any(0) for token in needle]).float().mean(0)


def most_attended(q: Tensor, k: Tensor, window: int | None = None) -> Tensor:
    """Which key the last query of each head attends to most, the first of equals: q [b, H, T, D], k [b, H_kv, S, D] ->
    int64 [b, H]. With a window of the layer's own, among the last so many keys. Softmax keeps the order, so no
    probability is computed."""
    first = 0 if window is None else max(k.shape[2] - window, 0)
    row = q[:, :, -1:].float().unflatten(1, (k.shape[1], -1))
    scores = row @ k[:, :, None, first:].float().transpose(-1, -2)
    return scores[..., 0, :].argmax(-1).flatten(1) + first


def recall_of_words(output: str, reference: str) -> float:
    """ROUGE-1 recall: share of the reference's words in the output, in lower case.

    The usual tool strips endings with Porter's stemmer first. References here are numbers, which have none.
    """
    said, wanted = (Counter(re.findall(r"[a-z0-9]+", text.lower())) for text in (output, reference))
    return sum((said & wanted).values()) / max(sum(wanted.values()), 1)
