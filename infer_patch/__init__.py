"""Training-free inference patches for Hugging Face models: one line on, one line off."""

from infer_patch.api import Handle, is_patched, patch, unpatch
from infer_patch.errors import PatchError
from infer_patch.method import Method, methods
from infer_patch.plan import Plan, presets

__version__ = "0.1.0"

__all__ = ["Handle", "Method", "PatchError", "Plan", "is_patched", "methods", "patch", "presets", "unpatch"]
