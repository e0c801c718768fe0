"""Which implementation of an operation runs.

On NVIDIA GPUs the Triton kernels, everywhere else (and for calls they do not serve) the torch path "cpu". An argument
or the environment variable INFER_PATCH_KERNELS overrides the choice. Triton is imported when a kernel is first called.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection
from functools import cache

import torch
from torch import Tensor

MIN_CAPABILITY = (8, 0)
MAX_SIZE = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}  # more would spill registers


def choose(implementation: str | None, known: Collection[str], *tensors: Tensor, refusal: str | None = None) -> str:
    """Name of the implementation to run on `tensors`.

    Parameters
    ----------
    implementation : str or None
        What the caller asked for; else INFER_PATCH_KERNELS, else the automatic choice.
    known : collection of str
        The implementations there are.
    refusal : str, optional
        Why the operation's own Triton kernel cannot serve this call.

    Raises
    ------
    ValueError
        If the name is unknown, or "triton" was asked for and cannot run.
    """
    name = implementation or os.environ.get("INFER_PATCH_KERNELS")
    if name and name not in known:
        raise ValueError(f"unknown kernel implementation {name!r}; choose from {', '.join(known)}")
    if name and name != "triton":
        return name
    if not name and not tensors[0].is_cuda:
        return "cpu"
    reason = refusal or triton_refusal(tensors[0].device) or _tensor_refusal(*tensors)
    if name and reason:
        raise ValueError(f"the Triton kernels cannot run: {reason}. Use the implementation 'cpu', on any device.")
    return "cpu" if reason else "triton"


def triton_refusal(device: torch.device | str) -> str | None:
    """Why the Triton kernels cannot run on a device; None where they can. Imports nothing."""
    device = torch.device(device)
    if not _triton_is_installed():
        return 'triton is not installed (pip install "infer_patch[triton]")'
    if device.type != "cuda":
        # Triton's interpreter, on the processor: for tests
        return None if os.environ.get("TRITON_INTERPRET") == "1" else f"they need an NVIDIA GPU, not {device}"
    if torch.version.hip:
        return "they are not tested on AMD GPUs"
    capability = _capability(device.index if device.index is not None else torch.cuda.current_device())
    if capability < MIN_CAPABILITY:
        found, least = (".".join(map(str, pair)) for pair in (capability, MIN_CAPABILITY))
        return f"the GPU has compute capability {found}, and {least} is needed"
    return None


def _tensor_refusal(*tensors: Tensor) -> str | None:
    dtypes = {x.dtype for x in tensors}
    if len(dtypes) > 1 or not dtypes <= set(MAX_SIZE):
        return f"need one dtype of float32, bfloat16 and float16, got {', '.join(sorted(map(str, dtypes)))}"
    size, dtype = max(x.shape[-1] for x in tensors), tensors[0].dtype
    if size > MAX_SIZE[dtype]:
        return f"the head size is {size}, and {MAX_SIZE[dtype]} is the largest for {dtype}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "gradients are wanted, and the kernels have none (wrap the call in torch.no_grad())"
    return None


@cache
def _triton_is_installed() -> bool:
    spec = importlib.util.find_spec("triton")
    return spec is not None and spec.origin is not None  # no origin: merely a folder of that name


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
