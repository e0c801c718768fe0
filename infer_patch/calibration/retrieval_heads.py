"""`infer-patch calibrate retrieval-heads`: a score for every head of one model, test by test.

Each test hides a number in a long text, lets the model answer greedily, and records for every generated token which
key each head attends to most. Tests that the model fails say nothing about its heads and are not counted.
"""

from __future__ import annotations

import dataclasses
import json
import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infer_patch.api import patch
from infer_patch.artifacts import fingerprint
from infer_patch.attention import PORT
from infer_patch.availability import installed_version
from infer_patch.calibration.retrieval_scores import copy_scores, find_span, most_attended, recall_of_words
from infer_patch.calibration.work_folder import claim
from infer_patch.errors import PatchError
from infer_patch.evals import haystack
from infer_patch.evals.generation import generate
from infer_patch.evals.needle import check_context, check_distinct, from_random_paragraph, read_texts
from infer_patch.families import describe
from infer_patch.files import replace_file
from infer_patch.head_scores import HeadScores
from infer_patch.method import Method, Runtime
from infer_patch.progress import Progress

PASSED = 0.5  # recall above which an answer counts as right
RETRIEVES = 0.1  # mean score from which the paper calls a head a retrieval head


@dataclass(frozen=True)
class Settings:
    """Which tests to run: one for each length, depth and repeat.

    Parameters
    ----------
    lengths : tuple of int
        Tokens of the prompts. The paper took 20 from 1,000 to 50,000; rankings are stable with up to 5,000.
    depths : tuple of float
        Share of the text before the needle; the paper took 10.
    repeats : int
        Tests per length and depth, each with its own text and number.
    unique : bool
        Score as the paper defines it, at most 1; otherwise as its code counts (see `copy_scores`).
    answer_tokens : int
        The most an answer may take; what follows a line break is not counted.
    text_folder : path, optional
        Its .txt files make the texts; generated prose otherwise.
    seed : int
        Draws texts, keys and numbers.
    """

    lengths: tuple[int, ...] = (1000, 2000, 3000, 4000, 5000)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    repeats: int = 4
    unique: bool = False
    answer_tokens: int = 50
    text_folder: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lengths", "depths"):
            check_distinct(name, getattr(self, name))
        if min(self.lengths) < 100 or not all(0 <= depth <= 1 for depth in self.depths):
            raise PatchError(
                f"lengths are 100 tokens or more and depths shares from 0 to 1, got {list(self.lengths)} and "
                f"{list(self.depths)}."
            )
        if min(self.repeats, self.answer_tokens) < 1:
            raise PatchError(
                f"repeats and answer tokens must be 1 or more, got {self.repeats} and {self.answer_tokens}."
            )

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self) | {"lengths": list(self.lengths), "depths": list(self.depths)}
        del values["text_folder"]
        return values


def calibrate(
    model: Any,
    tokenizer: Any,
    settings: Settings,
    work: str | Path,
    model_id: str = "",
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Score every head of one model.

    Parameters
    ----------
    model : PreTrainedModel
        Not patched.
    tokenizer : PreTrainedTokenizer or processor
    work : path
        Folder for the tests that are done, a JSON line each; called again with it, none is run twice, and more lengths,
        depths or repeats add to what is there.
    on_progress : callable
        Told (tests done, tests in all, what comes next).

    Returns
    -------
    dict
        The contents of a score file: the layout of `HeadScores`, with where it came from.

    Raises
    ------
    PatchError
        Before any work: a patched model, prompts longer than its context, a folder made for something else. After it:
        when the model passed no test.
    """
    tokenizer, folder, parts = getattr(tokenizer, "tokenizer", tokenizer), Path(work), describe(model)
    if any(PORT in vars(attention) for attention in parts.attentions):
        raise PatchError("this model is patched; call infer_patch.unpatch(model) before its heads are scored.")
    check_context(model, max(settings.lengths) + settings.answer_tokens, "answer included")
    text = None if settings.text_folder is None else read_texts(settings.text_folder)
    made_for = {name: getattr(settings, name) for name in ("seed", "unique", "answer_tokens")}
    claim(folder, model, {**made_for, "texts": settings.text_folder and str(settings.text_folder)})
    grid = [(n, depth, i) for n in settings.lengths for depth in settings.depths for i in range(settings.repeats)]
    names = [f"{n} tokens, {100 * depth:g} %, {i}" for n, depth, i in grid]
    done = _read(folder / "tests.jsonl")
    missing = [(name, place) for name, place in zip(names, grid) if name not in done]
    for number, (name, place) in enumerate(missing):
        if on_progress is not None:
            on_progress(len(grid) - len(missing) + number, len(grid), name)
        done[name] = _test(model, tokenizer, name, place, settings, text)
        with (folder / "tests.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(done[name]) + "\n")
    if on_progress is not None:
        on_progress(len(grid), len(grid), "done")
    return _document(model, parts, settings, [done[name] for name in names], model_id)


def _test(
    model: Any, tokenizer: Any, name: str, place: tuple[int, float, int], settings: Settings, text: str | None
) -> dict[str, Any]:
    """One test; `scores` holds the heads that copied something, for answers that pass."""
    length, depth, repeat = place
    rng = random.Random(f"retrieval heads {settings.seed} {length} {depth} {repeat}")
    own = None if text is None else from_random_paragraph(text, rng)
    chat = bool(tokenizer.chat_template)
    prompt = haystack.needle_prompt(tokenizer, length, depth, rng.getrandbits(48), chat, True, own)
    most, produced = answer_with_attention(model, prompt.input_ids, settings.answer_tokens)
    produced = until_line_break(tokenizer, produced)
    output = str(tokenizer.decode(produced, skip_special_tokens=True))
    recall = recall_of_words(output, prompt.answer)
    span = needle_span(tokenizer, prompt.input_ids, prompt.answer)
    passed = recall > PASSED and span is not None
    found: dict[str, float] = {}
    if passed and span is not None:
        scores = copy_scores(most[: len(produced)], produced, prompt.input_ids, span, settings.unique)
        found = {f"{i}-{h}": round(float(scores[i, h]), 5) for i, h in scores.nonzero().tolist()}
    return {
        "test": name,
        "tokens": prompt.n_tokens,
        "span": span,
        "answer": prompt.answer,
        "output": output,
        "recall": recall,
        "passed": passed,
        "scores": found,
    }


def needle_span(tokenizer: Any, prompt_ids: list[int], answer: str) -> tuple[int, int] | None:
    """Where the answer stands in the prompt, as it is written after a space or without one."""
    for written in (" " + answer, answer):
        ids = tokenizer(written, add_special_tokens=False, verbose=False).input_ids
        if (span := find_span(prompt_ids, ids)) is not None:
            return span
    return None


def until_line_break(tokenizer: Any, produced: list[int]) -> list[int]:
    """The tokens up to and with the first that holds a line break."""
    end = next((i for i, token in enumerate(produced) if "\n" in tokenizer.decode([token])), len(produced))
    return produced[: end + 1]


def answer_with_attention(model: Any, prompt_ids: list[int], max_new_tokens: int) -> tuple[Tensor, list[int]]:
    """Generate greedily; also the key that each head attended to most at every step, int64 [steps, L, H]."""
    inputs = {"input_ids": torch.tensor([prompt_ids], device=model.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    seen: list[Tensor] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*never took effect", UserWarning)  # it only looks
        with patch(model, _Watching(seen=seen)):
            trace = generate(model, inputs, max_new_tokens, keep_logits=False)
    layers = describe(model).num_layers
    return torch.stack(seen).unflatten(0, (-1, layers)).cpu(), trace.ids


@dataclass(frozen=True, kw_only=True)
class _Watching(Method):
    """Notes what every head attends to most, and changes nothing. In no registry: it exists for one generation."""

    seen: list[Tensor]

    name = "most attended"
    ports = ("calibrate",)

    def runtime(self, parts: Any, layers: tuple[int, ...]) -> Runtime:
        return _Watcher(self, parts, layers)


class _Watcher(Runtime):
    config: _Watching
    any_mask = True

    def calibrate(self, layer: int, call: Any, output: Tensor) -> Tensor:
        best = most_attended(call.q, call.k, self.parts.windows[layer])[0]
        self.config.seen.append(call.positions[0].to(best.device)[best])
        return output


def _document(model: Any, parts: Any, settings: Settings, tests: list[dict[str, Any]], model_id: str) -> dict[str, Any]:
    passed = [test for test in tests if test["passed"]]
    if not passed:
        raise PatchError(
            f"the model passed none of {len(tests)} tests, so there is nothing to score its heads by. Take shorter "
            "prompts, or a model that finds a number in a text."
        )
    heads = [(i, h) for i in range(parts.num_layers) for h in range(parts.num_heads)]
    scores = HeadScores(
        {head: tuple(test["scores"].get("{}-{}".format(*head), 0.0) for test in passed) for head in heads}
    )
    facts = {key: value for key, value in fingerprint(model).items() if key != "weights"}
    return {
        **scores.to_dict(),
        "tests": {"run": len(tests), "passed": len(passed)},
        "model": {"id": model_id, **facts},
        "settings": settings.to_dict(),
        "made_with": {name: installed_version(name) for name in ("infer_patch", "torch", "transformers")},
    }


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """Tests that are done, by name; a last line that was cut off is left out, in the file too."""
    if not file.exists():
        return {}
    found: dict[str, dict[str, Any]] = {}
    kept = []
    for line in file.read_text("utf-8").splitlines():
        try:
            test = json.loads(line)
        except ValueError:
            continue
        found[test["test"]] = test
        kept.append(line + "\n")
    replace_file(file, "".join(kept).encode())
    return found


def retrieval_heads(scores: HeadScores) -> list[str]:
    """The heads that the paper calls retrieval heads, the best first."""
    return [f"{i}-{h}" for i, h in scores.ranked() if scores.mean((i, h)) >= RETRIEVES]
