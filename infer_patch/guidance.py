"""Classifier-free guidance against the prompt without its pictures, as PAINT's evaluation uses it (arXiv 2501.12206).

    guidance = ClassifierFreeGuidance(model, inputs)
    model.generate(**inputs, logits_processor=[guidance])

Not a patch: it changes what is sampled, not how the model runs, and works on patched and unpatched models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from infer_patch.errors import PatchError, UnsupportedCallError, UnsupportedModelError
from infer_patch.families import describe
from infer_patch.second_stream import SecondStream

_PER_TOKEN = ("input_ids", "token_type_ids")  # the latter tell PaliGemma what is prompt


class ClassifierFreeGuidance(SecondStream):
    """Weighs what the pictures add to the prompt: gamma (c - n) + n, on log-probabilities.

    c are those of the model as it runs, n those of a second stream of the same model whose prompt lacks the visual
    tokens of all pictures and videos and keeps everything else. Where c < log(cut) + max c the result is -inf. The
    second stream has a cache of its own, which follows beams, and no visual token that a patch could raise or drop.
    One more forward per token. Prompts without pictures in a batch get c.

    Parameters
    ----------
    model : PreTrainedModel
        Of a family whose prompts hold visual tokens, in one piece on one device.
    inputs : mapping
        What `generate` gets: `input_ids` and `attention_mask` [B, T].
    gamma : float
        1 changes nothing, and no second stream runs; more weighs the pictures more; 0 gives n. The authors: 1.1.
    cut : float
        Tokens less likely than `cut` times the likeliest are cut off, in [0, 1].

    Raises
    ------
    PatchError
        When gamma or cut are out of range.
    UnsupportedModelError
        When the model has no visual tokens.
    UnsupportedCallError
        When inputs hold no `input_ids`, no prompt holds a picture or one holds nothing else; later, when the processor
        is used with another prompt, or in assisted decoding.

    References
    ----------
    Sanchez et al., "Stay on topic with Classifier-Free Guidance", arXiv 2306.17806, 2023; against the prompt without
    its picture in Arif et al., "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large
    Vision-Language Model" (PAINT), arXiv 2501.12206, 2025.
    """

    name = "guidance"

    def __init__(self, model: Any, inputs: Mapping[str, Any], *, gamma: float = 1.1, cut: float = 0.1):
        if not (math.isfinite(gamma) and gamma >= 0):
            raise PatchError(f"guidance: gamma must be 0 or more, got {gamma}")
        if not 0 <= cut <= 1:
            raise PatchError(f"guidance: cut must be between 0 and 1, got {cut}")
        parts = describe(model)
        if not parts.image_token_ids:
            raise UnsupportedModelError(
                f"guidance takes the pictures out of a prompt, and {parts.model_type} has no visual tokens in it."
            )
        super().__init__(model, inputs)
        self.gamma, self.cut = gamma, cut
        visual = torch.isin(self._prompt, torch.tensor(parts.image_token_ids, device=self._prompt.device))
        self._pictured = (visual & self._real).any(1)
        if not bool(self._pictured.any()):
            raise UnsupportedCallError(
                "guidance compares prompts with the same prompts without pictures, and none of these holds a visual "
                f"token (ids {parts.image_token_ids}); leave the processor out."
            )
        kept = self._real & ~visual
        if not bool(kept.any(1).all()):
            raise UnsupportedCallError(
                f"guidance: without its pictures prompt {int(kept.any(1).int().argmin())} is empty; put text in it."
            )
        given = {name: inputs.get(name) for name in _PER_TOKEN}
        per_token = {name: x for name, x in given.items() if isinstance(x, Tensor) and x.shape == kept.shape}
        self._second = [{name: x[i][row.to(x.device)] for name, x in per_token.items()} for i, row in enumerate(kept)]

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [rows, vocabulary], logits or log-probabilities, guided: log-probabilities, fp32, not normalised."""
        with_pictures = scores.float().log_softmax(-1)
        if self.gamma == 1:
            return with_pictures
        guided = guide(with_pictures, self.second_log_probabilities(input_ids), self.gamma, self.cut)
        pictured = self._pictured.to(scores.device).repeat_interleave(len(scores) // len(self._pictured))
        return torch.where(pictured[:, None], guided, with_pictures)


def guide(conditional: Tensor, unconditional: Tensor, gamma: float, cut: float) -> Tensor:
    """gamma (c - n) + n where c >= log(cut) + max c, else -inf: log-probabilities c, n [rows, vocabulary]."""
    least = conditional.amax(-1, keepdim=True) + (math.log(cut) if cut > 0 else -math.inf)
    off = (conditional < least) | conditional.isneginf()  # what other processors forbid stays forbidden
    return (gamma * (conditional - unconditional) + unconditional).masked_fill(off, -math.inf)
