"""`infer-patch calibrate dyvte`: gates that see when the visual tokens may leave.

1. For every question with its reference answer: features of the gates after each layer, and for each layer the label,
   from a run whose visual tokens leave there against the full run. A file per batch.
2. A gate per layer, fitted on these; nothing is propagated back through the model.
3. Each gate judged on pictures that it was not fitted on, class by class.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from infer_patch.api import is_patched, patch
from infer_patch.calibration.visual_questions import Questions, Source, questions
from infer_patch.calibration.work_folder import claim
from infer_patch.errors import PatchError
from infer_patch.evals.generation import collate
from infer_patch.families import ModelParts, describe
from infer_patch.files import replace_file
from infer_patch.patches.dyvte import FEATURES, DyVTE, exit_labels, gate_features, gate_logits
from infer_patch.progress import Progress

_IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """How gates are fitted.

    Parameters
    ----------
    source : Source
        The questions; gates are judged on its held-out pictures.
    hidden : int
        Width of the gates; the paper's is 2,048.
    steps, learning_rate, weight_decay : int, float, float
        Of fitting a gate: AdamW on all samples at once.
    seed : int
        Draws the initial gates.
    """

    source: Source = field(default_factory=Source)
    hidden: int = 64
    steps: int = 60
    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hidden < 1 or self.steps < 1 or self.learning_rate <= 0 or self.weight_decay < 0:
            raise PatchError(
                "hidden width and steps must be 1 or more, the learning rate above 0, weight decay 0 or more, got "
                f"{self.hidden}, {self.steps}, {self.learning_rate}, {self.weight_decay}."
            )
        if self.source.held_out < 1:
            raise PatchError("gates are judged on held-out pictures; ask for at least one.")


def calibrate_dyvte(
    model: Any,
    processor: Any,
    settings: GateSettings,
    work: Path,
    model_id: str = "",
    on_progress: Progress | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Gates for one model: the tensors and the metadata of an artifact.

    Parameters
    ----------
    model, processor
        As `infer_patch.evals.loading.load` gives them; the model is not patched.
    work : path
        Folder for features and labels; called again with it, nothing is run twice, and gates of another width need no
        run at all.
    on_progress : callable
        Told (batches done, batches in all, what comes next).
    """
    if is_patched(model):
        raise PatchError("this model is patched; call infer_patch.unpatch(model) before it is calibrated.")
    parts = describe(model)
    DyVTE(policy="fixed", exit_layer=0).applicable_layers(parts)  # refuses models that cannot be served
    asked = questions(settings.source, model, processor)
    tell = on_progress or (lambda done, total, what: None)
    total = sum(-(-len(part) // part.batch_size) for part in asked if part is not None)
    samples, done = [], 0
    for name, part in zip(("fit", "held-out"), asked):
        if part is None:
            raise PatchError("gates are judged on held-out pictures; ask for at least one.")
        folder = work / name
        claim(folder, model, {"questions": part.digest, "batch_size": part.batch_size})
        found = []
        for start in range(0, len(part), part.batch_size):
            tell(done, total, "reading features and labels")
            found.append(_sampled(folder / f"{start}.safetensors", part, start, model, processor, parts))
            done += 1
        samples.append({key: torch.cat([batch[key] for batch in found]) for key in ("features", "labels")})
    tensors, figures = {}, {}
    for layer in range(parts.num_layers - 1):
        features, labels = (s[:, layer] for s in (samples[0]["features"].float(), samples[0]["labels"]))
        w1, w2 = fit_gate(features, labels, settings)
        other, expected = samples[1]["features"].float()[:, layer], samples[1]["labels"][:, layer]
        figures[str(layer)] = {
            "fit": class_accuracy(features, labels, w1, w2),
            "held_out": class_accuracy(other, expected, w1, w2),
        }
        tensors[f"gates.{layer}.w1"], tensors[f"gates.{layer}.w2"] = w1.half(), w2.half()
    tell(total, total, "done")
    meta = {
        "model": Path(model_id).name if Path(model_id).exists() else model_id,
        "layers": parts.num_layers,
        "hidden": settings.hidden,
        "features": FEATURES,
        "threshold": 0.5,
        "data": [f"{len(part)} {settings.source.describe()}; hash {part.digest}" for part in asked if part is not None],
        "fitting": {name: getattr(settings, name) for name in ("steps", "learning_rate", "weight_decay", "seed")},
        "class_accuracy": figures,
    }
    return tensors, meta


def fit_gate(features: Tensor, labels: Tensor, settings: GateSettings) -> tuple[Tensor, Tensor]:
    """W1 (h, 2 C) and W2 (2, h) for features [n, 2 C] and labels bool [n]: cross-entropy, classes weighed alike."""
    scale = features.square().mean().sqrt().clamp(min=1e-12)  # states of deep layers are large; folded into W1 below
    inputs, target = features / scale, labels.long()
    rng = torch.Generator().manual_seed(settings.seed)
    shapes = (settings.hidden, features.shape[1]), (2, settings.hidden)
    weights = []
    for rows, columns in shapes:  # Xavier, uniform
        bound = (6 / (rows + columns)) ** 0.5
        weights.append(((torch.rand(rows, columns, generator=rng) * 2 - 1) * bound).requires_grad_())
    optimiser = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    with torch.enable_grad():
        for _ in range(settings.steps):
            optimiser.zero_grad()
            F.cross_entropy(gate_logits(inputs, *weights), target).backward()
            optimiser.step()
    w1, w2 = (weight.detach() for weight in weights)
    return w1 / scale, w2


def class_accuracy(features: Tensor, labels: Tensor, w1: Tensor, w2: Tensor) -> dict[str, Any]:
    """Share of right decisions among samples that must stay and among those that may leave, and their numbers."""
    decided = gate_logits(features, w1, w2).argmax(-1).bool()
    counts = {"stay": ~labels, "leave": labels}
    rows: dict[str, Any] = {}
    for name, members in counts.items():
        right = (decided == labels)[members].float().mean()
        rows[name] = {"samples": int(members.sum()), "right": round(float(right), 4) if members.any() else None}
    return rows


def _sampled(file: Path, part: Questions, start: int, model: Any, processor: Any, parts: ModelParts) -> dict[str, Any]:
    """Features [b, L - 1, 2 C] and labels bool [b, L - 1] of one batch, read from a file that is there."""
    try:
        return load(file.read_bytes())
    except (FileNotFoundError, SafetensorError):
        pass
    rows = range(start, min(start + part.batch_size, len(part)))
    answers = [answer_tokens(processor, str(part.items[i].reference)) for i in rows]
    found = sample_batch(model, parts, [part.encoded[i] for i in rows], answers, part.pad_token_id)
    replace_file(file, save({name: tensor.cpu().contiguous() for name, tensor in found.items()}))
    return found


def answer_tokens(processor: Any, text: str) -> list[int]:
    """The reference answer and the end token, where there is one."""
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


@torch.no_grad()
def sample_batch(
    model: Any, parts: ModelParts, prompts: list[dict[str, Any]], answers: list[list[int]], pad_token_id: int
) -> dict[str, Tensor]:
    """`features` bfloat16 [b, L - 1, 2 C] after each layer but the last, and `labels` bool [b, L - 1] for leaving
    there."""
    inputs = collate([_continued(p, a) for p, a in zip(prompts, answers)], pad_token_id)
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, _IGNORED)
    for row, answer in enumerate(answers):
        labels[row, -len(answer) :] = torch.tensor(answer, device=ids.device)
    longest = max(map(len, answers))
    labels = labels[:, -longest:]
    keep = {"logits_to_keep": longest + 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def predictions(output: Any) -> Tensor:
        return output.logits[:, -longest - 1 : -1].float()

    output = model(**inputs, **keep, output_hidden_states=True, use_cache=False)
    full = predictions(output)
    last = torch.tensor([ids.shape[1] - len(answer) - 1 for answer in answers], device=ids.device)
    visual = torch.isin(ids, torch.tensor(parts.image_token_ids, device=ids.device))
    states = output.hidden_states[1:]  # of these the last went through the final norm, and no gate reads it
    features = torch.stack([gate_features(states[i], visual, last) for i in range(parts.num_layers - 1)], 1)
    cuts = []
    for layer in range(parts.num_layers - 1):
        with patch(model, DyVTE(policy="fixed", exit_layer=layer)):
            cuts.append(exit_labels(full, predictions(model(**inputs, **keep, use_cache=False)), labels))
    return {"features": features.bfloat16(), "labels": torch.stack(cuts, 1)}


def _continued(prompt: dict[str, Any], answer: list[int]) -> dict[str, Any]:
    """The inputs of a prompt with an answer behind it."""
    shape, more = prompt["input_ids"].shape, torch.tensor([answer], device=prompt["input_ids"].device)
    longer = dict(prompt)
    for name, value in prompt.items():
        if isinstance(value, Tensor) and value.shape[:2] == shape:
            fill = {"input_ids": more, "attention_mask": torch.ones_like(more)}.get(name, torch.zeros_like(more))
            longer[name] = torch.cat([value, fill.to(value.dtype)], 1)
    return longer
