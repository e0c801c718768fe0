"""The machine a result was measured on: plain values for result files and for `infer-patch doctor`."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from infer_patch.availability import installed_version

_PACKAGES = ("infer_patch", "torch", "transformers", "triton", "flash-attn", "bitsandbytes")


def machine() -> dict[str, Any]:
    """Processor, threads, memory, GPUs and versions. Nothing in it names a user, a host or a path."""
    import torch

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": memory_gib(),
        "gpus": [torch.cuda.get_device_name(i) for i in gpus],
        "gpu_memory_gib": [round(torch.cuda.get_device_properties(i).total_memory / 2**30, 1) for i in gpus],
        "cuda": torch.version.cuda,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Python and the packages that decide what a run computes; absent ones are left out."""
    found = {name: installed_version(name) for name in _PACKAGES}
    if found["infer_patch"] in (None, "unknown"):  # running from a checkout that is not installed
        from infer_patch import __version__

        found["infer_patch"] = __version__
    return {"python": platform.python_version(), **{name: v for name, v in found.items() if v is not None}}


def cpu_model() -> str:
    """The processor's name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("model name", "hardware")) and ":" in line:
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def usable_cores() -> int:
    """Logical cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> float | None:
    """Main memory in GiB; None where the system does not tell."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
