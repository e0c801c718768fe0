"""Plans: an ordered set of methods that is validated, saved and loaded as one thing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import yaml

from infer_patch.errors import ConflictError, PlanError
from infer_patch.method import Method, _ranges, method_from_dict

if TYPE_CHECKING:
    from infer_patch.families import ModelParts

PlanLike = Union["Plan", Method, str, Path, "list[Method]", "tuple[Method, ...]"]


@dataclass(frozen=True)
class Plan:
    """An ordered set of methods, applied together.

    Parameters
    ----------
    methods : tuple of Method
        Applied in the order of the ports (reduce, select, calibrate, store), and in this order within a port. An empty
        plan is the identity: the engine is in place and changes nothing.
    name : str
        How reports and tables call the plan.
    """

    methods: tuple[Method, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(self.methods))
        for method in self.methods:
            if not isinstance(method, Method):
                raise PlanError(f"a plan holds methods, got {method!r} of type {type(method).__name__}")
        if not self.name:
            object.__setattr__(self, "name", "+".join(m.name for m in self.methods) or "identity")

    def __iter__(self) -> Iterator[Method]:
        return iter(self.methods)

    def resolve(self, parts: ModelParts) -> list[tuple[Method, tuple[int, ...]]]:
        """Each method with the layers it acts on in this model; raises when one cannot serve it or two collide."""
        resolved = []
        for method in self.methods:
            layers = method.resolve_layers(parts)
            resolved.append((method, layers))
        for i, (second, second_layers) in enumerate(resolved):
            for first, first_layers in resolved[:i]:
                shared = tuple(sorted(set(first_layers) & set(second_layers)))
                reason = _conflict(first, second)
                if reason and shared:
                    raise ConflictError(
                        f"{first.name} and {second.name} both act on layers {_ranges(shared)}: {reason}. "
                        "Give them different `layers`, or leave one out."
                    )
        return resolved

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "methods": [m.to_dict() for m in self.methods]}

    def to_yaml(self) -> str:
        """The plan as YAML text; `Plan.from_yaml` reads it back to an equal plan."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    @classmethod
    def from_dict(cls, values: Any) -> Plan:
        if not isinstance(values, dict) or not isinstance(values.get("methods", []), list):
            raise PlanError(f"a plan is a mapping with `name:` and a list `methods:`, got {values!r}")
        unknown = sorted(set(values) - {"name", "methods", "description"})
        if unknown:
            raise PlanError(f"a plan has `name`, `description` and `methods`, got also {', '.join(unknown)}")
        return cls(tuple(method_from_dict(m) for m in values.get("methods", [])), name=str(values.get("name", "")))

    @classmethod
    def from_yaml(cls, text: str) -> Plan:
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise PlanError(f"the plan is not valid YAML: {error}") from error
        return cls.from_dict(values)

    @classmethod
    def of(cls, plan: PlanLike, *more: Method) -> Plan:
        """A plan from whatever a user passes: a preset's name, a YAML file, a method or several, or a plan."""
        if isinstance(plan, Plan):
            return cls(plan.methods + more, name="" if more else plan.name)
        if isinstance(plan, (list, tuple)):
            return cls((*plan, *more))
        if isinstance(plan, Method):
            return cls((plan, *more))
        if isinstance(plan, Path) or (isinstance(plan, str) and plan.endswith((".yaml", ".yml"))):
            return cls.of(cls.load(plan), *more)
        if isinstance(plan, str):
            return cls.of(cls.preset(plan), *more)
        raise PlanError(
            f"cannot make a plan of {plan!r}: pass a preset's name, a .yaml file, a Plan, or one or more methods"
        )

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise PlanError(f"cannot read the plan file {path}: {error.strerror or error}") from error
        return cls.from_yaml(text)

    @classmethod
    def preset(cls, name: str) -> Plan:
        """A plan from `infer_patch/configs/<name>.yaml`."""
        if name not in presets():
            raise PlanError(f"unknown preset {name!r}; presets: {', '.join(presets())}; or give a path to a .yaml file")
        return cls.from_yaml(_configs().joinpath(f"{name}.yaml").read_text(encoding="utf-8"))


def presets() -> list[str]:
    """Names of the plans that ship with the package."""
    return sorted(f.name.removesuffix(".yaml") for f in _configs().iterdir() if f.name.endswith(".yaml"))


def preset_description(name: str) -> str:
    """The `description:` line of a preset."""
    values = yaml.safe_load(_configs().joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    return str(values.get("description", ""))


def _configs() -> Any:
    return resources.files("infer_patch").joinpath("configs")


def _conflict(first: Method, second: Method) -> str | None:
    """Why two methods cannot act on the same layer, or None if they can."""
    a, b = first.active_ports(), second.active_ports()
    if "store" in a and "store" in b:
        return "a layer's keys and values can be kept in one way only"
    if "select" in a and "select" in b:
        return "a layer's key blocks can be selected by one method only"
    orders = first.calibration_order, second.calibration_order
    if "calibrate" in a and "calibrate" in b and (None in orders or orders[0] == orders[1]):
        return (
            "each works out its correction from the model's own attention, which the other has changed, and which of "
            "the two comes first is not defined"
        )
    for x, y in ((first, second), (second, first)):
        if "calibrate" in x.active_ports() and "select" in y.active_ports():
            return f"{x.name} redistributes whole attention rows, and {y.name} leaves most of each row unread"
        if x.keeps_packed() and {"select", "calibrate"} & set(y.active_ports()):
            return f"{x.name} packs keys and values, and {y.name} has to read them"
        if "calibrate" in x.active_ports() and "store" in y.active_ports():
            return f"{x.name} reads keys and values as the model made them, and {y.name} keeps them in its own way"
    return None
