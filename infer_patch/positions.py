"""Packed positions: tokens dropped before the decoder give up their positions to those behind them.

Only rotary positions move. Logical indices, and with them caches, masks and what `generate` counts, stay what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from infer_patch.families import ModelParts
from infer_patch.method import Runtime
from infer_patch.run import Run

_GONE = "tokens that gave up their positions"  # of a sample; remembered by layer 0 of the cache


def why_not_packed(parts: ModelParts) -> str | None:
    """Why positions of this model cannot be packed, None if they can."""
    config = parts.text_config
    rotary = {**(getattr(config, "rope_scaling", None) or {}), **(getattr(config, "rope_parameters", None) or {})}
    if "mrope_section" in rotary:
        return "its positions are places in the picture (M-RoPE), which packing would destroy"
    if any(window is not None for window in parts.windows):
        return "some of its layers attend within a window, which counts original positions"
    return None


def packed_positions(run: Run, packers: Sequence[Runtime], given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the text model to change: position ids [B, T], minus the tokens dropped before each token."""
    tokens, held = run.tokens, run.held(0)
    memory = [] if held is None else [held.memory_of(sample) for sample in range(tokens.batch)]
    earlier = [remembered.get(_GONE, 0) for remembered in memory]
    gone = None
    if tokens.image is not None:
        for runtime in packers:
            keep = runtime.reduce(0, tokens)
            if keep is not None:
                gone = ~keep if gone is None else gone | ~keep
    if not any(earlier) and gone is None:
        return {}
    shift = torch.zeros(tokens.batch, tokens.length, dtype=torch.long, device=tokens.device)
    if any(earlier):
        shift += torch.tensor(earlier, device=tokens.device)[:, None]
    if gone is not None:
        shift += gone.cumsum(1) - gone.long()
        for remembered, before, count in zip(memory, earlier, gone.sum(1).tolist()):
            remembered[_GONE] = before + count
    positions = given.get("position_ids")
    if positions is None:
        positions = torch.arange(tokens.past, tokens.past + tokens.length, device=tokens.device)[None]
    new: dict[str, Any] = {"position_ids": positions - shift}
    if run.cache is None and given.get("attention_mask") is None:
        # without either, transformers takes equal positions for the beginning of another text
        new["attention_mask"] = torch.ones(tokens.batch, tokens.length, dtype=torch.long, device=tokens.device)
    return new
