"""What lmms-eval's entry point `lmms_eval.models` finds; read whenever lmms-eval starts, so it imports next to nothing.

lm-eval has no such entry point: there, importing `infer_patch.harness.lm_eval` registers the model.
"""

from typing import Any


def lmms_eval_models() -> Any:
    """The manifest of the model `infer_patch`: one class for chat tasks, one for `--force_simple`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    place = "infer_patch.harness.lmms_eval"
    return ModelManifest(
        "infer_patch", simple_class_path=f"{place}.InferPatchSimple", chat_class_path=f"{place}.InferPatch"
    )
