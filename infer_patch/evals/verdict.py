"""What a comparison found, in plain words. Every word about speed names the length it was measured at."""

from __future__ import annotations

from infer_patch.evals.cost import overlap
from infer_patch.evals.schema import Cost, Count, Effect, Interval, Row

FEW = 3  # measurements below which no difference is claimed to be one
_MEGA = 1e6


def verdict(row: Row, unpatched: Row) -> str:
    """One sentence on quality and cost of a plan against the unpatched model."""
    if row["status"] == "failed":
        return never_took_effect(row["effect"])
    words = [_quality(row, unpatched)]
    if row["status"] == "dense":
        reasons = sorted({r for e in row["effect"] for r in e["figures"].get("dense_calls", {})})
        words.insert(0, f"ran dense throughout ({', '.join(reasons) or 'nothing to leave out'})")
    for effect in row["effect"]:
        fired = effect["fired"]
        if 0 < fired["count"] < fired["of"]:
            words.append(f"{effect['method']} took effect on {fired['count']} of {fired['of']} prompts only")
    if row["cost"] and unpatched["cost"]:
        words += _speed(row["cost"][0], unpatched["cost"][0])
        words += _memory(row["cost"][0], unpatched["cost"][0])
    return "; ".join(words)


def never_took_effect(effects: list[Effect]) -> str:
    """The verdict on a plan that left the model as it was: an error, or a user would trust the numbers beside it."""
    silent = [effect for effect in effects if effect["fired"]["count"] == 0]
    words = []
    for effect in silent:
        why = [
            f"{calls:,} attention calls {what}: {reason}"
            for key, what in (("dense_calls", "ran dense"), ("left_alone", "were left as they are"))
            for reason, calls in effect["figures"].get(key, {}).items()
        ]
        words.append(effect["method"] + (f" ({'; '.join(why)})" if why else ""))
    if silent and all("corrected" in effect["figures"] for effect in silent):
        advice = "Change the options of the plan, or give prompts in which there is something to correct."
    else:
        advice = (
            "Give longer prompts (or pictures, for methods that drop visual tokens), or change the options of the plan."
        )
    return f"FAILED: {', '.join(words)} never took effect, so these figures are those of the unpatched model. {advice}"


def _quality(row: Row, unpatched: Row) -> str:
    drift, same = row["drift"], row["identical"]
    words = _found(row["found"], unpatched["found"])
    if same is not None and (words is None or same["count"] == same["of"]):
        exact = drift is not None and drift["max_logit_gap"] == 0
        if same["count"] == same["of"]:
            text = "same output as unpatched" + (", to the last bit" if exact else "")
        else:
            first = (row["earliest_difference"] or 0) + 1
            text = f"same output as unpatched on {same['count']} of {same['of']}, first difference at token {first}"
            text += "" if drift is None else f", KL {drift['kl_mean']:.2g} nats per token"
        words = text if words is None else f"{words}, {text}"
    return words or "no output to compare"


def _found(own: Count | None, unpatched: Count | None) -> str | None:
    if own is None or unpatched is None:
        return None
    if own["count"] == unpatched["count"]:
        return f"finds {own['count']} of {own['of']}, like unpatched"
    return f"finds {own['count']} of {own['of']} (unpatched {unpatched['count']})"


def _speed(own: Cost, unpatched: Cost) -> list[str]:
    words = [_phase("prefill", own["first_token_s"], unpatched["first_token_s"], f"at {own['prompt_tokens']:,} tokens")]
    if own["per_token_s"] is not None and unpatched["per_token_s"] is not None:
        words.append(_phase("decode", own["per_token_s"], unpatched["per_token_s"], "at this length"))
    return words


def _phase(phase: str, own: Interval, unpatched: Interval, at: str) -> str:
    """A time against the unpatched one, or that no difference was measured."""
    ratio = f"{phase} {own['median'] / unpatched['median']:.2f}x the time {at}"
    if min(own["n"], unpatched["n"]) < FEW:
        return f"{ratio} (measured {times(own['n'])}: too few to judge)"
    if overlap(own, unpatched):
        return f"no measurable difference in {phase} {at}"
    return f"{ratio} (slower than unpatched)" if own["median"] > unpatched["median"] else ratio


def _memory(own: Cost, unpatched: Cost) -> list[str]:
    size, before = megabytes(own["cache_bytes"]), megabytes(unpatched["cache_bytes"])
    return [] if size == before else [f"cache {size} instead of {before}"]


def megabytes(count: float) -> str:
    """12_345_678 -> "12.3 MB"; three figures, so that small models show too."""
    return f"{count / _MEGA:.3g} MB" if count < 1000 * _MEGA else f"{count / _MEGA / 1000:.3g} GB"


def times(n: int) -> str:
    return {1: "once", 2: "twice"}.get(n, f"{n} times")
