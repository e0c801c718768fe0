"""Load a model together with what turns words and pictures into its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from infer_patch.availability import require
from infer_patch.errors import PatchError


def load(
    name: str, device: str = "auto", dtype: str = "auto", on_status: Callable[[str], None] | None = None
) -> tuple[Any, Any]:
    """A model in eval mode on its device, and its processor (or tokenizer, for text-only models).

    Parameters
    ----------
    name : str
        "demo" (a language model), "demo-vlm" (a small vision-language model inside this package), a hub id, or a
        folder. Code that comes with a checkpoint is never run.
    device : str
        "cpu", "cuda", ...; "auto" takes a GPU if there is one.
    dtype : str
        "auto" is float32 on the CPU and the checkpoint's own precision on a GPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_device(device)
    if name == "demo":
        return _demo(device, dtype, on_status)
    if name == "demo-vlm":
        return _demo_vlm(device, dtype)
    if on_status is not None:
        on_status(f"Loading {name}")
    return _from_pretrained(name, device, dtype)


def device_and_dtype(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """For tensors that belong to no model; "auto" takes a GPU if there is one, float32 on a CPU, bfloat16 elsewhere."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _check_device(device)
    chosen = torch.device(device)
    return chosen, _precision(dtype) or (torch.float32 if chosen.type == "cpu" else torch.bfloat16)


def open_images(paths: Sequence[Path]) -> tuple[Any, ...]:
    """Pictures in RGB."""
    if not paths:
        return ()
    require("pillow", "Reading images")
    from PIL import Image, UnidentifiedImageError

    images = []
    for path in paths:
        try:
            images.append(Image.open(path).convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PatchError(f"cannot read the image {path}: {reason}") from error
    return tuple(images)


def _demo(device: str, dtype: str, on_status: Callable[[str], None] | None) -> tuple[Any, Any]:
    from infer_patch.demo_model import load_demo_llm

    try:
        model, tokenizer = load_demo_llm(_precision(dtype) or torch.float32, on_status)
    except FileNotFoundError as error:
        raise PatchError(str(error)) from error
    return _placed(model, device), tokenizer


def _demo_vlm(device: str, dtype: str) -> tuple[Any, Any]:
    from infer_patch.demo_vlm import load_demo_vlm

    model, processor = load_demo_vlm(_precision(dtype) or (torch.float32 if device == "cpu" else torch.bfloat16))
    return _placed(model, device), processor


def _from_pretrained(name: str, device: str, dtype: str) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    precision = _precision(dtype) or (torch.float32 if device == "cpu" else "auto")
    own_code: dict[str, Any] = {"trust_remote_code": False}  # left out, transformers would ask on the terminal
    try:
        config = AutoConfig.from_pretrained(name, **own_code)
        vision = getattr(config, "vision_config", None) is not None
        processor = (AutoProcessor if vision else AutoTokenizer).from_pretrained(name, **own_code)
        auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
        model = auto.from_pretrained(name, dtype=precision, **own_code)
    except (OSError, ValueError, ImportError) as error:
        raise PatchError(f"cannot load {name!r}: {error}") from error
    return _placed(model, device), processor


def _placed(model: Any, device: str) -> Any:
    return model.to(device).eval()


def _precision(dtype: str) -> torch.dtype | None:
    known = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise PatchError(f"unknown dtype {dtype!r}; give one of {', '.join(known)}.")
    return known[dtype]


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise PatchError(f"unknown device {device!r}; give cpu, cuda, cuda:1 or auto.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise PatchError("no CUDA device is available to this PyTorch; use --device cpu, or see `infer-patch doctor`.")
