"""Training-free inference patches for Hugging Face models: one line on, one line off."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infer_patch.api import Handle, is_patched, patch, unpatch
    from infer_patch.errors import PatchError
    from infer_patch.method import Method, methods
    from infer_patch.plan import Plan, presets

__version__ = "0.1.0"

__all__ = ["Handle", "Method", "PatchError", "Plan", "is_patched", "methods", "patch", "presets", "unpatch"]

_PLACES = {
    "api": ("Handle", "is_patched", "patch", "unpatch"),
    "errors": ("PatchError",),
    "method": ("Method", "methods"),
    "plan": ("Plan", "presets"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch takes seconds, and `infer-patch --help` does not need it."""
    for module, names in _PLACES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"infer_patch.{module}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
