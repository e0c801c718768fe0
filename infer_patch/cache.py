"""Cache layers that may hold any subset of the tokens, and what transformers needs to know about them.

transformers is told logical lengths only: `get_seq_length`, `get_mask_sizes` and positions are those of an unpatched
run. Physically the rows of a layer are an ordinary left-padded batch: per sample some filler rows, then the tokens it
still holds, oldest first. New tokens are appended, so physical order is always logical order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from infer_patch.availability import crop_is_relative
from infer_patch.cache_memory import GRANULE, grown, tensor_bytes
from infer_patch.errors import UnsupportedCallError
from infer_patch.tokens import INVALID, Reduction, Tokens

if TYPE_CHECKING:
    from infer_patch.run import LayerInputs


@dataclass
class KeyView:
    """The rows that one `update` handed to attention.

    Parameters
    ----------
    rows : int
        n, the number of key rows.
    start : tuple of int, optional
        Per sample the first row that holds a token, because rows were dropped; None when every row is the token of
        the same number (padding is then told by the attention mask).
    positions : int64 Tensor [B, n], optional
        Logical index of each row, `INVALID` in filler rows; None as for `start`.
    evicted : tuple of int
        Per sample the tokens evicted between the sinks and the rest.
    """

    rows: int
    start: tuple[int, ...] | None = None
    positions: Tensor | None = None
    evicted: tuple[int, ...] = ()


def _is_frozen(buffer: Tensor) -> bool:
    """Made in inference mode, and not to be written into outside of it."""
    return buffer.is_inference() and not torch.is_inference_mode_enabled()


class IndexedLayer(CacheLayerMixin):
    """A layer of keys and values [B, H_kv, n, D] that knows which tokens its rows are.

    Buffers are allocated ahead in growing steps: a decode step writes one row and copies nothing.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    attends = False  # whether `attention` is asked for the queries that came with the last `update`
    counted: tuple[Any, int] | None = None  # key blocks that the last `attention` read, of those a dense one would read
    keys: Tensor  # views of the rows in use; empty (no rows) before the first update
    values: Tensor

    def __init__(self, **kwargs: Any):
        super().__init__()
        self.made_by: str | None = None  # the key of the method runtime that keeps its tokens here, if one does
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = torch.empty(0)
        self.is_initialized = False
        self.length = 0  # logical
        self.rows = 0  # physical
        self.start: tuple[int, ...] | None = None
        self.state: dict[Any, Any] = {}  # what a method remembers about these keys; dropped when rows move
        self.notes: dict[Any, Any] = {}  # what it remembers about the text; kept until the layer is emptied
        self.memory: list[dict[Any, Any]] = []  # of each sample: goes with it where beams go, outlives a crop
        self.view = KeyView(0)
        self._tokens: Tokens | None = None
        self._reduction: Reduction | None = None
        self._positions: Tensor | None = None  # of the first rows; the rows after them are the newest tokens, in order
        self._buffers: list[Tensor] = []

    # What attention needs

    def expect(self, tokens: Tokens, reduction: Reduction | None) -> None:
        """Say which tokens the next `update` brings (the engine does, before the layer runs)."""
        self._tokens, self._reduction = tokens, reduction

    def memory_of(self, sample: int) -> dict[Any, Any]:
        """What methods remember about one sample, for as long as its keys are here. Samples that were one (beams) may
        share its values: put new ones in, never write into them. Rows taken back by `crop` are theirs to notice."""
        while len(self.memory) <= sample:
            self.memory.append({})
        return self.memory[sample]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens; return those of all tokens to attend to, [B, H_kv, n, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens, reduction = self._tokens, self._reduction
        self._tokens = self._reduction = None
        repack, added = False, key_states.shape[-2]
        if tokens is not None and reduction is not None:
            repack, added = self._track(tokens, reduction), reduction.length
        self._append(key_states, value_states)
        self.length += added
        if repack and self._positions is not None:
            self._pack(self._positions < INVALID)
        self.view = KeyView(self.rows, self.start, self.positions())
        return self.keys, self.values

    def positions(self) -> Tensor | None:
        """Logical index of every row, int64 [B, n]; None while row r is simply token r."""
        if self._positions is None:
            return None
        tail = self.rows - self._positions.shape[1]
        if tail == 0:
            return self._positions
        newest = torch.arange(self.length - tail, self.length, device=self._positions.device)
        return torch.cat([self._positions, newest.expand(self._positions.shape[0], -1)], 1)

    def _track(self, tokens: Tokens, reduction: Reduction) -> bool:
        """Note the positions of a reduced set of rows about to be appended; whether fillers must move left."""
        coming = reduction.positions(self.length)
        self.state = {}
        if self.rows == 0:
            self._positions, self.start = coming, reduction.start
            return False
        held = self._held_positions(coming.shape[0], tokens)
        self._positions = torch.cat([held.to(coming.device), coming], 1)
        if any(reduction.start) or any(self.start or ()) or tokens.mask is not None:
            return True
        self.start = (0,) * coming.shape[0]
        return False

    def _held_positions(self, batch: int, tokens: Tokens) -> Tensor:
        held = self.positions()
        if held is None:
            held = torch.arange(self.rows, device=tokens.device).expand(batch, -1)
            if tokens.mask is not None:
                held = held.masked_fill(~tokens.mask[:, : self.rows], INVALID)
        return held

    def _append(self, keys: Tensor, values: Tensor) -> None:
        if torch.is_grad_enabled() and keys.requires_grad:  # writing into a buffer would break autograd
            self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
            self._buffers, self.rows = [], self.keys.shape[2]
            return
        total = self.rows + keys.shape[2]
        if not self._buffers or self._buffers[0].shape[2] < total + GRANULE or _is_frozen(self._buffers[0]):
            self._buffers = [grown(held, total) for held in (self.keys, self.values)]
        for buffer, new in zip(self._buffers, (keys, values)):
            buffer[:, :, self.rows : total] = new
        self.rows = total
        self.keys, self.values = (buffer[:, :, :total] for buffer in self._buffers)

    def _pack(self, keep: Tensor) -> None:
        """Keep only the rows marked in bool [B, n]; samples that keep fewer get filler rows on the left."""
        reduction = Reduction.of(keep)
        positions = self.positions()
        if positions is None:
            positions = torch.arange(self.rows, device=keep.device).expand(keep.shape[0], -1)
        self._positions = positions.gather(1, reduction.index)
        if reduction.filled is not None:
            self._positions = self._positions.masked_fill(~reduction.filled, INVALID)
        index = reduction.index[:, None, :, None].to(self.device)
        held = [x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (self.keys, self.values)]
        self.start, self.rows, self.state, self._buffers = reduction.start, reduction.rows, {}, []
        self.keys, self.values = held

    def attention(self, inputs: LayerInputs, mask: Any) -> Tensor | None:
        """Attention of the new queries to what this layer keeps, for layers that set `attends`: [B, T, H, D].

        Such a layer may keep keys and values in any form. Its `update` may hand on whatever `inputs.k` and `inputs.v`
        should be (the new rows alone, say), as long as `view` describes that; `mask` is the mask the model asked for.
        None leaves it to the engine: attention over `inputs`, in which k, v and view may have been replaced.
        """
        raise TypeError(f"{type(self).__name__} leaves attention to the engine")

    def attended(self, inputs: LayerInputs) -> None:
        """Attention to the tokens of the last `update` is done (asked of layers that set `attends`)."""

    # What transformers needs

    def get_seq_length(self) -> int:
        """Logical length: every token seen, whether its row is still here or not."""
        return self.length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """(logical key length, 0); transformers 5.2 passes the positions instead of their number."""
        return self.length + (query_length if isinstance(query_length, int) else query_length.shape[0]), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 5.2

    def crop(self, tokens: int) -> None:
        """Take back the newest tokens, in the sign convention of the installed transformers.

        Raises
        ------
        UnsupportedCallError
            When tokens would have to come back that were dropped or evicted.
        """
        if crop_is_relative():
            if tokens > 0:
                raise UnsupportedCallError(f"crop takes the number of tokens to remove as a negative, got {tokens}.")
            remove = -tokens
        else:
            remove = max(self.length - tokens, 0) if tokens > 0 else min(-tokens, self.length)
            if tokens == 0:
                remove = self.length
        if remove == 0 or not self.is_initialized:
            return
        if remove >= self.length:
            self.reset()
            return
        self._check_crop(remove)
        self._remove(remove)

    def _remove(self, remove: int) -> None:
        """Forget the newest tokens, fewer than there are."""
        self.rows -= remove
        self.length -= remove
        if self._positions is not None:
            self._positions = self._positions[:, : self.rows]
        self.state = {}
        self.keys, self.values = self.keys[:, :, : self.rows], self.values[:, :, : self.rows]

    def _check_crop(self, remove: int) -> None:
        positions = self.positions()
        if positions is None:
            return
        newest = torch.arange(self.length - remove, self.length, device=positions.device)
        if remove >= self.rows or not bool((positions[:, -remove:] == newest).all()):
            raise UnsupportedCallError(
                f"the last {remove} tokens cannot be taken back: some of them were dropped by the patch. "
                "Start again from the prompt, or take the patch off for this conversation."
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take(torch.arange(self.keys.shape[0])[indices.cpu()] if self.is_initialized else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._take(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def _take(self, index: Tensor) -> None:
        """Let sample i become the old sample index[i]."""
        if not self.is_initialized or self.rows == 0:
            return
        index = index.to(self.device)
        if self._buffers:
            self._buffers = [buffer.index_select(0, index) for buffer in self._buffers]
            self.keys, self.values = (buffer[:, :, : self.rows] for buffer in self._buffers)
        else:
            self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
        if self._positions is not None:
            self._positions = self._positions.index_select(0, index.to(self._positions.device))
        self._take_host(index.tolist())
        self.state = {}

    def _take_host(self, index: list[int]) -> None:
        if self.memory:
            self.memory = [dict(self.memory_of(i)) for i in index]
        if self.start is not None:
            self.start = tuple(self.start[i] for i in index)

    def offload(self) -> None:
        raise UnsupportedCallError("offloaded caches cannot be patched; leave `cache_implementation` at its default.")

    prefetch = offload

    # What reports need

    def nbytes(self) -> int:
        """Bytes of the rows held and of what methods keep beside them (not of the space allocated ahead)."""
        return tensor_bytes((self.keys, self.values, self.state, self.memory))

    def bytes_by_precision(self) -> dict[str, int]:
        """`nbytes` by the name of the dtype or the width ("bfloat16", "4 bits")."""
        return {str(self.dtype).removeprefix("torch."): self.nbytes()} if self.is_initialized else {}

    def unquantised_bytes(self) -> int:
        """What the same tokens would take in the model's own precision."""
        return self.nbytes()

    @classmethod
    def can_adopt(cls, layer: Any) -> bool:
        """Whether `adopt` can take over from this layer (one of transformers' own dynamic layers)."""
        return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)

    def adopt(self, layer: Any, tokens: Tokens) -> None:
        """Take over the keys and values of one of transformers' own dynamic layers."""
        if not layer.is_initialized or layer.get_seq_length() == 0:
            return
        self.lazy_initialization(layer.keys, layer.values)
        self._append(layer.keys, layer.values)
        self.length = layer.get_seq_length()
        if self.rows < self.length:  # a sliding-window layer has let go of its older rows
            newest = torch.arange(self.length - self.rows, self.length, device=self.device)
            self._positions = newest.expand(layer.keys.shape[0], -1).contiguous()
            self.start = (0,) * layer.keys.shape[0]
            if tokens.mask is not None:
                valid = tokens.mask[:, self.length - self.rows : self.length].to(self.device)
                self._positions = self._positions.masked_fill(~valid, INVALID)
                self._pack(valid)
