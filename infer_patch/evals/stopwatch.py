"""Time between two marks: of the process on a CPU, of the stream on a GPU (where calls return before work is done)."""

from __future__ import annotations

import time
from typing import Any

import torch

from infer_patch.errors import PatchError


class Stopwatch:
    """Marks and the seconds between them.

    Parameters
    ----------
    device : torch.device
        On CUDA a mark is an event in the stream: setting one does not wait.
    clock : {"wall", "cpu"}
        "cpu" counts the processor time of this process: on a busy CPU it leaves out the wait for a free core. It adds
        up over threads, so use one.
    """

    def __init__(self, device: torch.device, clock: str = "wall"):
        if clock not in ("wall", "cpu"):
            raise PatchError(f"clock must be wall or cpu, got {clock!r}")
        if clock == "cpu" and device.type != "cpu":
            raise PatchError("the cpu clock does not see the work of a GPU; measure with clock wall.")
        self._device = device
        self._now = time.process_time if clock == "cpu" else time.perf_counter

    def mark(self) -> Any:
        if self._device.type != "cuda":
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two marks; on a GPU this waits for the second."""
        if self._device.type != "cuda":
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def settle(self) -> None:
        """Wait for all work so far."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
