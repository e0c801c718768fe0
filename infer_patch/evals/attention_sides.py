"""What `bench prefill` and `bench decode` time against each other: dense attention in several forms, and plans.

A plan runs through the engine's own `attend`, with a cache layer as a patched model would have it, on queries, keys and
values that come from nowhere. So block selection, fallbacks, counting and the layout of the output are those of a real
run; projections, rotary embedding and the copy of new keys into the cache are not timed.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from infer_patch.attend import attend
from infer_patch.attention import Port
from infer_patch.availability import is_available
from infer_patch.cache import IndexedLayer
from infer_patch.engine import Engine
from infer_patch.errors import PatchError, PlanError
from infer_patch.evals.stopwatch import Stopwatch
from infer_patch.families import ModelParts, describe
from infer_patch.kernels.block_mask import BlockMask, causal_blocks
from infer_patch.kernels.hidden_keys import HiddenKeys
from infer_patch.kernels.subset_attention import TokenSubset
from infer_patch.plan import Plan
from infer_patch.run import Run
from infer_patch.stats import make_report
from infer_patch.tokens import Tokens

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


class Side(ABC):
    """One row of the table. `extend` brings keys and values and is not timed; `attend` is."""

    kind = "dense"

    def __init__(self, name: str):
        self.name = name

    def start(self) -> None:
        """Forget all keys."""
        self.k = self.v = torch.empty(0)

    def extend(self, k: Tensor, v: Tensor, keys: int) -> None:
        """Let the first `keys` rows of k, v [B, H_kv, capacity, D] be there, the last of them new."""
        self.k, self.v = k[:, :, :keys], v[:, :, :keys]

    def cache_bytes(self) -> int:
        """Bytes of the keys and values held."""
        return sum(x.numel() * x.element_size() for x in (self.k, self.v))

    @abstractmethod
    def attend(self, q: Tensor) -> Tensor:
        """q [B, H, T, D] of the newest T keys -> [B, T, H, D], contiguous."""


class Dense(Side):
    """Exact attention by some kernel: (q, k, v) -> [B, T, H, D]."""

    def __init__(self, name: str, kernel: Kernel, kind: str = "dense"):
        super().__init__(name)
        self.kernel, self.kind = kernel, kind

    def attend(self, q: Tensor) -> Tensor:
        return self.kernel(q, self.k, self.v)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's SDPA as transformers calls it: causal for a prompt (T = S), everything for one new token."""
    out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


def folded_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Decode with the query heads of a key head as rows [B, H_kv, G, D]: keys are read once per key head."""
    batch, heads, queries, size = q.shape
    out = F.scaled_dot_product_attention(q.view(batch, k.shape[1], -1, size), k, v)
    return out.view(batch, heads, queries, size).transpose(1, 2).contiguous()


def flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The package flash-attn; its causal mask puts the queries last among the keys."""
    from flash_attn import flash_attn_func

    return cast(Tensor, flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True))


def why_no_flash_attn(q: Tensor) -> str | None:
    """Why flash-attn cannot run here, or None if it can."""
    if not is_available("flash-attn"):
        return "the package is not installed, or too old"
    if not q.is_cuda:
        return "it needs a CUDA device"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return "it needs float16 or bfloat16"
    return None


class PlanSide(Side):
    """Attention of one patched layer.

    `choice` is what its select port gave last (a mask, or why the layer ran dense); `selection` holds the marks around
    each choice since they were last cleared.
    """

    kind = "plan"

    def __init__(self, plan: Plan, parts: ModelParts, watch: Stopwatch, layer: int | None = None):
        super().__init__(plan.name)
        self.engine = Engine(parts, plan)
        self.layer = _layer(self.engine, plan, layer)
        self.choice: BlockMask | TokenSubset | HiddenKeys | str | None = None
        self.selection: list[tuple[Any, Any]] = []
        self._watch = watch
        self._run: Run | None = None
        selectors = {i: _Timed(self, r) if i == self.layer else r for i, r in self.engine.selectors.items()}
        self._stage = _Stage(self.engine, selectors)
        self._port = Port(self.engine, self.layer, _dense, True)

    def start(self) -> None:
        store = self.engine.stores.get(self.layer)
        self._held = IndexedLayer() if store is None else store.cache_layer(self.layer)
        self._held.made_by = None if store is None else store.key
        self._cache = DynamicCache()
        self._cache.layers = [*(DynamicLayer() for _ in range(self.layer)), self._held]

    def extend(self, k: Tensor, v: Tensor, keys: int) -> None:
        self.engine.stats.reset()
        past = self._held.get_seq_length()
        tokens = Tokens(k.shape[0], keys - past, past, mask=None, image=None, device=k.device)
        self._held.expect(tokens, None)
        self.k, self.v = self._held.update(k[:, :, past:keys], v[:, :, past:keys])
        self._stage.run = Run(tokens, self._cache, False)

    def cache_bytes(self) -> int:
        return self._held.nbytes()

    def attend(self, q: Tensor) -> Tensor:
        module = self.engine.parts.attentions[self.layer]
        out, _ = attend(cast(Engine, self._stage), self._port, module, q, self.k, self.v, None, {})
        return out

    def kept_share(self) -> float | None:
        """Share of the causal key blocks read since `extend`; None where no blocks are counted."""
        figures = make_report(self.engine.stats, "", "").methods.values()
        return next((f["share_read"][self.layer] for f in figures if f.get("share_read")), None)


class _Timed:
    """A runtime whose choices are timed."""

    def __init__(self, side: PlanSide, runtime: Any):
        self._side, self._runtime = side, runtime

    def select(self, layer: int, call: Any) -> BlockMask | TokenSubset | HiddenKeys | str:
        begin = self._side._watch.mark()
        self._side.choice = choice = self._runtime.select(layer, call)
        self._side.selection.append((begin, self._side._watch.mark()))
        return choice

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)


class _Stage:
    """What `attend` asks an engine for, without a model that runs."""

    def __init__(self, engine: Engine, selectors: dict[int, Any]):
        self.engine, self.selectors = engine, selectors
        self.run: Run | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def _dense(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return sdpa(q, k, v), None


def _layer(engine: Engine, plan: Plan, asked: int | None) -> int:
    """The layer to play: a middle one, since methods may treat the first and last ones in their own way."""
    served = sorted({*engine.selectors, *engine.stores})
    if not served:
        raise PlanError(f"{plan.name} selects nothing and stores nothing, so it leaves attention as it is.")
    if asked is None:
        return served[len(served) // 2]
    if asked not in served:
        raise PlanError(f"{plan.name} does not act on layer {asked}; it acts on {', '.join(map(str, served))}.")
    return asked


def llama_parts(heads: int, kv_heads: int, head_dim: int, layers: int, context: int) -> ModelParts:
    """Parts of a Llama of these sizes whose weights take no memory."""
    if min(heads, kv_heads, head_dim, layers) < 1 or heads % kv_heads:
        raise PatchError(f"heads must be a multiple of kv-heads, got {heads} and {kv_heads} (head size {head_dim})")
    sizes: dict[str, Any] = {"hidden_size": heads * head_dim, "intermediate_size": 64, "vocab_size": 64}
    config = LlamaConfig(
        **sizes,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
    )
    with torch.device("meta"):
        return describe(LlamaForCausalLM(config))


class Flex(Side):
    """flex_attention, compiled, over the lists that a plan chose (the choice itself is not timed)."""

    kind = "flex"

    def __init__(self, plan: PlanSide):
        from torch.nn.attention.flex_attention import flex_attention

        super().__init__(f"flex: {plan.name}")
        self.kept_share: float | None = None
        self._plan = plan
        self._mask: Any = None
        self._compiled: Any = torch.compile(flex_attention, dynamic=False)

    def extend(self, k: Tensor, v: Tensor, keys: int) -> None:
        super().extend(k, v, keys)
        if self._mask is not None:
            return
        choice, (batch, kv_heads, length, _) = self._plan.choice, self.k.shape
        if not isinstance(choice, BlockMask):
            raise PlanError(f"{self._plan.name} gave no lists" + (f": {choice}" if isinstance(choice, str) else ""))
        causal = causal_blocks(length, length, choice.block_q, choice.block_k) * batch * kv_heads
        self.kept_share = round(float(choice.blocks_read(batch, kv_heads)) / causal, 4)
        self._mask = flex_mask(choice, batch, self._plan.engine.parts.num_heads, length)

    def attend(self, q: Tensor) -> Tensor:
        out = self._compiled(q, self.k, self.v, block_mask=self._mask, enable_gqa=True)
        return cast(Tensor, out).transpose(1, 2).contiguous()


def flex_mask(mask: BlockMask, batch: int, heads: int, length: int) -> Any:
    """Our lists as the BlockMask of flex_attention, for a prompt of `length` tokens that nothing comes before."""
    from torch.nn.attention.flex_attention import BlockMask as FlexMask

    n_q, n_k = mask.count.shape[-1], -(-length // mask.block_k)
    lists, per = mask.idx.shape[1], mask.block_q // mask.block_k
    idx = F.pad(mask.idx, (0, max(n_k - mask.idx.shape[-1], 0))).clamp(0, n_k - 1)
    idx = idx.expand(batch, lists, n_q, -1).repeat_interleave(heads // lists, 1).int()
    count = mask.count.expand(batch, lists, n_q).repeat_interleave(heads // lists, 1).int()
    # the causal triangle lies in the last entries; all others are read whole
    row = torch.arange(n_q, device=idx.device)
    partial = (((row + 1) * per).clamp(max=n_k) - row * per).int().expand_as(count)
    whole = count - partial
    triangle = (whole[..., None] + torch.arange(per, device=idx.device)).clamp(max=n_k - 1)
    options: dict[str, Any] = {}
    if "compute_q_blocks" in inspect.signature(FlexMask.from_kv_blocks).parameters:
        options["compute_q_blocks"] = False  # those are for the backward pass
    return FlexMask.from_kv_blocks(
        partial.contiguous(),
        F.pad(idx.gather(-1, triangle), (0, n_k - per)).contiguous(),
        whole.contiguous(),
        idx.contiguous(),
        BLOCK_SIZE=(mask.block_q, mask.block_k),
        mask_mod=_causal,
        seq_lengths=(length, length),
        **options,
    )


def _causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k
