"""From the blocks of the vision encoder to the decoder's tokens: recording, packing, and the way to the right call.

Methods that look into the vision encoder give values per patch (`Runtime.encode`). Each is packed into one value per
visual token the way the model packs its features (`vision_layout.py`).

Values travel with the features. `generate` may encode pictures ahead of the forward call (`mm_encoder_outputs`), and
then they hang on that very output object; otherwise they live as long as the forward call that encoded the pictures.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from infer_patch.attention import DenseAttention
from infer_patch.errors import UnsupportedCallError
from infer_patch.vision_layout import SPECIAL, TEXT, merged_units, packed_tiles, pooled_patches
from infer_patch.vision_tower import TowerCall, VisionTower

if TYPE_CHECKING:
    from infer_patch.installation import Installation
    from infer_patch.method import Runtime

_FEATURE_LAYER = "vision_feature_layer"
_ATTRIBUTE = "_infer_patch_encoded"  # of the model output that carries features
_MODALITIES = {
    "image": ("get_image_features", ("image_token_id", "image_token_index"), "image_grid_thw"),
    "video": ("get_video_features", ("video_token_id", "video_token_index"), "video_grid_thw"),
}


@dataclass(frozen=True)
class EncoderScores:
    """What methods read off the vision encoder, at the tokens of one forward call.

    Parameters
    ----------
    tile : int64 Tensor [B, T]
        Which tile of its picture a visual token shows: 0 the whole picture (or the only tile), 1, 2, ... its parts;
        `NEWLINE`, `SPECIAL` (a CLS or register token among the features) or `TEXT`.
    values : dict
        (runtime, name) -> float32 [B, T]; NaN where `tile` is negative.
    """

    tile: Tensor
    values: dict[tuple[Runtime, str], Tensor]


@dataclass(frozen=True)
class Encoded:
    """The same for the visual tokens that one call of the encoder made, in their order: `tile` [N], values [N]."""

    tile: Tensor
    values: dict[tuple[Runtime, str], Tensor]


@dataclass
class _Recording:
    """What is collected while the encoder runs: per key and block the pieces [b, n] in the order they came."""

    asked: dict[int, list[Runtime]]
    seen: dict[tuple[Runtime, str], dict[int, list[Tensor]]] = field(default_factory=dict)
    pack: dict[str, Any] | None = None  # arguments of the model's `pack_image_features`
    last: int | None = None  # the last block that features pass through, where that is sure
    plain: bool = False  # did the block before return its hidden states and nothing else?


class _Thread(threading.local):
    def __init__(self) -> None:
        self.recording: _Recording | None = None
        self.encoded: dict[str, Encoded] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _Thread, ()


class Recorder:
    """Records what `runtimes` ask of one vision tower, and finds it again for the call that gets the features."""

    def __init__(self, tower: VisionTower, runtimes: list[Runtime], config: Any):
        self.tower, self.runtimes, self.config = tower, runtimes, config
        self._thread = _Thread()

    def install(self, installation: Installation) -> None:
        """Ports on the vision attentions; the owner's `get_image_features` and what packs tiles answer through us."""
        for block, module in enumerate(self.tower.attentions):

            def port(dense: DenseAttention, block: int = block) -> TowerPort:
                return TowerPort(self, block, dense)

            installation.add_tower_port(module, port)
        for block, module in enumerate(self.tower.modules):
            if "forward" not in vars(module):  # it is where weights are fetched from elsewhere (accelerate)
                forward = InstanceMethod(module, "forward", self._run_block, str(block))
                installation.add_method(module, "forward", forward)
        owner = self.tower.owner
        for modality, (name, _, _) in _MODALITIES.items():
            if hasattr(type(owner), name):
                installation.add_method(owner, name, InstanceMethod(owner, name, self._encode, modality))
        if hasattr(type(owner), "pack_image_features"):
            pack = InstanceMethod(owner, "pack_image_features", self._see_packing, "")
            installation.add_method(owner, "pack_image_features", pack)

    def forget(self) -> None:
        """A forward call begins or ends: what the last one encoded is not for it."""
        self._thread.encoded = {}

    def encoded(self, modality: str) -> Encoded | None:
        """What the last call of the encoder left, outside of forward calls."""
        return self._thread.encoded.get(modality)

    # While the encoder runs

    def see(self, block: int, q: Tensor, k: Tensor, mask: Any, scale: float) -> None:
        """Attention of a block is about to run."""
        recording = self._thread.recording
        if recording is None or block not in recording.asked:
            return
        call = TowerCall(q.detach(), k.detach(), scale, mask, self.tower.leading, self.tower.has_cls)
        with torch.no_grad():
            for runtime in recording.asked[block]:
                for name, values in runtime.encode(block, call).items():
                    recording.seen.setdefault((runtime, name), {}).setdefault(block, []).append(values.float())

    def _encode(self, modality: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        thread = self._thread
        if thread.recording is not None:  # videos encoded by way of `get_image_features` (Qwen3-VL)
            return method(*args, **kwargs)
        bound = inspect.signature(method).bind(*args, **kwargs)
        last = self.tower.feature_block(self._argument(bound, _FEATURE_LAYER))
        asked: dict[int, list[Runtime]] = {}
        for runtime in self.runtimes:
            for block in runtime.encoder_blocks(last):
                asked.setdefault(block, []).append(runtime)
        known = _FEATURE_LAYER in bound.signature.parameters  # else a setting of this name may mean nothing
        thread.recording = recording = _Recording(asked, last=max(last, *asked, 0) if known else None)
        try:
            output = method(*args, **kwargs)
        finally:
            thread.recording = None
        features = getattr(output, "pooler_output", None)
        if features is None:  # a tuple was asked for (return_dict=False): nothing that values could travel with
            return output
        with torch.no_grad():
            encoded = self._finish(recording, modality, bound)
        tokens = features.shape[:-1].numel() if isinstance(features, Tensor) else sum(len(f) for f in features)
        if encoded is not None and len(encoded.tile) == tokens:  # else the layout is not known: `scores` refuses
            thread.encoded[modality] = encoded
            object.__setattr__(output, _ATTRIBUTE, encoded)
        return output

    def _run_block(self, block: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A block of the encoder: left out behind the one that the features come from."""
        recording = self._thread.recording
        if recording is None:
            return forward(*args, **kwargs)
        if recording.last is not None and int(block) > recording.last and recording.plain:
            return args[0] if args else kwargs["hidden_states"]
        output = forward(*args, **kwargs)
        recording.plain = isinstance(output, Tensor)
        return output

    def _see_packing(self, _: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._thread.recording is not None:
            self._thread.recording.pack = inspect.signature(method).bind(*args, **kwargs).arguments
        return method(*args, **kwargs)

    def _argument(self, bound: inspect.BoundArguments, name: str) -> Any:
        given = bound.arguments.get(name, bound.arguments.get("kwargs", {}).get(name))
        return given if given is not None else getattr(self.config, name, None)

    def _finish(self, recording: _Recording, modality: str, bound: inspect.BoundArguments) -> Encoded | None:
        """Values per token of everything just encoded; None when nothing was recorded."""
        if not recording.seen:
            return None
        summed = {
            # pieces of one block are the pictures of a batch one by one (Qwen-VL), or there is a single one
            key: torch.stack([torch.cat(pieces, -1) for pieces in blocks.values()]).sum(0)
            for key, blocks in recording.seen.items()
        }
        patches = torch.stack(list(summed.values()), -1)  # [R, n, values]
        grids = self._argument(bound, _MODALITIES[modality][2])
        if isinstance(grids, Tensor):
            values = merged_units(patches.flatten(0, 1), grids, self.tower.owner.visual)
            tile = torch.zeros(len(values), dtype=torch.long, device=values.device)
        else:
            patches[:, : self.tower.leading] = float("nan")
            if self._argument(bound, "vision_feature_select_strategy") == "default":
                patches = patches[:, 1:]
            if recording.pack is not None:
                values, tile = packed_tiles(patches, recording.pack, self.tower.owner)
            else:
                values = pooled_patches(patches, self.tower.owner)
                tile = torch.where(values.isnan().any(-1), SPECIAL, 0)
        return Encoded(tile, {key: values[:, i] for i, key in enumerate(summed)})

    # At the decoder

    def scores(self, ids: Tensor, inputs: dict[str, Any]) -> EncoderScores:
        """What was recorded, at the tokens of this call.

        Raises
        ------
        UnsupportedCallError
            When visual tokens come whose pictures were not encoded under this patch, or not all of them.
        """
        ahead = inputs.get("mm_encoder_outputs") or {}
        tile = torch.full_like(ids, TEXT)
        values: dict[tuple[Runtime, str], Tensor] = {}
        for modality, (_, names, _) in _MODALITIES.items():
            token = next((t for t in (getattr(self.config, name, None) for name in names) if t is not None), None)
            if token is None or not bool((here := ids == token).any()):
                continue
            if ahead.get(modality) is not None:
                encoded = getattr(ahead[modality], _ATTRIBUTE, None)
            else:
                encoded = self._thread.encoded.get(modality)
            if encoded is None or not all(runtime in self.runtimes for runtime, _ in encoded.values):
                raise UnsupportedCallError(
                    f"{' and '.join(r.config.name for r in self.runtimes)} must see pictures being encoded, and this "
                    f"call brings {modality} tokens of which nothing was seen (a chunk of a prompt, features encoded "
                    "before the patch, an unknown layout). Pass the pictures themselves, in one call."
                )
            order = _sample_order(here.sum(1).tolist(), len(encoded.tile), modality).to(ids.device)
            tile[here] = encoded.tile.to(ids.device)[order]
            for key, flat in encoded.values.items():
                at = values.setdefault(key, torch.full(ids.shape, float("nan"), device=ids.device))
                at[here] = flat.to(ids.device)[order]
        return EncoderScores(tile, values)


def _sample_order(counts: list[int], encoded: int, what: str) -> Tensor:
    """Which encoded token each visual token of the batch is: int64 [sum(counts)].

    Beams repeat the samples of a batch k times one after the other, after their pictures were encoded once.
    """
    repeats = sum(counts) // encoded if encoded else 0
    if repeats < 1 or repeats * encoded != sum(counts) or sum(counts[::repeats]) != encoded:
        raise UnsupportedCallError(
            f"{encoded} visual tokens were encoded and this call holds {sum(counts)} {what} tokens; pass each picture "
            "once, with all its tokens, in the order of the prompts."
        )
    order, start = [], 0
    for row in range(0, len(counts), repeats):
        order += [torch.arange(start, start + counts[row])] * repeats
        start += counts[row]
    return torch.cat(order)


class TowerPort:
    """What a vision attention carries while patched; see `attention.Port`."""

    active = True

    def __init__(self, recorder: Recorder, block: int, dense: DenseAttention):
        self.engine, self.block, self.dense = self, block, dense
        self._recorder = recorder

    def attend(
        self, port: Any, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        scale = kwargs.get("scaling") or q.shape[-1] ** -0.5
        self._recorder.see(self.block, q, k, mask, scale)
        return self.dense(module, q, k, v, mask, **kwargs)


class InstanceMethod:
    """Stands in for a method of one instance: `answer(note, method, *args, **kwargs)` is called instead of it.

    Looks the method up in the class, so that copies and pickles of a patched model stand in for their own.
    """

    def __init__(self, owner: nn.Module, name: str, answer: Callable[..., Any], note: str):
        self.owner, self.name, self.answer, self.note = owner, name, answer, note

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(getattr(type(self.owner), self.name).__get__(self.owner))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = getattr(type(self.owner), self.name).__get__(self.owner)
        return self.answer(self.note, method, *args, **kwargs)
