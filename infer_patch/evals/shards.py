"""One of several processes that share an evaluation, as `torchrun` and `accelerate launch --multi_gpu` start them."""

from __future__ import annotations

import os
from dataclasses import dataclass

from infer_patch.availability import require


@dataclass(frozen=True)
class Shard:
    """Process `rank` of `count`."""

    rank: int = 0
    count: int = 1

    @classmethod
    def from_environment(cls) -> Shard:
        """RANK and WORLD_SIZE, as launchers set them; a single process without them."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def of(self, batches: int) -> range:
        """Numbers of the batches that this process answers."""
        return range(self.rank, batches, self.count)

    def wait(self) -> None:
        """Until every process is here."""
        if self.count == 1:
            return
        require("accelerate", "Sharing an evaluation between processes")
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()
