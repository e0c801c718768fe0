"""Calibration results on disk: a folder with `artifact.safetensors` and `artifact.json`, checked when loaded.

An artifact belongs to one method and one model. The JSON file therefore records the structure of the model
and a probe of its weights: single values at fixed places of a few matrices. They are compared within the
rounding error of 16-bit formats, which no hash allows, so an artifact made in float32 fits the same weights in
bfloat16 or float16, while another checkpoint of the same architecture is refused. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from infer_patch.availability import installed_version
from infer_patch.errors import ArtifactError
from infer_patch.files import replace_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "infer_patch artifact"
FORMAT_VERSION = 1
_JSON, _TENSORS = "artifact.json", "artifact.safetensors"
_FIELDS = {
    "method": str,
    "created_with": dict,
    "model": dict,
    "tensors": dict,
    "tensors_sha256": str,
    "meta": dict,
}
_MATRICES, _VALUES = 4, 16


@dataclass(frozen=True)
class Artifact:
    """A loaded calibration result: `tensors` on the CPU, and the `fingerprint` of the calibrated model."""

    method: str
    tensors: dict[str, torch.Tensor]
    meta: dict[str, Any]
    fingerprint: dict[str, Any]


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """Class of the model, shape of its text decoder, and `weights`, a probe of its values."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return {
        "architecture": type(model).__name__,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "vocab_size": config.vocab_size,
        "weights": _probe(model),
    }


def save_artifact(
    path: str | Path,
    method: str,
    tensors: Mapping[str, torch.Tensor],
    meta: dict[str, Any],
    model: PreTrainedModel,
) -> Path:
    """Write an artifact folder and return it.

    Both files are replaced atomically. The JSON file comes last and holds the checksum of the other, so a
    crash in between is noticed by `load_artifact`.
    """
    folder = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    data = save(tensors)
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "method": method,
        "created_with": {name: installed_version(name) for name in ("infer_patch", "torch", "transformers")},
        "model": fingerprint(model),
        "tensors": {name: _describe(tensor) for name, tensor in tensors.items()},
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
        "meta": meta,
    }
    try:
        text = json.dumps(document, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"meta must hold plain finite values that JSON can store: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / _TENSORS, data)
    replace_file(folder / _JSON, text.encode())
    return folder


def load_artifact(path: str | Path, method: str, model: PreTrainedModel, strict_weights: bool = True) -> Artifact:
    """Read an artifact folder, or raise `ArtifactError` unless every part of it fits.

    Parameters
    ----------
    path : str or Path
        The folder that `save_artifact` wrote.
    method, model : str, PreTrainedModel
        What the artifact is to be used for; it must have been made for the same.
    strict_weights : bool
        False accepts other weights of the same structure, for example a fine-tuned model.
    """
    folder = Path(path)
    remedy = f"Make a new one with `infer-patch calibrate {method}`."
    for name in (_JSON, _TENSORS):
        if not (folder / name).is_file():
            raise ArtifactError(f"expected an artifact folder at {folder}, but it has no {name}. {remedy}")
    document = _read_document(folder / _JSON, remedy)
    if document["method"] != method:
        raise ArtifactError(f"{folder} was made for the method {document['method']!r}, not for {method!r}. {remedy}")
    _check_model(folder, document["model"], model, strict_weights, remedy)
    data = (folder / _TENSORS).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != document["tensors_sha256"]:
        raise ArtifactError(
            f"{folder / _TENSORS} is damaged or belongs to another {_JSON}: its sha256 begins with "
            f"{digest[:12]}, expected {document['tensors_sha256'][:12]}. {remedy}"
        )
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ArtifactError(f"{folder / _TENSORS} cannot be read: {error}. {remedy}") from error
    found = {name: _describe(tensor) for name, tensor in tensors.items()}
    if found != document["tensors"]:
        raise ArtifactError(f"{folder} holds the tensors {found}, expected {document['tensors']}. {remedy}")
    return Artifact(method, tensors, document["meta"], document["model"])


def _read_document(path: Path, remedy: str) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except ValueError as error:  # also UnicodeDecodeError
        raise ArtifactError(f"{path} is not valid JSON ({error}). {remedy}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ArtifactError(f"{path} does not describe an {FORMAT}. {remedy}")
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        way_out = "Update infer_patch, or make" if isinstance(version, int) and version > FORMAT_VERSION else "Make"
        raise ArtifactError(
            f"{path} has format version {version!r}, but this release reads version {FORMAT_VERSION}. "
            f"{way_out}{remedy.removeprefix('Make')}"
        )
    for name, kind in _FIELDS.items():
        if not isinstance(document.get(name), kind):
            raise ArtifactError(f"{path} should hold {kind.__name__} at {name!r}, got {document.get(name)!r}. {remedy}")
    return document


def _check_model(
    folder: Path, expected: dict[str, Any], model: PreTrainedModel, strict_weights: bool, remedy: str
) -> None:
    actual = fingerprint(model)
    wrong = [
        f"{name} is {actual[name]!r}, expected {expected.get(name)!r}"
        for name in actual
        if name != "weights" and actual[name] != expected.get(name)
    ]
    if wrong:
        raise ArtifactError(f"{folder} was made for another model: {'; '.join(wrong)}. {remedy}")
    if strict_weights and not _same_weights(expected.get("weights"), model):
        raise ArtifactError(
            f"{folder} was made for a {expected['architecture']} with other weights than this one. {remedy} "
            "If the weights are meant to differ (a fine-tuned model), pass strict_weights=False."
        )


def _probe(model: PreTrainedModel, names: list[str] | None = None) -> dict[str, list[float]]:
    """Values at fixed places of the named matrices; by default of a few, spread evenly over the model."""
    # Offloaded weights have no values, quantised ones no floating-point values, and neither is needed.
    matrices = {
        name: weight
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and weight.is_floating_point() and not weight.is_meta
    }
    if names is None:
        every = list(matrices)
        names = sorted({every[i * (len(every) - 1) // (_MATRICES - 1)] for i in range(_MATRICES)}) if every else []
    values = {}
    for name in names:
        if name in matrices:
            weight = matrices[name].detach()
            flat = torch.arange(_VALUES) * (weight.numel() - 1) // (_VALUES - 1)
            picked = weight[(flat // weight.shape[1]).to(weight.device), (flat % weight.shape[1]).to(weight.device)]
            values[name] = picked.float().cpu().tolist()
    return values


def _same_weights(expected: Any, model: PreTrainedModel) -> bool:
    """Compare the probes of all matrices that both sides have; with none in common the answer is no."""
    if not isinstance(expected, dict):
        return False
    actual = _probe(model, list(expected))
    pairs = [(torch.tensor(expected[name]), torch.tensor(values)) for name, values in actual.items()]
    # bfloat16 rounds by at most 2^-9 of the value; float16 by less, but loses what lies below 2^-24.
    return bool(pairs) and all(a.shape == b.shape and torch.allclose(a, b, rtol=2**-8, atol=2**-24) for a, b in pairs)


def _describe(tensor: torch.Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
