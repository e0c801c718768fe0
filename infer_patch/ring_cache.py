"""A cache layer that keeps, for each key head, the sinks and its own span of recent tokens, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infer_patch.attention import LazyMask
from infer_patch.cache import IndexedLayer, KeyView
from infer_patch.errors import UnsupportedCallError
from infer_patch.kernels.block_mask import causal_blocks, sink_window_blocks
from infer_patch.kernels.block_sparse_attention import block_sparse_attention
from infer_patch.kernels.dense_attention import dense_attention
from infer_patch.rings import Ring, RingSpec
from infer_patch.spans import Horizon
from infer_patch.windowed_cache import check_padding, first_rows

if TYPE_CHECKING:
    from infer_patch.run import LayerInputs
    from infer_patch.tokens import Tokens

_MARGIN, _RECORDING = 1, 4  # blocks kept beyond the windows, so that a rejected draft can be taken back


class RingLayer(IndexedLayer):
    """Holds everything, like any layer, until a head has tokens that no later query can see; from then on, rings.

    While it is still a plain layer, and for the prompt that makes it overflow, attention is the engine's, with the
    lists of the select port. Afterwards the layer attends itself: a single token to the rings, several to what the
    rings hold and to themselves. Both read the very blocks that the lists would name.

    Parameters
    ----------
    windows : callable
        Of N and the number of key heads: the blocks in the window of each.
    horizon : Horizon
        What N is. When it is set anew because a text outgrew it, rings grow; what they lost stays lost.
    sinks, block : int
        Tokens kept at the start, in whole blocks of `block` tokens.
    """

    def __init__(
        self, windows: Callable[[int, int], tuple[int, ...]], horizon: Horizon, sinks: int = 64, block: int = 64
    ):
        self.windows, self.horizon, self.sinks, self.block = windows, horizon, sinks, block
        super().__init__()

    def reset(self) -> None:
        super().reset()
        self.rings: list[Ring] = []
        self.counts: tuple[int, ...] = ()  # real tokens of each sample
        self.written: tuple[int, ...] = ()  # the most there have been: a crop does not bring back what was overwritten
        self.recent = 0  # newest tokens that all kept their row
        self.attends, self.counted, self.record_past = False, None, False
        self._coming: tuple[Tensor, Tensor] | None = None
        self._fitted: tuple[int, bool] | None = None  # what the rings' sizes were last worked out for

    def activate_past_recording(self) -> None:
        """Keep more beyond the windows (transformers calls this before decoding that may roll back)."""
        self.record_past = True

    # Taking tokens in

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        tokens = self._tokens
        check_padding(tokens)
        if self.rings:
            self._check(tokens)
            return self._expect_attention(key_states, value_states)
        self.attends = False
        keys, values = super().update(key_states, value_states)
        if self._positions is None:
            self.start = first_rows(keys.shape[0], tokens)
        self.view.start = self.start
        if not any(start == self.rows for start in self.start or ()):  # a sample that is all padding so far
            self._overflow(keys, values)
        return keys, values

    def _check(self, tokens: Tokens | None) -> None:
        if tokens is None:
            raise UnsupportedCallError(
                "this cache keeps rings, which only the patch that made them can read: keep the patch on, or start "
                "again from the prompt."
            )
        if tokens.image is not None:
            raise UnsupportedCallError(
                "new pictures came after keys were evicted, and a method that drops visual tokens would judge them by "
                "what is left. Start again from the prompt, or keep the keys (evict=False)."
            )

    def _expect_attention(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Note new tokens, which enter the rings when `attention` has seen what they replace."""
        self._tokens = self._reduction = None
        added = keys.shape[2]
        self.attends, self._coming, self.state = True, (keys, values), {}
        self.length, self.recent = self.length + added, self.recent + added
        self._grow(added)
        positions = torch.arange(self.length - added, self.length, device=keys.device)
        self.view = KeyView(added, (0,) * len(keys), positions.expand(len(keys), -1))
        return keys, values

    def _overflow(self, keys: Tensor, values: Tensor) -> None:
        """Change over to rings if a head has something to let go of."""
        starts = self.start or ()
        counts = tuple(self.rows - start for start in starts)
        specs = self._specs(counts)
        if all(spec.sinks + spec.capacity >= max(counts) for spec in specs):
            return
        self.rings = [Ring(spec, keys) for spec in specs]
        for ring in self.rings:
            for sample, start in enumerate(starts):
                ring.write([sample], 0, *(x[sample, ring.heads, start:][None] for x in (keys, values)))
        self.recent = self.length if self._positions is None else 0
        self.counts = self.written = counts
        self.keys, self.values, self._buffers = keys[:, :, :0], values[:, :, :0], []
        self._positions, self.start = None, None
        self._note_rows()

    def _specs(self, counts: Sequence[int]) -> list[RingSpec]:
        """The rings of samples that have so many real tokens."""
        kv_heads = self.keys.shape[1]
        samples = [self.windows(self.horizon.of(self.notes, self.length, count), kv_heads) for count in counts]
        heads: dict[tuple[int, ...], list[int]] = {}
        for head, windows in enumerate(zip(*samples)):
            heads.setdefault(windows, []).append(head)
        margin = _RECORDING if self.record_past else _MARGIN
        return [RingSpec(tuple(h), w, (max(w) + margin) * self.block, self.sinks, self.block) for w, h in heads.items()]

    def _grow(self, added: int) -> None:
        """Make the rings anew where N, and with it a span, has grown, or where drafts are to be taken back."""
        fitted = self.horizon.of(self.notes, self.length, self.length), self.record_past  # N of a full row
        if fitted == self._fitted:
            return
        self._fitted = fitted
        specs = self._specs([count + added for count in self.counts])
        have = [ring.spec for ring in self.rings]
        if [(s.heads, s.windows) for s in have] == [(s.heads, s.windows) for s in specs] and all(
            old.capacity >= new.capacity for old, new in zip(have, specs)
        ):
            return
        source = {head: ring for ring in self.rings for head in ring.heads}
        self.rings = []
        for spec in specs:
            oldest = [max(source[h].held_from(b, w) for h in spec.heads) for b, w in enumerate(self.written)]
            ring = Ring(spec, self.keys, tuple(-(-first // self.block) * self.block for first in oldest))
            for head in spec.heads:
                for sample, count in enumerate(self.counts):
                    ring.copy_from(source[head], head, sample, count)
            self.rings.append(ring)
        self.written = self.counts

    def _note_rows(self) -> None:
        """Tokens held on average over the key heads, of the sample that has most."""
        held = [
            sum(
                len(ring.heads) * (min(count, self.sinks) + max(count - ring.held_from(b, written), 0))
                for ring in self.rings
            )
            for b, (count, written) in enumerate(zip(self.counts, self.written))
        ]
        self.rows = -(-max(held) // sum(len(ring.heads) for ring in self.rings))

    # Attention

    def attention(self, inputs: LayerInputs, mask: Any) -> Tensor:
        """Attention of the tokens of the last `update`, which then are in the rings: [B, T, H, D]."""
        if isinstance(mask, LazyMask) and not mask.is_plain_causal:
            raise UnsupportedCallError(
                "keys were evicted, and the model's own mask is not plain causal: this call cannot be served."
            )
        if self._coming is None:
            raise UnsupportedCallError("attention over a ring was asked for twice after one update of the cache.")
        (keys, values), self._coming = self._coming, None
        output = (self._one if keys.shape[2] == 1 else self._several)(inputs, keys, values)
        self.counts = tuple(count + keys.shape[2] for count in self.counts)
        self.written = tuple(map(max, self.written, self.counts))
        self._note_rows()
        return output.transpose(1, 2).contiguous()

    def _one(self, inputs: LayerInputs, keys: Tensor, values: Tensor) -> Tensor:
        """A token each: first into the rings, then over them. Returns [B, H, 1, D]."""
        q = inputs.q.reshape(*keys.shape[:2], -1, keys.shape[3])  # [B, H_kv, G, D]
        parts, read, shared = [], 0, inputs.run.tokens.shared
        for ring in self.rings:
            layout = ring.layout(self.counts, self.written)
            if layout not in shared:
                slot, visible = ring.read_one(self.counts, self.written)
                shared[layout] = slot, visible[:, None, None]
            slot, visible = shared[layout]
            ring.write_one(slot, keys[:, ring.heads, 0], values[:, ring.heads, 0])
            k, v = (x[:, :, : visible.shape[-1]] for x in (ring.keys, ring.values))
            parts.append(F.scaled_dot_product_attention(q[:, ring.heads], k, v, attn_mask=visible, scale=inputs.scale))
            read += ring.blocks_read(self.counts)
        self.counted = read, keys.shape[1] * sum(count // self.block + 1 for count in self.counts)
        return self._in_order(parts).flatten(1, 2)[:, :, None]

    def _several(self, inputs: LayerInputs, keys: Tensor, values: Tensor) -> Tensor:
        """Several tokens each: over what the rings hold and themselves, then into the rings. Returns [B, H, T, D]."""
        added, group = keys.shape[2], inputs.q.shape[1] // keys.shape[1]
        alike: dict[Any, list[int]] = {}
        for b, count in enumerate(self.counts):
            alike.setdefault((count, *((r.spec.windows[b], r.oldest[b]) for r in self.rings)), []).append(b)
        output = inputs.q.new_empty(*inputs.q.shape[:3], values.shape[3])
        read, causal = keys.new_zeros((), dtype=torch.long), 0
        for samples in alike.values():
            count, parts = self.counts[samples[0]], []
            for ring in self.rings:
                window = ring.spec.windows[samples[0]]
                slots, missing = ring.tokens(samples[0], count)
                new = [x[samples][:, ring.heads] for x in (keys, values)]
                k, v = (torch.cat([x[samples][:, :, slots], n], 2) for x, n in zip((ring.keys, ring.values), new))
                q = inputs.q[samples].unflatten(1, (-1, group))[:, ring.heads].flatten(1, 2)
                rows, copies = k.shape[2], len(samples) * len(ring.heads)
                blocks = copies * causal_blocks(added, rows + missing, self.block, self.block)
                if missing == 0 and -(-rows // self.block) <= self.sinks // self.block + window:
                    part, read = dense_attention(q, k, v, inputs.scale), read + blocks
                else:
                    lists = sink_window_blocks(added, rows, self.sinks, [window], self.block, q.device)
                    part = block_sparse_attention(q, k, v, lists, inputs.scale)
                    read = read + lists.count.sum() * copies
                parts.append(part.unflatten(1, (-1, group)))
                ring.write(samples, count, *new)
                causal += blocks
            output[samples] = self._in_order(parts).flatten(1, 2)
        self.counted = read, causal
        return output

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        """Outputs of the rings, [B, heads, ...] each, with the key heads in their order: [B, H_kv, ...]."""
        if len(parts) == 1:
            return parts[0]
        order = [head for ring in self.rings for head in ring.heads]
        return torch.cat(parts, 1)[:, sorted(range(len(order)), key=order.__getitem__)]

    # What transformers needs

    def _remove(self, remove: int) -> None:
        super()._remove(remove)
        if self.rings:
            self.counts = tuple(count - remove for count in self.counts)
            self.recent -= remove
            self._note_rows()

    def _check_crop(self, remove: int) -> None:
        if not self.rings:
            super()._check_crop(remove)
            return
        lost = remove > min(self.recent, *self.counts) or any(
            ring.window_start(b, count - remove) < ring.held_from(b, self.written[b])
            for ring in self.rings
            for b, count in enumerate(self.counts)
        )
        if lost:
            raise UnsupportedCallError(
                f"the last {remove} tokens cannot be taken back: the rings no longer hold what stood before them. "
                "Start again from the prompt, or keep the keys (evict=False)."
            )

    def _take(self, index: Tensor) -> None:
        if not self.rings:
            super()._take(index)
            return
        chosen = index.tolist()
        self.counts, self.written = (tuple(x[i] for i in chosen) for x in (self.counts, self.written))
        for ring in self.rings:
            ring.take(chosen)
        self.keys, self.values = (x.new_empty(len(chosen), *x.shape[1:]) for x in (self.keys, self.values))
        self._take_host(chosen)
        self.state = {}

    # What reports need

    def nbytes(self) -> int:
        return super().nbytes() + sum(ring.nbytes(max(self.written)) for ring in self.rings)
