"""lmms-eval with a plan on the model.

    lmms-eval --model infer_patch --model_args pretrained=FOLDER,plan=fastv --tasks TASK

The entry point `lmms_eval.models` makes the name known. The work is done by a model class of lmms-eval, the backend:
prompts, pictures and batches are its own.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, PreTrainedModel

from infer_patch.api import Handle, patch
from infer_patch.availability import require
from infer_patch.demo_vlm import demo_vlm_path
from infer_patch.errors import PatchError
from infer_patch.harness.outcome import read_plan, record, refuse_remote_code, warning
from infer_patch.plan import Plan

require("lmms-eval", "The lmms-eval adapter")

from lmms_eval.api.model import lmms  # noqa: E402
from lmms_eval.utils import simple_parse_args_string  # noqa: E402
from loguru import logger  # noqa: E402  (lmms-eval's own log)

_BACKENDS = {  # model types whose backend has another name
    "internvl": "internvl_hf",
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "llava_onevision": "llava_hf",
}


class InferPatch(lmms):
    """A backend of lmms-eval with a plan on its model; `create_from_arg_string` returns an instance of that backend.

    model_args
    ----------
    pretrained : hub id or folder; "demo-vlm" is the demo model of infer_patch.
    plan : a preset's name or the path of a YAML plan. "identity" is the baseline.
    backend : the name that `--model` would have without infer_patch. Default: the one for the checkpoint's model type.
    report : a JSON file to write, with the plan and what it did.
    Everything else goes to the backend.
    """

    is_simple: ClassVar[bool] = False

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        """Called by lmms-eval with the text of `--model_args`, and batch size and device."""
        from lmms_eval.models import get_model

        options = simple_parse_args_string(arg_string)
        options.update({name: value for name, value in (additional_config or {}).items() if value is not None})
        plan = read_plan(options.pop("plan", None))
        report = _report_file(options.pop("report", None))
        refuse_remote_code(options.pop("trust_remote_code", False))
        if options.get("pretrained") == "demo-vlm":
            options["pretrained"] = str(demo_vlm_path())
        name = options.pop("backend", None) or _backend_of(options.get("pretrained"))
        backend = get_model(name, force_simple=cls.is_simple)
        patched = type(f"InferPatch_{name}", (_Patched, backend), {"__module__": __name__})
        return patched(plan, report, **_placed(backend, options))


class InferPatchSimple(InferPatch):
    """The same for `--force_simple`."""

    is_simple = True


class _Escape(BaseException):
    """Carries an error past the `except Exception` of backends, which would score it as an empty answer."""

    def __init__(self, error: Exception):
        self.error = error


class _Patched(lmms):
    """Mixed into a backend: patches its model, and reports and unpatches when lmms-eval cleans up."""

    def __init__(self, plan: Plan, report: Path | None, **options: Any) -> None:
        super().__init__(**options)
        model = getattr(self, "model", None)
        if not isinstance(model, PreTrainedModel):
            raise PatchError(
                f"the lmms-eval backend {type(self).__mro__[2].__name__} holds a {type(model).__name__}, not a model "
                "of transformers. Choose another with backend=NAME."
            )
        self.handle: Handle | None = patch(model, plan)
        self._report_file = report
        model.generate = _escaping(model.generate)

    def generate_until(self, requests: Any) -> Any:
        with _errors():
            return super().generate_until(requests)

    def generate_until_multi_round(self, requests: Any) -> Any:
        with _errors():
            return super().generate_until_multi_round(requests)

    def generate_visual_cot(self, requests: Any) -> Any:
        with _errors():
            return super().generate_visual_cot(requests)

    def clean(self) -> None:
        """Called by lmms-eval when all requests are answered; it then lets go of the model."""
        if self.handle is not None:
            self._conclude(self.handle)
            del self.handle.model.generate
            self.handle._remove(warn=False)  # the log said so already
            self.handle = None
        super().clean()

    def _conclude(self, handle: Handle) -> None:
        if self.rank != 0:
            return
        logger.info(f"{handle.report()}")
        problem = warning(handle)
        if problem:
            logger.warning(problem)
        if self._report_file is not None:
            self._report_file.write_text(json.dumps(record(handle), indent=2) + "\n", encoding="utf-8")


def _escaping(generate: Any) -> Any:
    @functools.wraps(generate)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return generate(*args, **kwargs)
        except Exception as error:
            raise _Escape(error) from error

    return call


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except _Escape as escape:
        raise escape.error from None


def _backend_of(pretrained: Any) -> str:
    """The backend that serves a checkpoint's model type."""
    from lmms_eval.models import list_available_models

    if not isinstance(pretrained, str):
        raise PatchError(f"model_args need pretrained=FOLDER or a hub id, got {pretrained!r}")
    try:
        model_type = AutoConfig.from_pretrained(pretrained, trust_remote_code=False).model_type
    except (OSError, ValueError) as error:
        raise PatchError(f"cannot load {pretrained!r}: {error}") from error
    name = _BACKENDS.get(model_type, model_type)
    if name not in list_available_models(include_aliases=True):
        raise PatchError(
            f"lmms-eval has no model named after {model_type!r}; say which one to use with backend=NAME "
            "(`lmms-eval models` lists them)."
        )
    return name


def _placed(backend: type, options: dict[str, Any]) -> dict[str, Any]:
    """Options with the device filled in: backends take a GPU for granted, and "" is no device map any more."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return options  # one process per GPU: the backend places its model
    known = inspect.signature(backend).parameters
    device = options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    return {**{name: device for name in ("device", "device_map") if name in known}, **options}


def _report_file(value: Any) -> Path | None:
    if value is None:
        return None
    path = Path(str(value))
    if not path.parent.is_dir():
        raise PatchError(f"cannot write the report {path}: there is no folder {path.parent}")
    return path
