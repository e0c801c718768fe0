"""What one head attends to under a plan: its whole attention matrix, measured instead of worked out.

Attention is linear in the values. So a layer whose values are the columns of an identity matrix gives its attention
probabilities as output: sparse, calibrated or dense, whatever stands in the layer, without asking the method.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from infer_patch.api import patch
from infer_patch.attention import PORT
from infer_patch.errors import PatchError
from infer_patch.evals.kept_tokens import as_seen
from infer_patch.evals.results import file_name, plain
from infer_patch.evals.schema import AttentionView
from infer_patch.families import describe
from infer_patch.plan import Plan
from infer_patch.report.attention_pictures import Seen, changes, drawn, moved
from infer_patch.tokens import image_numbers
from infer_patch.visual_grid import picture_grids

if TYPE_CHECKING:
    from infer_patch.evals.session import Ready


@torch.no_grad()
def head_attention(model: Any, plan: Plan | None, inputs: Mapping[str, Any], layer: int, head: int) -> Tensor | str:
    """Attention probabilities of one head while it reads a prompt: float32 [T, T].

    Parameters
    ----------
    model : PreTrainedModel
        Not patched; it is not afterwards either.
    plan : Plan or None
        None: the unpatched model.
    inputs : mapping
        What the model's forward takes for one sample.

    Returns
    -------
    Tensor or str
        Rows and columns of tokens that the plan dropped before the layer are 0. Where nothing can be measured, why.
    """
    check_head(model, layer, head)
    parts = describe(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*never took effect", UserWarning)
        with patch(model, Plan() if plan is None else plan) as handle:
            port = vars(parts.attentions[layer])[PORT]
            probe = _Probe(handle._engine, head, inputs["input_ids"].shape[1])
            port.engine, port.active = probe, True
            model(**inputs)
    return probe.found


def check_head(model: Any, layer: int, head: int) -> None:
    """Raise `PatchError` for a layer or a head that the model has not."""
    parts = describe(model)
    for name, number, count in (("layer", layer, parts.num_layers), ("head", head, parts.num_heads)):
        if not 0 <= number < count:
            raise PatchError(f"there is no {name} {number} in {parts.model_type}: it has {count}, counted from 0.")


def attention_views(
    model: Any, processor: Any, plans: Sequence[Plan], prompt: Ready, layer: int, head: int, images: Sequence[Any] = ()
) -> tuple[list[AttentionView], dict[str, bytes]]:
    """One head on one prompt before and after each plan; the pictures by the names of their files.

    `images` are those of the prompt (PIL): over the first one it is drawn what the last token reads there.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    pieces = [str(tokenizer.decode([token])) for token in prompt.inputs["input_ids"][0].tolist()]
    before = head_attention(model, None, prompt.inputs, layer, head)
    seen = _first_picture(model, processor, prompt.inputs, images)
    views: list[AttentionView] = []
    files: dict[str, bytes] = {}
    for plan in plans:
        after = head_attention(model, plan, prompt.inputs, layer, head)
        view: AttentionView = {
            "plan": plan.name,
            "prompt": prompt.name,
            "layer": layer,
            "head": head,
            "file": None,
            "moved": None,
            "moved_last": None,
            "changes": [],
            "problem": after if isinstance(after, str) else None,
        }
        if isinstance(before, Tensor) and isinstance(after, Tensor):
            view["file"] = file = f"attention/{file_name(plan.name)}.png"
            files[file] = drawn(before, after, seen)
            view["moved"], view["moved_last"] = plain(moved(before, after))
            view["changes"] = plain(changes(before, after, pieces))
        views.append(view)
    return views, files


def _first_picture(model: Any, processor: Any, inputs: Mapping[str, Any], images: Sequence[Any]) -> Seen | None:
    """The first picture of a prompt as the model sees it; None where its tokens form no single grid."""
    grids = picture_grids(inputs, model.config) if images else []
    if not grids or len(grids) != len(images) or grids[0] is None:
        return None
    ids, kinds = inputs["input_ids"], describe(model).image_token_ids
    numbers = image_numbers(torch.isin(ids, torch.tensor(kinds, device=ids.device)), dict(inputs))
    places = None if numbers is None else (numbers[0] == 0).nonzero()[:, 0].cpu()
    if places is None or len(places) != grids[0].tokens:
        return None
    return Seen(as_seen(inputs, images, processor)[0], grids[0], places)


_REMEMBERED = "state", "notes", "memory"  # what methods keep in a cache layer


def _copied(value: Any) -> Any:
    """A copy down to the tensors. Keys are shared: methods use their runtimes as keys."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [_copied(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value.clone() if isinstance(value, Tensor) else value


class _Probe:
    """Stands in for the engine at one layer: attends as the engine does, then asks it again for the probabilities."""

    def __init__(self, engine: Any, head: int, tokens: int):
        self.engine, self.head = engine, head
        self.found: Tensor | str = torch.zeros(tokens, tokens)

    def attend(self, port: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
        run = self.engine.run
        held = None if run is None else run.held(port.layer)
        if held is not None and held.attends:
            self.found = "this plan attends from a cache of its own form, where nothing can be measured"
            return self.engine.attend(port, module, q, k, v, mask, kwargs)
        kept = {} if held is None else {name: vars(held)[name] for name in _REMEMBERED if name in vars(held)}
        before = _copied(kept)
        shared = None if run is None else dict(run.tokens.shared)
        output = self.engine.attend(port, module, q, k, v, mask, kwargs)
        after = {name: getattr(held, name) for name in kept}
        keys, width, columns = k.shape[2], v.shape[3], []
        for first in range(0, keys, width):
            if held is not None:
                vars(held).update(_copied(before))
            if run is not None and shared is not None:
                run.tokens.shared.clear()
                run.tokens.shared.update(shared)
            some = torch.zeros_like(v)
            count = min(width, keys - first)
            some[:, :, range(first, first + count), range(count)] = 1
            probabilities = self.engine.attend(port, module, q, k, some, mask, kwargs)[0]
            columns.append(probabilities[0, :, self.head, :count].float().cpu())
        if held is not None:
            vars(held).update(after)
        self._place(torch.cat(columns, 1), run, port.layer)
        return output

    def _place(self, rows: Tensor, run: Any, layer: int) -> None:
        """Put rows and columns where their tokens stand in the prompt."""
        queries = keys = None
        if run is not None:
            view = run.key_view(layer, rows.shape[1])
            keys = None if view.positions is None else view.positions[0].cpu()
            if run.reduction is not None:
                queries = run.reduction.positions(run.tokens.past)[0].cpu()
        keys = torch.arange(rows.shape[1]) if keys is None else keys
        queries = keys[-rows.shape[0] :] if queries is None else queries
        found = self.found
        if isinstance(found, Tensor):
            found[queries[:, None], keys] = rows
