"""Attention-mass recall: how much of the dense attention falls into the key blocks that a plan reads, layer by layer.

The model runs its prompt dense. In every layer a recording method sees the true queries and keys, asks each plan at
each budget for its block lists, and sums the exact softmax mass in them over all rows of some query blocks of the
second half of the prompt. So all plans are judged on the same attention, that of the unpatched model.

Two rows say what is possible: `oracle`, the blocks that hold most mass of each query block (one list per key head, as
the plans have), and `random`. Both read the query's own block and the first one in any case.
"""

from __future__ import annotations

import itertools
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from infer_patch.api import patch
from infer_patch.errors import PatchError, PlanError
from infer_patch.evals.attention_mass import block_mass, listed_mass, lists_of, oracle_lists, random_lists
from infer_patch.evals.budgets import BLOCK, always_sparse, with_budget
from infer_patch.families import ModelParts, describe
from infer_patch.kernels.block_mask import BlockMask
from infer_patch.kernels.hidden_keys import HiddenKeys
from infer_patch.kernels.subset_attention import TokenSubset
from infer_patch.method import Method, Runtime
from infer_patch.plan import Plan
from infer_patch.progress import Progress
from infer_patch.run import AttentionCall
from infer_patch.selection import plain_attention_layers

ORACLE, RANDOM = "oracle", "random"

Row = tuple[str, int]  # plan, budget


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Parameters
    ----------
    budgets : tuple of int
        Tokens read per query block, multiples of 64 (see `budgets`).
    query_blocks : int
        Query blocks of 64 that are looked at, spread over the second half of each prompt.
    seed : int
        Of the random lists.
    """

    budgets: tuple[int, ...] = (256, 512, 1024)
    query_blocks: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.budgets or any(b < 2 * BLOCK or b % BLOCK for b in self.budgets):
            raise PatchError(f"budgets must be multiples of {BLOCK} from {2 * BLOCK} up, got {self.budgets}")
        if self.query_blocks < 1:
            raise PatchError(f"need 1 or more query blocks, got {self.query_blocks}")


def measure(
    model: Any,
    plans: Sequence[Plan],
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    on_layer: Progress | None = None,
) -> list[dict[str, Any]]:
    """One entry per plan and budget, then those of the oracle and of chance.

    Parameters
    ----------
    model : PreTrainedModel
        Unpatched; it is left as it was.
    plans : sequence of Plan
        With one selecting method per layer whose budget can be set.
    prompts : sequence of token ids
        At least eight blocks of 64 tokens each.
    on_layer : callable, optional
        Called before each layer with the number of layers done, of all, and a word.

    Returns
    -------
    list of dict
        `recall` and `p10`: mean and 10th percentile of the mass in the listed blocks, over layers, query heads and
        queries; None where the plan runs dense everywhere. `tokens_read`: mean length of a list in tokens. `by_layer`:
        the same per layer. `dense_layers`: layers the plan leaves dense, with the reason; they do not count.
    """
    names = [plan.name for plan in plans]
    if len({ORACLE, RANDOM, *names}) < len(names) + 2:
        raise PatchError(f"plans need different names, none of them {ORACLE!r} or {RANDOM!r}; got {', '.join(names)}")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for ids in prompts:
        if len(ids) < 8 * BLOCK:
            raise PatchError(f"a prompt of {len(ids)} tokens is too short to select from: give {8 * BLOCK} or more.")
        if limit is not None and len(ids) > limit:
            raise PatchError(f"{len(ids)} tokens are more than the {limit} this model takes; give a shorter --length.")
    parts = describe(model)
    rows: dict[Row, dict[int, Runtime]] = {
        (plan.name, budget): _selectors(with_budget(always_sparse(plan), budget), parts)
        for budget in settings.budgets
        for plan in plans
    }
    figures = _Figures()
    layers = plain_attention_layers("recall", parts)
    seen = itertools.count()
    for ids in prompts:
        look = _Look(rows, settings, figures)

        def see(layer: int, call: AttentionCall, look: _Look = look) -> None:
            if on_layer is not None:
                on_layer(next(seen), len(prompts) * len(layers), f"layer {layer} of {call.k.shape[2]:,} tokens")
            look(layer, call)

        _run(model, _Record(layers=layers, see=see), ids)
    return [figures.result(name, budget) for budget in settings.budgets for name in (*names, ORACLE, RANDOM)]


def _selectors(plan: Plan, parts: ModelParts) -> dict[int, Runtime]:
    """The selecting runtime of each layer."""
    found = {}
    for method, layers in plan.resolve(parts):
        if "select" in method.active_ports():
            found.update(dict.fromkeys(layers, method.runtime(parts, layers)))
    if not found:
        raise PlanError(f"{plan.name} selects no key blocks, so there is nothing to recall.")
    return found


@torch.no_grad()
def _run(model: Any, recorder: _Record, ids: Sequence[int]) -> None:
    inputs = torch.tensor([list(ids)], device=model.get_input_embeddings().weight.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the recorder never takes effect, on purpose
        with patch(model, recorder):
            model(input_ids=inputs, use_cache=False, logits_to_keep=1)


def _nothing(layer: int, call: AttentionCall) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class _Record(Method):
    """Shows queries and keys of its layers to `see`, and runs them dense. Not registered: no plan file can name it."""

    see: Callable[[int, AttentionCall], None] = _nothing

    name = "recall"
    ports = ("select",)
    summary = "looks on"

    def runtime(self, parts: ModelParts, layers: tuple[int, ...]) -> Runtime:
        return _Recorder(self, parts, layers)


class _Recorder(Runtime):
    config: _Record

    def select(self, layer: int, call: AttentionCall) -> str:
        self.config.see(layer, call)
        return "attention is being looked at"


class _Look:
    """Takes the figures of one prompt, layer by layer."""

    def __init__(self, rows: dict[Row, dict[int, Runtime]], settings: Settings, figures: _Figures):
        self.rows, self.settings, self.figures = rows, settings, figures

    def __call__(self, layer: int, call: AttentionCall) -> None:
        choices: dict[Row, BlockMask] = {}
        for row, runtimes in self.rows.items():
            reason: BlockMask | TokenSubset | HiddenKeys | str = "the plan leaves this layer dense"
            if layer in runtimes:
                reason = runtimes[layer].select(layer, replace(call, state={}))
            if isinstance(reason, BlockMask):
                choices[row] = reason
            elif isinstance(reason, (TokenSubset, HiddenKeys)):
                self.figures.dense.setdefault(row, {})[layer] = "the plan gathers tokens and lists no blocks"
            else:
                self.figures.dense.setdefault(row, {})[layer] = reason
        generator = torch.Generator().manual_seed(self.settings.seed + layer)
        for block in query_blocks(call.k.shape[2], self.settings.query_blocks):
            self._block(layer, call, block, choices, generator)

    def _block(
        self, layer: int, call: AttentionCall, block: int, choices: dict[Row, BlockMask], generator: torch.Generator
    ) -> None:
        """Mass of every row's lists for the queries of one block."""
        queries, keys, kv_heads = call.q.shape[2], call.k.shape[2], call.k.shape[1]
        start = block * BLOCK
        sizes = {mask.block_k for mask in choices.values()} | {BLOCK}
        mass = {size: block_mass(call.q, call.k, start, start + BLOCK, size, call.scale) for size in sizes}
        for row, mask in choices.items():
            lists, count = lists_of(mask, start, queries, keys)
            found = listed_mass(mass[mask.block_k], lists, count)
            self.figures.add(row, layer, found, float(count.float().mean()) * mask.block_k)
        for budget in self.settings.budgets:
            always, width = (0, block), budget // BLOCK
            best = oracle_lists(mass[BLOCK][..., : block + 1], kv_heads, width, always)
            chance = random_lists(call.q.shape[0], kv_heads, block + 1, width, always, generator).to(best.device)
            for name, lists in ((ORACLE, best), (RANDOM, chance)):
                count = torch.full(lists.shape[:2], lists.shape[-1], device=lists.device)
                self.figures.add((name, budget), layer, listed_mass(mass[BLOCK], lists, count), lists.shape[-1] * BLOCK)


def query_blocks(keys: int, count: int) -> list[int]:
    """Up to `count` whole blocks of queries, evenly spread over the second half of a prompt, its last one included."""
    first, last = keys // BLOCK // 2, keys // BLOCK - 1
    count = min(count, last - first + 1)
    return [last - (last - first) * i // max(count - 1, 1) for i in reversed(range(count))]


class _Figures:
    """Mass in the listed blocks, of every row, layer, query and head that was looked at."""

    def __init__(self) -> None:
        self.mass: dict[Row, dict[int, list[Tensor]]] = {}
        self.tokens: dict[Row, list[float]] = {}
        self.dense: dict[Row, dict[int, str]] = {}

    def add(self, row: Row, layer: int, mass: Tensor, tokens: float) -> None:
        self.mass.setdefault(row, {}).setdefault(layer, []).append(mass.flatten().cpu())
        self.tokens.setdefault(row, []).append(tokens)

    def result(self, name: str, budget: int) -> dict[str, Any]:
        row = name, budget
        by_layer = {layer: torch.cat(parts) for layer, parts in sorted(self.mass.get(row, {}).items())}
        return {
            "plan": name,
            "budget": budget,
            **_summary(torch.cat(list(by_layer.values())) if by_layer else None),
            "tokens_read": round(statistics.fmean(self.tokens[row]), 1) if by_layer else None,
            "by_layer": {layer: _summary(mass) for layer, mass in by_layer.items()},
            "dense_layers": self.dense.get(row, {}),
        }


def _summary(mass: Tensor | None) -> dict[str, float | None]:
    if mass is None:
        return {"recall": None, "p10": None}
    p10 = mass.kthvalue(max(1, round(0.1 * mass.numel()))).values
    return {"recall": round(float(mass.double().mean()), 4), "p10": round(float(p10), 4)}
