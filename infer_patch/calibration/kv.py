"""`infer-patch calibrate kv`: how many bits each layer's cache needs, measured layer by layer.

1. A text with a hidden number is read, once unpatched and once with every layer packed at each width. Prompts are
   attended to as they are, so a packed layer is the same whatever the layers around it do.
2. For every layer and width: that layer's cache packed, all others as they were, the question and the unpatched answer
   fed in one call; the KL divergence of its next-token distributions from the unpatched ones (nats, mean of tokens).
3. The cheapest width for each layer, as if drifts added up, under a limit on drift or on bytes (an integer program).
4. The policy found is measured as a whole; where it drifts more than allowed, 3 is done again with a smaller limit.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from infer_patch.api import patch
from infer_patch.attention import PORT
from infer_patch.availability import require
from infer_patch.errors import PatchError
from infer_patch.evals.drift import distances
from infer_patch.evals.needle import NeedleGrid
from infer_patch.families import describe
from infer_patch.patches.kv_quant import KVQuant
from infer_patch.plan import Plan
from infer_patch.progress import Progress
from infer_patch.selection import plain_attention_layers

_TRIES = 4  # policies measured at most


@dataclass(frozen=True)
class Settings:
    """What is measured, and what the policy must keep.

    Parameters
    ----------
    lengths : tuple of int
        Tokens of the texts.
    items : int
        Texts of each length.
    answer_tokens : int
        Tokens of the unpatched answer that are compared, besides those of the question.
    max_drift : float, optional
        The most mean KL divergence in nats; the policy is then the smallest.
    times_smaller : float, optional
        Instead: how many times smaller packed tokens must be; the policy is then the one that drifts least.
    important : float
        Share of tokens in 4 bits at the width "4/2".
    seed : int
        Draws the texts.
    """

    lengths: tuple[int, ...] = (1000, 2000)
    items: int = 2
    answer_tokens: int = 16
    max_drift: float | None = 0.01
    times_smaller: float | None = None
    important: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 300 or min(self.items, self.answer_tokens) < 1:
            raise PatchError(
                f"need texts of 300 tokens or more, items and answer tokens; got lengths {self.lengths}, "
                f"items {self.items}, answer_tokens {self.answer_tokens}"
            )
        if (self.max_drift is None) == (self.times_smaller is None):
            raise PatchError("give a limit on drift or how many times smaller the cache must be, one of the two.")
        if self.max_drift is not None and self.max_drift <= 0:
            raise PatchError(f"the limit on drift must be above 0 nats, got {self.max_drift}")

    def widths(self) -> dict[str, KVQuant]:
        """The choices a layer has besides its own precision: "4v2" is keys in 4 bits, values in 2."""
        mixed = KVQuant(bits=4, other_bits=2, important=self.important)
        narrow_values = KVQuant(bits=4, value_bits=2)
        return {"8": KVQuant(bits=8), "4": KVQuant(bits=4), "4v2": narrow_values, "4/2": mixed, "2": KVQuant(bits=2)}


def cheapest(costs: np.ndarray, limited: np.ndarray, limit: float) -> list[int]:
    """One choice per row [layers, choices]: the least sum of costs with a sum of `limited` of at most `limit`.

    Raises
    ------
    PatchError
        When no choice keeps the limit.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    rows, choices = costs.shape
    one_each = np.kron(np.eye(rows), np.ones(choices))
    scale = max(abs(limit), 1e-12)
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(limited.reshape(1, -1) / scale, -np.inf, limit / scale),
    ]
    found = milp(
        costs.reshape(-1) / max(float(costs.max()), 1e-12),
        constraints=constraints,
        bounds=Bounds(0, 1),
        integrality=np.ones(rows * choices),
    )
    if found.x is None:
        raise PatchError(
            f"no policy keeps the limit of {limit:.4g}: the least there is amounts to {limited.min(1).sum():.4g}"
        )
    return [int(i) for i in found.x.reshape(rows, choices).argmax(1)]


def policy_plan(settings: Settings, chosen: dict[int, str], name: str = "kv-policy") -> Plan:
    """One `kv_quant` entry for each width in use; layers that keep their own precision are in none."""
    entries = []
    for width, method in settings.widths().items():
        layers = tuple(layer for layer, picked in chosen.items() if picked == width)
        if layers:
            entries.append(replace(method, layers=layers))
    return Plan(tuple(entries), name)


def calibrate(
    model: Any, tokenizer: Any, settings: Settings, on_progress: Progress | None = None
) -> tuple[Plan, dict[str, Any]]:
    """Measure, and find a policy.

    Parameters
    ----------
    model : PreTrainedModel
        A language model, not patched.
    tokenizer : PreTrainedTokenizer or processor

    Returns
    -------
    Plan
        The policy: what `patch` takes.
    dict
        Plain values: `drift` and `bytes_per_token` by layer and width, `policy`, expected and measured drift.

    Raises
    ------
    PatchError
        Before any work for a model that is patched or cannot be served, or texts longer than its context; afterwards
        when no policy keeps the limit.
    MissingDependencyError
        Without SciPy.
    """
    require("scipy", "Calibrating the cache")
    return _Calibration(model, tokenizer, settings, on_progress).run()


@dataclass(frozen=True)
class _Sample:
    context: Tensor  # [n]
    rest: Tensor  # [T]: the question and the unpatched answer
    logits: Tensor  # [T, V], unpatched


class _Calibration:
    def __init__(self, model: Any, tokenizer: Any, settings: Settings, on_progress: Progress | None):
        self.model, self.tokenizer, self.settings = model, getattr(tokenizer, "tokenizer", tokenizer), settings
        self._on_progress = on_progress
        parts = describe(model)
        if any(PORT in vars(attention) for attention in parts.attentions):
            raise PatchError("this model is patched; call infer_patch.unpatch(model) before it is calibrated.")
        for method in settings.widths().values():
            method.applicable_layers(parts)
        self.layers = plain_attention_layers("kv_quant", parts)
        self.whole = 2 * parts.num_kv_heads * parts.head_dim * torch.finfo(model.dtype).bits / 8
        depths = tuple((i + 0.5) / settings.items for i in range(settings.items))
        task = NeedleGrid(settings.lengths, depths, seed=settings.seed, max_new_tokens=settings.answer_tokens)
        self.items = task.items(self.tokenizer, model)
        self._steps = len(self.items) * len(settings.widths()), 0

    @torch.no_grad()
    def run(self) -> tuple[Plan, dict[str, Any]]:
        widths = self.settings.widths()
        drift = {width: dict.fromkeys(self.layers, 0.0) for width in widths}
        size = {width: 0.0 for width in widths}
        samples = []
        for number, item in enumerate(self.items):
            sample, plain = self._sample(item)
            samples.append(sample)
            for width, method in widths.items():
                self._say(number * len(widths) + list(widths).index(width), f"{item.name}, {width} bits")
                packed, per_token = self._packed(sample, method)
                size[width] += per_token / len(self.items)
                for layer in self.layers:
                    found = self._drift_of_layer(sample, plain, packed, layer, method)
                    drift[width][layer] += found / len(self.items)
        return self._policy(samples, drift, size)

    def _policy(
        self, samples: Sequence[_Sample], drift: dict[str, dict[int, float]], size: dict[str, float]
    ) -> tuple[Plan, dict[str, Any]]:
        settings, names = self.settings, ["16", *drift]
        kl = np.array([[0.0, *(drift[width][layer] for width in drift)] for layer in self.layers])
        held = np.array([[self.whole, *size.values()]] * len(self.layers))
        limit, tried = settings.max_drift, []
        for number in range(_TRIES):
            if settings.times_smaller is not None:
                picks = cheapest(kl, held, len(self.layers) * self.whole / settings.times_smaller)
            else:
                picks = cheapest(held, kl, float(limit or 0.0))
            chosen = {layer: names[pick] for layer, pick in zip(self.layers, picks)}
            expected = float(kl[np.arange(len(picks)), picks].sum())
            self._say(self._steps[0], f"policy {number + 1}")
            measured = self._drift_of_plan(samples, policy_plan(settings, chosen))
            tried.append((expected, measured))
            if settings.max_drift is None or measured <= settings.max_drift:
                break
            limit = expected * 0.9 * settings.max_drift / measured
        smaller = self.whole / float(held[np.arange(len(picks)), picks].mean())
        document = {
            "policy": {str(layer): width for layer, width in chosen.items()},
            "drift": {width: {str(layer): value for layer, value in row.items()} for width, row in drift.items()},
            "bytes_per_token": {"16": self.whole, **size},
            "expected_drift": expected,
            "measured_drift": measured,
            "policies_measured": [{"expected": e, "measured": m} for e, m in tried],
            "kept": settings.max_drift is None or measured <= settings.max_drift,
            "times_smaller": smaller,
        }
        return policy_plan(settings, chosen), document

    def _sample(self, item: Any) -> tuple[_Sample, DynamicCache]:
        """A text with its unpatched answer, and the unpatched cache of the text."""
        ids, asked = torch.tensor(item.prompt.input_ids, device=self.model.device), item.prompt.question_tokens
        if asked is None:
            raise PatchError("the question has no tokens of its own in this model's chat template.")
        cache = DynamicCache(config=self.model.config)
        self.model(input_ids=ids[None, :-asked], past_key_values=cache, logits_to_keep=1)
        plain, rest = _shared(cache), ids[-asked:]
        logits = self.model(input_ids=rest[None], past_key_values=cache).logits[0]
        for _ in range(self.settings.answer_tokens):
            rest = torch.cat([rest, logits[-1:].argmax(-1)])
            more = self.model(input_ids=rest[None, -1:], past_key_values=cache).logits[0]
            logits = torch.cat([logits, more])
        return _Sample(ids[:-asked], rest, logits.float()), plain

    def _packed(self, sample: _Sample, method: KVQuant) -> tuple[list[Any], float]:
        """The cache layers of a text at one width, and the bytes of a packed token."""
        with patch(self.model, method):
            layers: Any = self._read(sample).layers
        pools = [pool.nbytes() for layer in self.layers for pool in layers[layer].pools]
        tokens = sum(sum(layers[layer].packed) for layer in self.layers)
        if not tokens:
            raise PatchError(f"texts of {len(sample.context)} tokens are too short: nothing of them is packed.")
        return layers, sum(pools) / tokens

    def _drift_of_layer(
        self, sample: _Sample, plain: DynamicCache, packed: Sequence[Any], layer: int, method: KVQuant
    ) -> float:
        one = Plan((replace(method, layers=(layer,)),))
        cache = _shared(plain)
        with patch(self.model, one) as handle:
            own = copy.deepcopy(packed[layer])
            own.made_by = handle._engine.stores[layer].key
            cache.layers[layer] = own
            return self._drift(sample, cache)

    def _drift_of_plan(self, samples: Sequence[_Sample], plan: Plan) -> float:
        if not plan.methods:
            return 0.0
        with patch(self.model, plan):
            return sum(self._drift(sample, self._read(sample)) for sample in samples) / len(samples)

    def _read(self, sample: _Sample) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        self.model(input_ids=sample.context[None], past_key_values=cache, logits_to_keep=1)
        return cache

    def _drift(self, sample: _Sample, cache: DynamicCache) -> float:
        """Mean KL divergence over the question and the answer, all of which read the text from this cache."""
        logits = self.model(input_ids=sample.rest[None], past_key_values=cache).logits[0]
        kl = distances(sample.logits, logits.float()).kl
        return sum(kl) / len(kl)

    def _say(self, done: int, what: str) -> None:
        if self._on_progress is not None:
            self._on_progress(done, self._steps[0] + 1, what)


def _shared(cache: DynamicCache) -> DynamicCache:
    """A cache of its own over the same keys and values: growing it makes new tensors."""
    fresh = DynamicCache()
    fresh.layers = [copy.copy(layer) for layer in cache.layers]
    return fresh
