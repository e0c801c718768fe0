"""How outputs of POPE are read as yes or no, by the three parsers in use, and the metrics over them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from infer_patch.errors import PatchError


def official(text: str) -> bool:
    """Whether the scripts of POPE and LLaVA read `text` as yes.

    They keep what stands before the first full stop, delete commas and split at single spaces. "No", "no" and "not"
    are the only words that mean no: an empty output, "NO" and "isn't" count as yes.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def exact(text: str) -> bool | None:
    """True or False if the output is yes or no and nothing else, in upper or lower case (lmms-eval)."""
    return {"yes": True, "no": False}.get(text.strip().lower())


def strict(text: str) -> bool | None:
    """True or False if one of the words yes and no is in the output, None if neither or both are (VLMEvalKit)."""
    words = _words(text)
    return None if ("yes" in words) == ("no" in words) else "yes" in words


def parsed(text: str) -> bool:
    """Whether a word yes or no is in the output; where none is, `official` falls back to a guess."""
    return not _words(text).isdisjoint({"yes", "no"})


def binary_metrics(labels: Sequence[bool], predictions: Sequence[bool]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and share of predicted yes, as shares; 0 where one would divide by zero."""
    if len(labels) != len(predictions):
        raise PatchError(f"{len(labels)} labels and {len(predictions)} predictions; give one prediction per label.")
    hits = sum(label and guess for label, guess in zip(labels, predictions))
    actual, claimed = sum(map(bool, labels)), sum(map(bool, predictions))
    right = sum(bool(label) == bool(guess) for label, guess in zip(labels, predictions))
    return {
        "accuracy": right / max(len(labels), 1),
        "precision": hits / max(claimed, 1),
        "recall": hits / max(actual, 1),
        "f1": 2 * hits / max(claimed + actual, 1),
        "yes_ratio": claimed / max(len(labels), 1),
    }


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*", text.lower()))
