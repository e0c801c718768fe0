"""A cache layer in mixed precision: packed pools, and a tail in full precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from infer_patch.attention import LazyMask
from infer_patch.cache import IndexedLayer, KeyView
from infer_patch.errors import UnsupportedCallError
from infer_patch.kernels.kv_pack import Groups
from infer_patch.kernels.packed_attention import packed_attention
from infer_patch.kv_policy import Policy, Probes, attention_mass, draw_probes
from infer_patch.packed_pool import Pool
from infer_patch.packed_tail import NewTokens, Tail, TokenNumbers
from infer_patch.tokens import INVALID, Tokens

if TYPE_CHECKING:
    from infer_patch.run import LayerInputs

_FEW = 32  # up to so many new tokens read the packed groups as they are; more of them are worth unpacking for


class PackedLayer(IndexedLayer):
    """Sinks and recent tokens in full precision, the rest quantised and packed, once and for all.

    The first call of a text reads its keys as they came, and until something is packed, attention is the model's own.
    Later calls read what is kept: a few queries the packed groups themselves, many queries a copy of this layer
    dequantised for the one call. Both see new tokens exactly.
    After attention, tokens that are no longer recent are packed, `window` of them or a multiple; a policy that tells
    important tokens from others scores them then, by the attention that the queries of the call pay to them.

    A policy may also forget what is not important. Padding is not stored. Where the bits of tokens differ, their
    numbers are kept beside them (4 bytes a token).
    """

    attends = True

    def __init__(self, policy: Policy):
        self.policy = policy
        super().__init__()

    def reset(self) -> None:
        super().reset()
        self.pools: list[Pool] = []  # important tokens first
        self.tail: Tail | None = None
        self.numbers = TokenNumbers(0)
        self._new: NewTokens | None = None
        self._dense = False  # whether the last `update` handed on everything

    @property
    def packed(self) -> list[int]:
        """Packed tokens of each sample."""
        filled = self.tail.filled if self.tail is not None else []
        return [count - rows for count, rows in zip(self.numbers.counts, filled)]

    # Taking tokens in

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        batch = key_states.shape[0]
        # no rows, and no view either, which would hold the whole prompt in full precision
        self.keys, self.values = (x.new_empty(batch, x.shape[1], 0, x.shape[3]) for x in (key_states, value_states))
        self.pools = [Pool(batch, bits, self.policy.group, self.policy.value_bits) for bits in self.policy.widths]
        self.tail, self.numbers = Tail(key_states, value_states), TokenNumbers(batch)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new tokens in; return the keys and values that `attention` expects, [B, H_kv, n, D].

        Those are the new ones, or, where many queries come after others, everything in its logical order.
        """
        tokens, reduction = self._tokens, self._reduction
        self._tokens = self._reduction = None
        if tokens is None:
            raise UnsupportedCallError(
                "this cache is quantised, and only the patch that made it can read it: keep the patch on, or start "
                "again from the prompt."
            )
        if self.length and torch.is_grad_enabled() and key_states.requires_grad:
            raise UnsupportedCallError(
                "gradients are wanted, and a quantised cache has none: wrap the call in torch.no_grad(), or pass "
                "use_cache=False."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, first = NewTokens.of(tokens, reduction), self.length == 0
        self._take_in(key_states, value_states, new)
        self._dense = first or new.rows > _FEW or tokens.image is not None or not any(self.packed)
        if first:
            start = None if reduction is None else reduction.start
            self.view = KeyView(new.rows, start, None if reduction is None else new.logical)
            return key_states, value_states
        if self._dense:
            return self._everything(new)
        self.view = KeyView(new.rows)
        return key_states, value_states

    def _take_in(self, keys: Tensor, values: Tensor, new: NewTokens) -> None:
        self._tail().append(keys, values, new)
        self.numbers.append(new, self.device)
        self.length, self._new, self.state = self.length + new.length, new, {}
        self.rows = max(self.numbers.counts) if self.numbers.dropped else self.length

    def _tail(self) -> Tail:
        if self.tail is None:
            raise UnsupportedCallError("this cache layer is empty; start again from the prompt.")
        return self.tail

    def _everything(self, new: NewTokens) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole text, dequantised [B, H_kv, n, D]; `view` is set to tell what they are."""
        tail, numbers = self._tail(), self.numbers
        if numbers.plain and not any(self.packed):
            self.view = KeyView(self.length)
            return tail.rows()
        width = max(*numbers.counts, new.rows) if numbers.dropped else self.length
        columns = self._columns(width)
        if numbers.dropped:
            if new.real is not None and not bool((new.real[:, 1:] >= new.real[:, :-1]).all()):
                raise UnsupportedCallError(
                    "padding stands behind new tokens, and tokens were dropped from this cache; pad on the left."
                )
            start = tuple(width - count for count in numbers.counts)
            positions = torch.full((len(start), width + 1), INVALID, device=self.device)
            positions.scatter_(1, columns, numbers.logical(self.device))
            self.view = KeyView(width, start, positions[:, :width])
        else:
            self.view = KeyView(width)
        like = tail.rows()
        out = [x.new_zeros(*x.shape[:2], width + 1, x.shape[3]) for x in like]  # what goes nowhere goes last
        for pool in self.pools:
            pool.write_into(out[0], out[1], columns)
        row = torch.arange(like[0].shape[2], device=self.device)
        packed, filled = (torch.tensor(x, device=self.device)[:, None] for x in (self.packed, tail.filled))
        number = torch.where(row < self.policy.sinks, row, row + packed).clamp(max=columns.shape[1] - 1)
        goal = torch.where(row < filled, columns.gather(1, number), width)[:, None, :, None]
        for x, rows in zip(out, like):
            x.scatter_(2, goal.expand(-1, x.shape[1], -1, x.shape[3]), rows)
        return out[0][:, :, :width], out[1][:, :, :width]

    def _columns(self, width: int) -> Tensor:
        """Where each token number stands in `_everything`, int64 [B, max(counts)]; one past its end for none."""
        counts = self.numbers.counts
        if not self.numbers.dropped:
            return self.numbers.logical(self.device).clamp(max=self.length)
        number = torch.arange(max(counts), device=self.device)
        count = torch.tensor(counts, device=self.device)[:, None]
        return torch.where(number < count, number + (width - count), width)

    # Attention

    def attention(self, inputs: LayerInputs, mask: Any) -> Tensor | None:
        """Attention of the tokens of the last `update` [B, T, H, D], or None: over `inputs`, by the engine."""
        new, tail = self._new, self._tail()
        if new is None:
            raise UnsupportedCallError("attention over a packed cache was asked for twice after one update of it.")
        if not self._dense and new.rows > 1 and isinstance(mask, LazyMask) and not mask.is_plain_causal:
            inputs.k, inputs.v = self._everything(new)
            inputs.view, self._dense = self.view, True
        if self._dense:
            return None
        shared, key = inputs.run.tokens.shared, ("visible", id(new), *tail.filled)
        if key not in shared:
            shared[key] = tail.visible(new)
        keys, values = tail.rows()
        output = packed_attention(inputs.q, self.groups(), keys, values, inputs.scale, shared[key])
        return output.transpose(1, 2).contiguous()

    def attended(self, inputs: LayerInputs) -> None:
        """Pack the tokens that are no longer recent."""
        if self._new is not None:
            self._pack_due(inputs, self._new)
        self._new = None

    def groups(self) -> list[Groups]:
        """All packed groups."""
        return [groups for pool in self.pools for groups in pool.groups()]

    # Packing

    def _pack_due(self, inputs: LayerInputs, new: NewTokens) -> None:
        """Pack the oldest tokens of the tail, in multiples of the window, until what is left is recent."""
        policy, tail = self.policy, self._tail()
        due = [max(rows - policy.sinks - policy.recent, 0) // policy.window * policy.window for rows in tail.filled]
        if not any(due):
            tail.settle()
            return
        if policy.mixed:
            self._pack_by_importance(inputs, new, due)
        else:
            for count in sorted(set(due) - {0}):
                samples = [b for b, n in enumerate(due) if n == count]
                rows = torch.arange(policy.sinks, policy.sinks + count, device=self.device).expand(len(samples), 1, -1)
                self._move(self.pools[0], samples, rows)
        tail.drop(policy.sinks, due, room=policy.window)

    def _move(self, pool: Pool, samples: Sequence[int], rows: Tensor, tell: bool = False) -> None:
        """Move rows [b, H_kv or 1, m] of the tail to a pool; `tell`: keep their token numbers."""
        tail, packed = self._tail(), self.packed
        everyone = len(samples) == len(tail.filled)
        keys, values = (x if everyone else x[list(samples)] for x in (tail.keys, tail.values))
        first = [self.policy.sinks + packed[b] for b in samples]
        numbers = rows + rows.new_tensor([packed[b] for b in samples])[:, None, None] if tell else None
        pool.append(samples, keys, values, rows, first, numbers)

    def _pack_by_importance(self, inputs: LayerInputs, new: NewTokens, due: list[int]) -> None:
        policy = self.policy
        known = inputs.run.tokens.shared.get(("important", inputs.layer), {})
        samples = [b for b, count in enumerate(due) if count]
        dense = self._dense and not all(b in known for b in samples)
        scores = self._scores_of_the_call(inputs, new) if dense else None
        for b in samples:
            first, count = policy.sinks + self.packed[b], due[b]
            if b in known:  # of the first call of a text, whose tokens are numbered as they stand
                important = known[b][None, first : first + count]
            elif scores is not None:
                at = scores[2][b, first : first + count]
                important = policy.choose(scores[0][b][:, at], scores[1][b, at])
            else:
                important = policy.choose(*self._scores_of_the_tail(inputs, new, b, count))
            for pool, chosen in zip(self.pools, (important, ~important)):
                rows = chosen.nonzero()[:, 1].view(1, len(chosen), -1) + policy.sinks
                if rows.shape[2]:
                    self._move(pool, [b], rows, tell=not policy.evicts)
            if policy.evicts:
                self.numbers.drop(b, first + (~important[0]).nonzero()[:, 0])
                self.rows = max(self.numbers.counts)

    def _scores_of_the_call(self, inputs: LayerInputs, new: NewTokens) -> tuple[Tensor, Tensor, Tensor]:
        """Attention mass of all keys of a dense call, the probes that see them, and where token numbers stand."""
        tokens, view = inputs.run.tokens, inputs.view
        positions = view.positions
        if positions is None:
            positions = torch.arange(view.rows, device=self.device).expand(tokens.batch, -1)
            if tokens.mask is not None:
                positions = positions.masked_fill(~tokens.mask[:, : view.rows].to(self.device), INVALID)
        policy, key = self.policy, ("probes", id(new), self.policy)
        if key not in tokens.shared:
            drawn = policy.recent_probes, policy.random_probes, policy.seed
            tokens.shared[key] = draw_probes(new, positions[:, -new.rows :], *drawn), new
        mass, seen = attention_mass(inputs.q, inputs.k, inputs.scale, tokens.shared[key][0], positions)
        return mass, seen, self._columns(view.rows)

    def _scores_of_the_tail(self, inputs: LayerInputs, new: NewTokens, b: int, count: int) -> tuple[Tensor, Tensor]:
        """Attention mass within the rows of the tail that are due, from all queries of a call of few."""
        tail, sinks = self._tail(), self.policy.sinks
        before = tail.filled[b] - new.counts[b] - sinks
        rank = torch.arange(new.rows, device=self.device)
        if new.real is not None:
            rank = (new.real[b].to(self.device).cumsum(0) - 1).masked_fill(~new.real[b].to(self.device), INVALID)
        positions = torch.where(rank < INVALID, rank + before, -1)[None]
        probes = Probes(torch.arange(new.rows, device=self.device)[None], positions)
        keys = tail.keys[b : b + 1, :, sinks : sinks + count]
        at = torch.arange(count, device=self.device)[None]
        mass, seen = attention_mass(inputs.q[b : b + 1], keys, inputs.scale, probes, at)
        return mass[0], seen[0]

    # What transformers needs

    def _check_crop(self, remove: int) -> None:
        """Packed tokens can be taken back: their numbers are known."""

    def _remove(self, remove: int) -> None:
        tail, packed, sinks = self._tail(), self.packed, self.policy.sinks
        self.numbers.remove_newest(remove, self.device)
        self.length, self.state, self._new = self.length - remove, {}, None
        self.rows = max(self.numbers.counts) if self.numbers.dropped else self.length
        counts = self.numbers.counts
        tail.filled = [max(n - old, min(n, sinks)) for n, old in zip(counts, packed)]
        if any(n < old + min(n, sinks) for n, old in zip(counts, packed)):
            for pool in self.pools:
                pool.keep_below(counts)

    def _take(self, index: Tensor) -> None:
        chosen = index.tolist()
        if not self.is_initialized or chosen == list(range(self.keys.shape[0])):
            return
        self.keys, self.values = (x.new_empty(len(chosen), *x.shape[1:]) for x in (self.keys, self.values))
        self.numbers.take(chosen, self.device)
        self._tail().take(chosen)
        for pool in self.pools:
            pool.take(chosen)
        self._take_host(chosen)
        self.state = {}

    @classmethod
    def can_adopt(cls, layer: Any) -> bool:
        return IndexedLayer.can_adopt(layer)

    def adopt(self, layer: Any, tokens: Tokens) -> None:
        if not layer.is_initialized or layer.get_seq_length() == 0:
            return
        self.lazy_initialization(layer.keys, layer.values)
        batch, length = layer.keys.shape[0], layer.get_seq_length()
        real = None if tokens.mask is None else tokens.mask[:, :length]
        self._take_in(layer.keys, layer.values, NewTokens.padded(real, 0, batch, length))
        self._tail().settle()
        self._new = None

    # What reports need

    def nbytes(self) -> int:
        """Bytes of packed groups and of the tail: the logical part, without places allocated ahead."""
        return sum(self.bytes_by_precision().values())

    def bytes_by_precision(self) -> dict[str, int]:
        found: dict[str, int] = {}
        if self.tail is not None:
            found[str(self.dtype).removeprefix("torch.")] = self.tail.nbytes()
        for pool in self.pools:
            label = pool.label(self.dtype)
            found[label] = found.get(label, 0) + pool.nbytes()
        return {label: n for label, n in found.items() if n}

    def unquantised_bytes(self) -> int:
        if self.tail is None:
            return 0
        row = sum(x.shape[1] * x.shape[3] * x.element_size() for x in self.tail.rows())
        return row * sum(self.numbers.counts)
