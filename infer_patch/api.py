"""`patch`, `unpatch` and the `Handle` they work with."""

from __future__ import annotations

import warnings
from types import TracebackType

from torch import nn

from infer_patch.attention import PORT
from infer_patch.availability import check_versions
from infer_patch.engine import Engine
from infer_patch.errors import PatchError
from infer_patch.families import describe
from infer_patch.method import Method
from infer_patch.plan import Plan, PlanLike
from infer_patch.stats import Report, VisualTokens, make_report

_HANDLE = "_infer_patch_handle"


class Handle:
    """A patch that is on a model. Use it as a context manager, or call `remove`.

    Attributes
    ----------
    model : the patched model
    plan : the plan it was patched with
    """

    def __init__(self, model: nn.Module, plan: Plan, engine: Engine):
        self.model = model
        self.plan = plan
        self._engine = engine

    @property
    def active(self) -> bool:
        """Whether the patch is still on the model."""
        return vars(self.model).get(_HANDLE) is self

    def remove(self) -> None:
        """Take the patch off; the model is as it was before. Does nothing the second time.

        Warns
        -----
        UserWarning
            When the model ran but a method of the plan never took effect.
        """
        self._remove(warn=True)

    def _remove(self, warn: bool) -> None:
        if not self.active:
            return
        self._engine.remove()
        delattr(self.model, _HANDLE)
        silent = self.report().silent if warn else []
        if silent:
            warnings.warn(
                f"{', '.join(silent)} never took effect on {self._engine.parts.model_type}; see handle.report().",
                stacklevel=3,
            )

    def report(self, reset: bool = False) -> Report:
        """What the methods did so far: proof of effect. With `reset`, counting starts again."""
        report = make_report(self._engine.stats, self.plan.name, self._engine.parts.model_type)
        if reset:
            self._engine.stats.reset()
        return report

    def record_visual_tokens(self, on: bool = True) -> None:
        """From now on, keep of every call which visual tokens went on and which left; off again with `on=False`.

        Off at first: what is kept holds memory, so record the few calls that are to be looked at.
        """
        self._engine.stats.record = on

    def visual_tokens(self) -> list[VisualTokens]:
        """What was recorded: an entry per forward call that brought visual tokens, for plans that drop some."""
        return list(self._engine.stats.recorded)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove(warn=error is None)

    def __repr__(self) -> str:
        return f"<Handle {self.plan.name!r} on {type(self.model).__name__}, {'on' if self.active else 'off'}>"


def patch(model: nn.Module, plan: PlanLike, *methods: Method, replace: bool = False) -> Handle:
    """Patch a loaded transformers model in place.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder-only language model or multimodal model. Only this instance changes.
    plan : str, Path, Plan or Method
        A preset's name (`infer-patch list`), a YAML file, a plan, or a method; further methods may follow.
    replace : bool
        Take off the patch that is on the model first. Without it, a second patch is refused.

    Returns
    -------
    Handle
        Context manager with `report()` and `remove()`.

    Raises
    ------
    PatchError (a ValueError)
        Before anything is touched: unknown preset or option, a model that is not understood, a method that does not
        apply, methods that collide, a model that is patched already.

    Examples
    --------
    >>> with infer_patch.patch(model, "envelope") as handle:
    ...     model.generate(**inputs)
    >>> print(handle.report())
    """
    check_versions()
    wanted = Plan.of(plan, *methods)
    parts = describe(model)
    present = vars(model).get(_HANDLE)
    if present is not None and not replace:
        raise PatchError(
            f"this model is patched already, with {present.plan.name!r}. Call infer_patch.unpatch(model) first, or "
            "patch(..., replace=True)."
        )
    elsewhere = [m for m in parts.attentions if PORT in vars(m)]
    if elsewhere and present is None:
        raise PatchError("a part of this model (or a model around it) is patched already; unpatch that one first.")
    engine = Engine(parts, wanted)
    if present is not None:
        present.remove()
        engine = Engine(describe(model), wanted)
    engine.install()
    handle = Handle(model, wanted, engine)
    setattr(model, _HANDLE, handle)
    return handle


def unpatch(model: nn.Module) -> None:
    """Take the patch off a model; greedy output is bit-equal to before.

    Raises
    ------
    PatchError
        When the model is not patched.
    """
    handle = vars(model).get(_HANDLE)
    if handle is None:
        raise PatchError(f"this {type(model).__name__} is not patched.")
    handle.remove()


def is_patched(model: nn.Module) -> bool:
    """Whether `patch` is on this model."""
    return _HANDLE in vars(model)
