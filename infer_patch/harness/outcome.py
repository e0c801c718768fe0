"""What both adapters share: which plan, and what it did."""

from __future__ import annotations

from typing import Any

import infer_patch
from infer_patch.api import Handle
from infer_patch.errors import PatchError, PlanError
from infer_patch.plan import Plan, presets


def read_plan(value: Any) -> Plan:
    """The plan of `plan=...` in model_args: a preset's name or the path of a YAML plan, quoted if it has commas."""
    if isinstance(value, str):
        value = value.strip("\"'")
    if value is None or value == "":
        raise PlanError(
            f"model_args name no plan; add plan=NAME with one of {', '.join(presets())}, or the path of a .yaml file. "
            "plan=identity is the baseline."
        )
    return Plan.of(value)


def refuse_remote_code(trust_remote_code: Any) -> None:
    """Raise unless the option is off: infer_patch never runs code that comes with a checkpoint."""
    if trust_remote_code:
        raise PatchError(
            f"trust_remote_code={trust_remote_code!r}: infer_patch patches the models of transformers and never runs "
            "code that comes with a checkpoint. Leave the option out."
        )


def only_stores(plan: Plan) -> bool:
    """Whether every method of the plan acts on the cache alone, so that one pass without a cache cannot show it."""
    return bool(plan.methods) and all(set(method.active_ports()) == {"store"} for method in plan)


def record(handle: Handle) -> dict[str, Any]:
    """Plan and proof of effect, ready for a results file."""
    return {
        "version": infer_patch.__version__,
        "plan": handle.plan.to_dict(),
        "report": handle.report().to_dict(),
    }


def warning(handle: Handle) -> str | None:
    """Why the scores say nothing about the plan, if so."""
    report = handle.report()
    if not handle.plan.methods:
        return None
    if not report.calls:
        return (
            f"plan {report.plan}: the model never ran (did all answers come from a cache?), so nothing shows that the "
            "plan took effect."
        )
    if report.silent:
        return (
            f"plan {report.plan}: {', '.join(report.silent)} never took effect; the scores are those of the unpatched "
            "model. The report says why."
        )
    return None
