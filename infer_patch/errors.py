"""Every exception this package raises on purpose.

What a user can put right is a `ValueError`, so that code which knows nothing of this package still catches
it. A message says what came, what was expected, and the way out.
"""


class PatchError(ValueError):
    """Base class of all errors about models, plans, calls and artifacts."""


class UnsupportedModelError(PatchError):
    """The model lacks a part that a method needs, or is built in a way that cannot be patched."""


class PlanError(PatchError):
    """A method, a value of its configuration, or a plan file is not valid."""


class ConflictError(PlanError):
    """Two methods of a plan claim the same port of the same layer, or one takes away what the other needs."""


class UnsupportedCallError(PatchError):
    """A `forward` or `generate` call that the patched model cannot serve faithfully."""


class ArtifactError(PatchError):
    """A calibration artifact is missing, damaged, too new, or belongs to another method or model."""


class MissingDependencyError(ImportError):
    """A package is not installed, or is older than the oldest supported release."""
