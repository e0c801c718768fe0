"""Which place of a picture each visual token stands for, in the families where the tokens of a picture form one grid.

    grids = picture_grids(inputs, model.config)      # one per picture of the batch, None where there is no single grid
    row, column = token_places(tokens.image, grids)  # int64 [B, T] each, -1 where a token has no place

Known are LLaVA-1.5 (patches of a ViT) and Qwen-VL (patches merged 2 x 2). In other families a picture is cut into
tiles, thumbnails and newline tokens, or resampled; their tokens have no place here, rather than a guessed one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ONE_GRID_TOWERS = {"clip_vision_model", "siglip_vision_model"}  # of model type llava
_MERGED_PATCHES = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}


@dataclass(frozen=True)
class Grid:
    """Tokens of one picture: row by row, after `leading` tokens that stand for no place (a CLS token)."""

    rows: int
    columns: int
    leading: int = 0

    @property
    def tokens(self) -> int:
        return self.leading + self.rows * self.columns


def picture_grids(inputs: Mapping[str, Any], config: Any) -> list[Grid | None]:
    """The grid of every picture of a batch, sample by sample; None for those whose tokens form no single grid.

    Parameters
    ----------
    inputs : mapping
        What the processor made, or what the model's forward was given: `pixel_values`, and `image_grid_thw` if the
        family has it.
    config : PreTrainedConfig
        Of the whole model.

    Returns
    -------
    list of Grid or None
        Empty when the inputs hold no pictures that this module knows to count. Videos are not counted.
    """
    kind, vision = getattr(config, "model_type", ""), getattr(config, "vision_config", None)
    pixels, sizes = inputs.get("pixel_values"), inputs.get("image_grid_thw")
    if kind in _MERGED_PATCHES and isinstance(sizes, Tensor):
        side = int(vision.spatial_merge_size)  # type: ignore[union-attr]
        return [
            Grid(rows // side, columns // side) if frames == 1 else None for frames, rows, columns in sizes.tolist()
        ]
    if not isinstance(pixels, Tensor) or pixels.ndim != 4:
        return []
    if kind != "llava" or getattr(vision, "model_type", "") not in _ONE_GRID_TOWERS:
        return [None] * len(pixels)
    patch = int(vision.patch_size)  # type: ignore[union-attr]
    with_cls = vision.model_type == "clip_vision_model" and config.vision_feature_select_strategy == "full"  # type: ignore[union-attr]
    return [Grid(pixels.shape[2] // patch, pixels.shape[3] // patch, int(with_cls))] * len(pixels)


def token_places(image: Tensor, grids: Sequence[Grid | None]) -> tuple[Tensor, Tensor]:
    """Row and column of every token, int64 [B, T] each; -1 for text, and where a picture's tokens form no single grid.

    Parameters
    ----------
    image : int64 Tensor [B, T]
        Number of the picture within its sample, -1 for text (`Tokens.image`).
    grids : sequence of Grid or None
        One per picture, sample by sample, as `picture_grids` gives them. A picture that has another number of tokens
        than its grid (a chunk of a prompt may hold a part of one) gets no places.
    """
    row, column = torch.full_like(image, -1), torch.full_like(image, -1)
    counts = [int(n) + 1 for n in image.amax(1).tolist()]
    if sum(counts) != len(grids):
        return row, column
    left = iter(grids)
    for sample, pictures in enumerate(counts):
        for number in range(pictures):
            grid, here = next(left), (image[sample] == number).nonzero()[:, 0]
            if grid is None or len(here) != grid.tokens:
                continue
            cell = torch.arange(grid.rows * grid.columns, device=image.device)
            row[sample, here[grid.leading :]] = cell // grid.columns
            column[sample, here[grid.leading :]] = cell % grid.columns
    return row, column
