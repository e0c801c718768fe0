"""`eval drift`: how far a plan moves the model's next-token distributions, and where it begins to say other things.

Teacher-forced: every run reads the unpatched greedy output, the prompt in one piece and then token by token through its
cache. Greedy decoding leaves the unpatched output at the first token that another run does not rank first, so the first
differing token is read off the same pass; only then an answer of its own is generated.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from infer_patch.errors import PatchError
from infer_patch.evals import haystack
from infer_patch.evals.cost import quantile
from infer_patch.evals.drift import distances
from infer_patch.evals.eval_schema import EvalRow
from infer_patch.evals.generation import BatchTrace, Trace, generate
from infer_patch.evals.loading import open_images
from infer_patch.evals.needle import check_context, check_distinct, from_random_paragraph, read_texts
from infer_patch.evals.pope_scenes import PopeScenes
from infer_patch.evals.prompts import Prompt, tokens_from
from infer_patch.evals.task import Batch, Item, Scored, Task


@dataclass(frozen=True)
class Drift(Task):
    """KL divergence, top-1 agreement and the first differing token against the unpatched model.

    Prompts are yours (`texts`, `images`), or else, for every length, `samples` texts to go on with and as many with a
    number hidden in the middle that is asked for; for models with pictures, `samples` drawn scenes with two questions
    each.

    Parameters
    ----------
    texts : tuple of str
        Prompts, one item each.
    images : tuple of path
        Pictures in front of every one of them.
    lengths : tuple of int
        Tokens of generated prompts.
    samples : int
        Prompts of a kind and length.
    text_folder : path, optional
        Its .txt files instead of generated prose.
    max_new_tokens : int
        Tokens of the unpatched output that are compared.
    """

    name: ClassVar[str] = "drift"
    title: ClassVar[str] = "Drift from the unpatched model"
    headline: ClassVar[str] = "top1"
    tolerance: ClassVar[float] = 0.1
    other_backend: ClassVar[bool] = True
    answers_prompts: ClassVar[bool] = False  # the output is forced token by token through the cache already
    texts: tuple[str, ...] = ()
    images: tuple[Path, ...] = ()
    lengths: tuple[int, ...] = (1000, 3000)
    samples: int = 4
    text_folder: Path | None = None
    seed: int = 0
    max_new_tokens: int = 32
    chat: bool | None = None

    def __post_init__(self) -> None:
        if self.samples < 1 or self.max_new_tokens < 1:
            raise PatchError(
                f"samples and max_new_tokens must be 1 or more, got {self.samples} and {self.max_new_tokens}."
            )
        if self.images and not self.texts:
            raise PatchError("pictures were given without a prompt; give one with --prompt.")
        check_distinct("lengths", self.lengths)

    def items(self, processor: Any, model: Any) -> list[Item]:
        if self.texts:
            return self._given()
        if hasattr(processor, "image_processor"):
            return self._scenes(processor, model)
        check_context(model, max(self.lengths) + self.max_new_tokens, f"max_new_tokens={self.max_new_tokens} included")
        text = None if self.text_folder is None else read_texts(self.text_folder)
        kinds = (self._continuation, self._question)
        return [
            make(processor, text, length, number)
            for length in self.lengths
            for make in kinds
            for number in range(self.samples)
        ]

    def reference(self, model: Any, batch: Batch) -> Trace:
        """The unpatched greedy output with its logits."""
        if len(batch.inputs) != 1:
            raise PatchError(f"drift is measured prompt by prompt: give batch_size=1, got {len(batch.inputs)}.")
        return generate(model, batch.inputs[0], batch.max_new_tokens)

    def answer(self, model: Any, batch: Batch) -> BatchTrace:
        reference: Trace = batch.reference
        forced = generate(model, batch.inputs[0], batch.max_new_tokens, reference.ids)
        found = distances(reference.recorded(), forced.recorded())
        agreed = next((i for i, same in enumerate(found.top1) if not same), len(found.top1))
        ids = reference.ids
        if agreed < len(ids):
            ids = generate(model, batch.inputs[0], batch.max_new_tokens, keep_logits=False).ids
        score = {
            "top1": fmean(found.top1),
            "kl": fmean(found.kl),
            "kl_by_token": [float(f"{x:.4g}") for x in found.kl],
            "max_logit_gap": max(found.gap),
            "agreed_tokens": agreed,
            "same_output": ids == reference.ids,
        }
        return BatchTrace([ids], forced.first_token_s, forced.per_token_s, forced.cache_bytes, [score])

    def score(self, item: Item, output: str) -> dict[str, Any]:
        """Whether the answer is right, where there is one; the rest is measured in `answer`."""
        return {"correct": None if item.reference is None else haystack.score(output, item.reference)}

    def value(self, score: Mapping[str, Any]) -> float:
        return float(score["top1"])

    def right(self, score: Mapping[str, Any]) -> bool | None:
        return score["correct"]

    def metrics(self, rows: Sequence[Scored]) -> dict[str, float]:
        """Means over prompts; `kl_p99` is over all tokens. KL is KL(unpatched || this run) in nats per token."""
        scores = [row["score"] for row in rows]
        found = {name: fmean(score[name] for score in scores) for name in ("top1", "kl")}
        found["kl_p99"] = quantile([kl for score in scores for kl in score["kl_by_token"]], 0.99)
        found |= {name: fmean(score[name] for score in scores) for name in ("agreed_tokens", "same_output")}
        found["max_logit_gap"] = max(score["max_logit_gap"] for score in scores)
        answered = [score["correct"] for score in scores if score["correct"] is not None]
        if answered:
            found["answers_right"] = fmean(answered)
        for kind in dict.fromkeys(row["facts"]["kind"] for row in rows):
            of_kind = [row["score"] for row in rows if row["facts"]["kind"] == kind]
            found |= {f"{kind}/{name}": fmean(score[name] for score in of_kind) for name in ("top1", "kl")}
        return found

    def quality(self, row: EvalRow, unpatched: EvalRow) -> str:
        found, flips = row["metrics"], row["paired"]
        if found["max_logit_gap"] == 0:
            return "the same logits to the last bit"
        outputs = round(found["same_output"] * row["items"])
        words = [
            f"the same token ranks first in {found['top1']:.1%}",
            f"KL {found['kl']:.2g} nats per token, {found['kl_p99']:.2g} at the 99th percentile",
            f"{outputs} of {row['items']} outputs are the unpatched ones",
        ]
        if flips is not None and flips["p_value"] is not None:
            words.append(f"answers: {flips['lost']} lost, {flips['won']} won, p = {flips['p_value']:.2g}")
        text = ", ".join(words)
        if row["status"] == "worse":
            text = f"WORSE than unpatched: {text} (top-1 agreement below {1 - self.tolerance:.0%}, or answers lost)"
        return text

    def _given(self) -> list[Item]:
        pictures = open_images(self.images)
        facts = {"kind": "prompt"}
        return [
            Item(f"prompt {i}", Prompt(text, f"prompt {i}", pictures), None, facts=facts)
            for i, text in enumerate(self.texts, 1)
        ]

    def _scenes(self, processor: Any, model: Any) -> list[Item]:
        """Of every scene the first question with answer yes, and the first with no."""
        items = PopeScenes(scenes=self.samples, seed=self.seed).items(processor, model)
        chosen = {(item.group, item.reference): item for item in reversed(items)}
        return [
            Item(item.name, item.prompt, item.reference, item.group, {"kind": f"answer {item.reference}"})
            for item in items
            if chosen[item.group, item.reference] is item
        ]

    def _continuation(self, tokenizer: Any, text: str | None, length: int, number: int) -> Item:
        name, rng = f"continuation, {length} tokens, {number}", self._rng(f"continuation {length} {number}")
        own = None if text is None else from_random_paragraph(text, rng)
        prose = haystack.build_haystack(tokenizer, length, rng.getrandbits(48), own)
        ids = tokenizer(prose, add_special_tokens=True, verbose=False).input_ids[:length]
        prompt = Prompt(prose, name, input_ids=tuple(ids))
        return Item(name, prompt, None, facts={"kind": "continuation", "length": length})

    def _question(self, tokenizer: Any, text: str | None, length: int, number: int) -> Item:
        name, rng = f"question, {length} tokens, {number}", self._rng(f"question {length} {number}")
        own = None if text is None else from_random_paragraph(text, rng)
        chat = bool(tokenizer.chat_template)
        found = haystack.needle_prompt(tokenizer, length, 0.5, rng.getrandbits(48), chat, False, own)
        asked = tokens_from(tokenizer, found.text, found.needle.question)
        prompt = Prompt(found.text, name, answer=found.answer, input_ids=tuple(found.input_ids), question_tokens=asked)
        return Item(name, prompt, found.answer, facts={"kind": "question", "length": length})

    def _rng(self, what: str) -> random.Random:
        return random.Random(f"drift {self.seed} {what}")
