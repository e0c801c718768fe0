"""`infer-patch calibrate moa`: from a model to a plan of spans, in steps that are kept and never done twice.

1. Prompts of several lengths, answered by the model itself (`moa_prompts`).
2. Influence of every block of attention weights on the loss of the answer (`moa_influence`): a file per prompt.
3. Plans that lose least under the limits on density (`moa_solver`), for every trade between the lengths.
4. The loss of the answers under each of them at a length that was not profiled; the best plan is kept.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from infer_patch.api import patch
from infer_patch.artifacts import fingerprint
from infer_patch.attention import PORT
from infer_patch.availability import installed_version, require
from infer_patch.calibration.moa_influence import answer_loss, prompt_influence
from infer_patch.calibration.moa_prompts import Example, make_example
from infer_patch.calibration.moa_rules import candidates, densities, key_heads, rule_losses
from infer_patch.calibration.moa_settings import BLOCK, SINK, Settings
from infer_patch.calibration.moa_solver import Problem, Solution, Solver, pareto_plans
from infer_patch.calibration.work_folder import claim
from infer_patch.errors import PatchError
from infer_patch.evals.needle import check_context, read_texts
from infer_patch.families import describe
from infer_patch.files import replace_file
from infer_patch.patches.moa import MoA, SpanPlan
from infer_patch.progress import Progress
from infer_patch.selection import plain_attention_layers


def calibrate(
    model: Any,
    tokenizer: Any,
    settings: Settings,
    work: str | Path,
    model_id: str = "",
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Find a plan of spans for one model.

    Parameters
    ----------
    model : PreTrainedModel
        In full or half precision, not patched.
    tokenizer : PreTrainedTokenizer or processor
    work : path
        Folder for what has been measured of this model and seed; called again with it, nothing is measured twice,
        and another density needs no new measurements.
    on_progress : callable
        Told (steps done, steps in all, what comes next).

    Returns
    -------
    dict
        The contents of a plan file: the layout of `SpanPlan`, with `densities`, `expected_loss` and `validation`.

    Raises
    ------
    PatchError
        Before any work: for a model that cannot be served, a limit that no rule keeps, prompts longer than the
        model's context, a folder that was made for another model or other prompts.
    MissingDependencyError
        Without SciPy.
    """
    require("scipy", "Calibrating MoA")
    return _Calibration(model, tokenizer, settings, Path(work), model_id, on_progress).run()


class _Calibration:
    def __init__(
        self, model: Any, tokenizer: Any, settings: Settings, work: Path, model_id: str, on_progress: Progress | None
    ):
        self.model, self.tokenizer = model, getattr(tokenizer, "tokenizer", tokenizer)
        self.settings, self.work, self.model_id, self._on_progress = settings, work, model_id, on_progress
        self.parts = describe(model)
        if any(PORT in vars(attention) for attention in self.parts.attentions):
            raise PatchError("this model is patched; call infer_patch.unpatch(model) before it is calibrated.")
        self.layers = plain_attention_layers("moa", self.parts)
        self.rules = candidates(settings.lengths, settings.limited, SINK, BLOCK)
        self.densities = densities(self.rules, settings.limited, SINK, BLOCK)
        least = self.densities.min(1)
        if (least > settings.density).any():
            raise PatchError(
                f"a density of {settings.density} cannot be kept at {settings.limited[int(least.argmax())]} tokens, "
                f"where the shortest span is {least.max():.3f} of the text. Raise it, or profile longer prompts."
            )
        check_context(model, max(settings.unseen, *settings.lengths), "answer included")
        self.text = None if settings.text_folder is None else read_texts(settings.text_folder)
        self._claim_folder()
        count = len(settings.lengths)
        solves = count + (count * settings.intervals ** (count - 1) if count > 1 else 0)
        self._done = 0
        self._total = count * settings.items + solves + (settings.validation_plans + 3) * settings.validation_items

    def run(self) -> dict[str, Any]:
        losses = [self._rule_losses(length) for length in self.settings.lengths]
        limits = np.full(len(self.settings.limited), self.settings.density)
        solver = Solver(Problem(np.array(losses), self.densities, limits, self.settings.max_rules))
        found = pareto_plans(solver, self.settings.intervals, lambda: self._begin("searching for plans"))
        plans = _spread(found, self.settings.validation_plans)
        spans = [self._plan(plan) for plan in plans]
        count = self.settings.validation_items
        self._total = self._done + (len(spans) + 3) * count
        examples = [self._example(number) for number in range(count)]
        uniform = _uniform(self.settings.density, self.parts.num_layers, self.parts.num_kv_heads)
        dense, window, *compared = (self._validated(plan, examples) for plan in (None, uniform, *spans))
        best = int(np.argmin(compared))
        self._begin("done")
        validation = {
            "length": self.settings.unseen,
            "loss": compared[best],
            "unpatched": dense,
            "one_window_for_all": window,
            "plans_compared": compared,
            "plans_found": len(found),
        }
        return self._document(plans[best], spans[best], validation)

    def _begin(self, what: str) -> None:
        """Say what comes next; it counts as done when the following step begins."""
        if self._on_progress is not None:
            self._on_progress(self._done, self._total, what)
        self._done += 1

    # Measuring

    def _rule_losses(self, length: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """What every rule loses at one length, on average over the prompts: [L, H_kv, rules]."""
        blocks, total = length // BLOCK, torch.zeros(())
        for number in range(self.settings.items):
            self._begin(f"profiling prompt {number + 1} of {self.settings.items}, {length} tokens")
            found = self._influence(length, number)
            room = blocks - found.shape[-1]
            total = total + F.pad(found.double(), (0, room, 0, room)) / self.settings.items
        shared = key_heads(total, self.parts.num_kv_heads, self.settings.reduce)
        return rule_losses(shared, self.rules, length, SINK, BLOCK)

    def _influence(self, length: int, number: int) -> Tensor:
        """Block influence [L, H, n, n] of one prompt."""
        file = self.work / f"influence-{length}-{number}.safetensors"
        if (kept := _read(file)) is not None:
            return kept["influence"]
        example = self._make(length, number)
        found, loss = prompt_influence(self.model, self.parts, example.input_ids, example.answer_tokens, BLOCK)
        influence = torch.stack([found[layer] for layer in self.layers])
        if not bool(influence.isfinite().all()):
            raise PatchError("gradients are not finite; load the model in float32 or bfloat16.")
        _write(file, influence=influence, input_ids=example.input_ids, loss=torch.tensor(loss))
        return influence

    def _example(self, number: int) -> Example:
        """A prompt of the length that is not profiled, with its answer."""
        self._begin(f"answering prompt {number + 1} of {self.settings.unseen} tokens")
        file = self.work / f"answer-{self.settings.unseen}-{number}.safetensors"
        if (kept := _read(file)) is not None:
            return Example(kept["input_ids"].to(self.model.device), int(kept["answer_tokens"]))
        example = self._make(self.settings.unseen, number)
        _write(file, input_ids=example.input_ids, answer_tokens=torch.tensor(example.answer_tokens))
        return example

    def _make(self, length: int, number: int) -> Example:
        settings = self.settings
        return make_example(
            self.model, self.tokenizer, length, number, settings.answer_tokens, settings.seed, self.text
        )

    @torch.no_grad()
    def _validated(self, plan: SpanPlan | None, examples: Sequence[Example]) -> float:
        """Mean loss of the answers under a plan; unpatched without one."""
        text = "unpatched" if plan is None else json.dumps(plan.to_dict())
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        kept = self.work / f"loss-{self.settings.unseen}-{len(examples)}-{name}.json"
        if kept.exists():
            self._done += len(examples)
            return float(json.loads(kept.read_text())["loss"])
        losses = []
        for example in examples:
            self._begin(f"comparing plans at {self.settings.unseen} tokens")
            if plan is None:
                losses.append(float(answer_loss(self.model, example.input_ids, example.answer_tokens)))
            else:
                file = self.work / "compared.json"
                replace_file(file, text.encode())
                method = MoA(plan_file=str(file), length=example.length, dense_below=0, layers=self.layers)
                with warnings.catch_warnings(), patch(self.model, method):
                    warnings.simplefilter("ignore", UserWarning)  # spans that cover everything never take effect
                    losses.append(float(answer_loss(self.model, example.input_ids, example.answer_tokens)))
        loss = float(np.mean(losses))
        replace_file(kept, json.dumps({"loss": loss, "losses": losses}).encode())
        return loss

    # Plans

    def _plan(self, solution: Solution) -> SpanPlan:
        """The spans of a solution; layers with a window of their own read everything they can."""
        rules = {
            layer: [self.rules[r] for r in row] for layer, row in zip(self.layers, solution.rules.tolist(), strict=True)
        }
        rows = [rules.get(i, [(0.0, 1.0)] * self.parts.num_kv_heads) for i in range(self.parts.num_layers)]
        alphas, betas = (tuple(tuple(rule[k] for rule in row) for row in rows) for k in (0, 1))
        return SpanPlan(alphas, betas, SINK, BLOCK, "kv")

    def _document(self, solution: Solution, plan: SpanPlan, validation: dict[str, Any]) -> dict[str, Any]:
        settings = self.settings
        facts = {key: value for key, value in fingerprint(self.model).items() if key != "weights"}
        return {
            **plan.to_dict(),
            "densities": {str(n): round(float(d), 4) for n, d in zip(settings.limited, solution.densities)},
            "expected_loss": {str(n): float(x) for n, x in zip(settings.lengths, solution.losses)},
            "validation": validation,
            "model": {"id": self.model_id, **facts},
            "settings": settings.to_dict(),
            "made_with": {name: installed_version(name) for name in ("infer_patch", "torch", "transformers", "scipy")},
        }

    def _claim_folder(self) -> None:
        """How many prompts, lengths and rules are taken does not matter: each is measured for itself."""
        texts = None if self.text is None else hashlib.sha256(self.text.encode()).hexdigest()
        values = {"seed": self.settings.seed, "answer_tokens": self.settings.answer_tokens, "texts": texts}
        claim(self.work, self.model, values)


def _uniform(density: float, layers: int, kv_heads: int) -> SpanPlan:
    """The same share of the text for every head."""
    return SpanPlan(((0.0,) * kv_heads,) * layers, ((density,) * kv_heads,) * layers, SINK, BLOCK, "kv")


def _spread(plans: list[Solution], most: int) -> list[Solution]:
    """At most so many of the plans, evenly over their order, the first and the last included."""
    if len(plans) <= most:
        return plans
    return [plans[round(i * (len(plans) - 1) / max(most - 1, 1))] for i in range(most)]


def _read(file: Path) -> dict[str, Tensor] | None:
    """The tensors of a file that is there and whole."""
    try:
        return load(file.read_bytes())
    except (FileNotFoundError, SafetensorError):
        return None


def _write(file: Path, **tensors: Tensor) -> None:
    replace_file(file, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))
