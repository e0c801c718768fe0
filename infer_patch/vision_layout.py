"""From patches of the vision encoder to the visual tokens that the decoder gets: one value per token.

Values go the way the features go: through the model's own functions where it has any, so that the geometry of tiles,
cropping and newline tokens is the model's. Where patches merge into one token, it gets their mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TEXT, NEWLINE, SPECIAL = -1, -2, -3  # what a token is, where it is not one of a tile


def packed_tiles(patches: Tensor, pack: dict[str, Any], owner: Any) -> tuple[Tensor, Tensor]:
    """Tiles of LLaVA-NeXT and OneVision through the model's `pack_image_features`: values [N, C] and tile [N].

    Parameters
    ----------
    patches : float32 Tensor [R, n, C]
        Values of all tiles of all pictures; C is the number of values.
    pack : dict
        The arguments that the model called `pack_image_features` with.
    owner : nn.Module
        The module that has this method.

    Notes
    -----
    A one-hot channel per tile goes along, because OneVision resamples large maps: the largest channel is the tile.
    """
    counts = [len(feature) for feature in pack["image_features"]]
    most, kinds = max(counts), patches.shape[-1]
    channels = []
    for tiles, part in zip(counts, patches.split(counts)):
        one_hot = torch.eye(tiles, most, device=patches.device)[:, None].expand(-1, part.shape[1], -1)
        channels.append(torch.cat([part, one_hot], -1))
    arguments = dict(pack, image_features=channels)
    if arguments.get("image_newline") is not None:
        newline = torch.zeros(kinds + most, device=patches.device)
        newline[:kinds] = float("nan")
        arguments["image_newline"] = newline
    packed = torch.cat(list(type(owner).pack_image_features(owner, **arguments)[0]))
    values, one_hot = packed[:, :kinds], packed[:, kinds:]
    tile = torch.where(values.isnan().any(-1), SPECIAL, one_hot.argmax(-1))
    return values, torch.where(one_hot.sum(-1) == 0, NEWLINE, tile)


def pooled_patches(patches: Tensor, owner: Any) -> Tensor:
    """Patches [R, n, C] of towers whose neighbours are shuffled or pooled into one token, or are tokens: [N, C]."""
    side = round(patches.shape[1] ** 0.5)
    connector, projector = getattr(owner, "connector", None), getattr(owner, "multi_modal_projector", None)
    one_by_one = patches.split(1, -1)
    if hasattr(owner, "pixel_shuffle"):  # InternVL
        ratio = owner.config.downsample_ratio
        squares = [owner.pixel_shuffle(x.reshape(-1, side, side, 1), scale_factor=ratio) for x in one_by_one]
        packed = [x.mean(-1).flatten(1) for x in squares]
    elif connector is not None and hasattr(connector, "pixel_shuffle"):  # Idefics3, SmolVLM
        packed = [connector.pixel_shuffle(x, connector.scale_factor).mean(-1) for x in one_by_one]
    elif isinstance(pool := getattr(projector, "avg_pool", None), nn.Module):  # Gemma 3
        packed = [pool(x.reshape(-1, 1, side, side)).flatten(1) for x in one_by_one]
    else:
        return patches.flatten(0, 1)
    return torch.stack(packed, -1).flatten(0, 1)


def merged_units(patches: Tensor, grids: Tensor, tower: Any) -> Tensor:
    """Patches [P, C] of a Qwen-VL tower in the order its blocks see them -> tokens [N, C] in the decoder's order.

    grids [pictures, 3] are frames, rows and columns in patches.
    """
    side = int(tower.spatial_merge_size)
    tokens = patches.unflatten(0, (-1, side * side)).mean(1)
    if not getattr(tower, "window_size", None):
        return tokens
    order = window_order(grids, side, int(tower.window_size) // side // int(tower.patch_size))
    in_place = torch.empty_like(tokens)
    in_place[order.to(tokens.device)] = tokens
    return in_place


def window_order(grids: Tensor, merge: int, window: int) -> Tensor:
    """Token numbers of Qwen2.5-VL in the order its vision blocks see them, window by window: int64 [N].

    A window spans `window` x `window` tokens, each of `merge` x `merge` patches.
    """
    order: list[Tensor] = []
    first = 0
    for frames, rows, columns in grids.tolist():
        rows, columns = rows // merge, columns // merge
        number = torch.arange(frames * rows * columns).view(frames, rows, columns)
        for frame in number:
            for band in frame.split(window, 0):
                order += [block.flatten() + first for block in band.split(window, 1)]
        first += number.numel()
    return torch.cat(order)
