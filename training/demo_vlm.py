"""Train a vision-language model like the shipped `demo-vlm`, from nothing, on drawn scenes. See README.md beside this.

Stage A: the vision tower, from labels per patch. Stage B: projector in closed form, then projector and language model
on many questions per picture, with attention guided to the patches that a question names.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from infer_patch.demo_vlm import demo_vlm_path
from infer_patch.evals.scenes import COLORS, PATCH, SHAPES, SIZE, PatchLabels, Scene, Thing, make_scene

GRID = SIZE // PATCH
PATCHES = GRID * GRID
NAMES = [(shape, color) for shape in range(len(SHAPES)) for color in range(len(COLORS))]
TEXT_ROOM = 264  # question tokens behind one prefix
GUIDED_LAYERS, GUIDED_HEADS = (2, 4), 4

FIRST_MIX = dict(pair=5, shape_there=2, color_there=2, color=3, shape=2.5, count=1, side=1, cell=1, caption=0.5)
MIX = dict(pair=4, shape_there=2, color_there=1, color=1, shape=1, count=3, side=3.5, cell=6, caption=1.2)
MIX_OF_TWO = dict(pair=5, shape_there=2, which=3, color=1, count=1, cell=1.5)


@dataclass
class Picture:
    """A scene with what training needs of it: pixels uint8 (3, 128, 128), and labels per patch, flattened."""

    scene: Scene
    pixels: Tensor
    labels: PatchLabels

    @property
    def things(self) -> tuple[Thing, ...]:
        return self.scene.things


@dataclass(frozen=True)
class Named:
    """What a question speaks of: objects of this shape and this colour (None: any), in one picture (None: all)."""

    shape: str | None = None
    color: str | None = None
    picture: int | None = None

    def fits(self, thing: Thing) -> bool:
        return self.shape in (None, thing.shape) and self.color in (None, thing.color)

    @property
    def words(self) -> str:
        return " ".join(part for part in (self.color, self.shape or "object") if part)

    def count(self, pictures: Sequence[Picture]) -> int:
        chosen = pictures if self.picture is None else [pictures[self.picture]]
        return sum(self.fits(thing) for picture in chosen for thing in picture.things)


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str
    named: Named | None = None


@dataclass
class Run:
    """Settings, random numbers, and what is written into training.json."""

    seed: int
    device: torch.device
    dtype: torch.dtype
    say: Callable[[str], None]
    rng: random.Random = field(init=False)
    log: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        torch.manual_seed(self.seed)


# ----------------------------------------------------------------------------------------------------------- pictures


def render(seed_and_layout: tuple[int, str]) -> tuple[Scene, np.ndarray, PatchLabels]:
    scene = make_scene(*seed_and_layout)
    return scene, scene.pixels(), scene.labels()


def render_pictures(count: int, seed: int, workers: int = 1) -> list[Picture]:
    """Scenes of all layouts (70 % free, 17 % 4x4, 13 % 2x2); seeds start at 1 000 000 x (`seed` + 1)."""
    rng = random.Random(seed)
    layouts = rng.choices(["free", "mosaic4", "mosaic2"], [70, 17, 13], k=count)
    jobs = [((seed + 1) * 1_000_000 + index, layout) for index, layout in enumerate(layouts)]
    if workers > 1:
        with get_context("spawn").Pool(workers) as pool:
            drawn = pool.map(render, jobs, chunksize=64)
    else:
        drawn = [render(job) for job in jobs]
    return [Picture(scene, torch.from_numpy(pixels).permute(2, 0, 1), labels) for scene, pixels, labels in drawn]


def pixel_batch(pictures: Sequence[Picture], run: Run) -> Tensor:
    """As the image processor gives them: (B, 3, 128, 128) in -1 to 1."""
    pixels = torch.stack([picture.pixels for picture in pictures]).to(run.device)
    return (pixels.float() / 127.5 - 1).to(run.dtype)


def label_batch(pictures: Sequence[Picture], name: str, run: Run) -> Tensor:
    """(B, 256) of one field of the labels; -1 is background."""
    return torch.from_numpy(np.stack([getattr(picture.labels, name).ravel() for picture in pictures])).to(run.device)


# ---------------------------------------------------------------------------------------------------------- questions


def article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(words: str) -> str:
    return words + ("es" if words.endswith("cross") else "s")


def ask(kind: str, pictures: Sequence[Picture], rng: random.Random) -> Question | None:
    """One question of a kind about one picture, or about two; None where the pictures do not allow it."""
    two = len(pictures) == 2
    at = rng.randrange(2) if two else None
    picture = pictures[at or 0]
    where = f" in the {('first', 'second')[at]} image" if at is not None else ""
    if kind == "which":
        return _ask_which(pictures, rng)
    if kind in ("pair", "shape_there", "color_there"):
        return _ask_presence(kind, pictures, at, where or " in the image", rng)
    if kind in ("color", "shape"):
        values = [getattr(thing, "shape" if kind == "color" else "color") for thing in picture.things]
        once = [index for index, value in enumerate(values) if values.count(value) == 1]
        if not once:
            return None
        thing = picture.things[rng.choice(once)]
        if kind == "color":
            text = f"what color is the {thing.shape}{where} ?"
            return Question(kind, text, thing.color, Named(shape=thing.shape, picture=at))
        return Question(
            kind, f"what shape is the {thing.color} object{where} ?", thing.shape, Named(color=thing.color, picture=at)
        )
    if kind == "count":
        return _ask_count(pictures, at, where or " in the image", rng)
    if kind == "side":
        return _ask_side(picture, rng)
    if kind == "cell":
        return _ask_cell(picture, at, where, rng)
    return _caption(picture)


def _ask_presence(
    kind: str, pictures: Sequence[Picture], at: int | None, where: str, rng: random.Random
) -> Question | None:
    """Yes or no first, then a name; two thirds of the absent pairs are near misses."""
    things = pictures[at or 0].things
    if kind == "pair":
        all_names = [Named(SHAPES[shape], COLORS[color], at) for shape, color in NAMES]
    elif kind == "shape_there":
        all_names = [Named(shape=shape, picture=at) for shape in SHAPES]
    else:
        all_names = [Named(color=color, picture=at) for color in COLORS]
    answer = rng.choice(("yes", "no"))
    fitting = [named for named in all_names if any(map(named.fits, things)) == (answer == "yes")]
    if answer == "no" and at is not None and rng.random() < 0.5:
        there = pictures[1 - at].things
        fitting = [named for named in fitting if any(map(named.fits, there))] or fitting
    elif answer == "no" and kind == "pair":
        part = rng.choice(("shape", "color", None))
        if part is not None:
            values = {getattr(thing, part) for thing in things}
            fitting = [named for named in fitting if getattr(named, part) in values] or fitting
    if not fitting:
        return None
    named = rng.choice(fitting)
    return Question(kind, f"is there {article(named.words)}{where} ?", answer, named)


def _ask_which(pictures: Sequence[Picture], rng: random.Random) -> Question | None:
    at = rng.randrange(2)
    other = pictures[1 - at].scene.names
    only = [thing for thing in pictures[at].things if thing.name not in other]
    if not only:
        return None
    thing = rng.choice(only)
    named = Named(thing.shape, thing.color, at)
    return Question("which", f"which image has the {thing.name} ?", ("first", "second")[at], named)


def _ask_count(pictures: Sequence[Picture], at: int | None, where: str, rng: random.Random) -> Question:
    """Flat over the counts that occur, zero included."""
    choices = [Named(shape=shape, picture=at) for shape in SHAPES]
    choices += [Named(color=color, picture=at) for color in COLORS] + [Named(picture=at)]
    by_count: dict[int, list[Named]] = {}
    for named in choices:
        by_count.setdefault(named.count(pictures), []).append(named)
    count = rng.choice([value for value in sorted(by_count) if value < 10] or [0])
    named = rng.choice(by_count.get(count, choices))
    return Question("count", f"how many {plural(named.words)} are{where} ?", str(count), named)


def _ask_side(picture: Picture, rng: random.Random) -> Question | None:
    axis, low, high = rng.choice((("x", "left", "right"), ("y", "top", "bottom")))
    clear = [thing for thing in _unique(picture) if abs(getattr(thing, axis) - SIZE / 2) > 6]
    if not clear:
        return None
    thing = rng.choice(clear)
    answer = low if getattr(thing, axis) < SIZE / 2 else high
    text = (
        f"is the {thing.name} on the {low} or right ?" if axis == "x" else f"is the {thing.name} on the top or bottom ?"
    )
    return Question("side", text, answer, Named(thing.shape, thing.color))


def _ask_cell(picture: Picture, at: int | None, where: str, rng: random.Random) -> Question | None:
    side = 64 if picture.scene.layout == "mosaic2" else 32
    if rng.random() < 0.1:
        absent = [(s, c) for s, c in NAMES if f"{COLORS[c]} {SHAPES[s]}" not in picture.scene.names]
        shape, color = rng.choice(absent)
        named = Named(SHAPES[shape], COLORS[color], at)
        return Question("cell", f"which row and column has the {named.words}{where} ?", "none")
    inside = [
        t for t in _unique(picture) if min(*(v % side for v in (t.x, t.y)), *(-v % side for v in (t.x, t.y))) >= 2.5
    ]
    if not inside:
        return None
    thing = rng.choice(inside)
    answer = f"row {int(thing.y // side) + 1} column {int(thing.x // side) + 1}"
    text = f"which row and column has the {thing.name}{where} ?"
    return Question("cell", text, answer, Named(thing.shape, thing.color, at))


def _unique(picture: Picture) -> list[Thing]:
    counts = Counter(thing.name for thing in picture.things)
    return [thing for thing in picture.things if counts[thing.name] == 1]


def _caption(picture: Picture) -> Question | None:
    """All objects by bands of 32 px, then left to right."""
    if not picture.things:
        return None
    names = [article(thing.name) for thing in sorted(picture.things, key=lambda thing: (thing.y // 32, thing.x))]
    listed = " and ".join([*([" , ".join(names[:-1])] if names[:-1] else []), names[-1]])
    return Question("caption", "describe the image .", f"{listed} .")


# ------------------------------------------------------------------------------------------------------------ packing


@dataclass
class Pack:
    """Prompts of B rows, each with one prefix and many questions behind it. L is the length with all patches.

    ids, segments, positions (B, L): segment 0 is the prefix, -1 padding. answers (B, L): whether the token is part of
    an answer or its end. kinds: per row and segment. pointers: row, position and named object of guided tokens.
    """

    ids: Tensor
    segments: Tensor
    positions: Tensor
    answers: Tensor
    kinds: list[list[str]]
    pointers: list[tuple[int, int, Named]]


def pack(views: Sequence[Sequence[Picture]], mix: dict[str, float], tokenizer: Any, run: Run, room: int) -> Pack:
    """As many whole questions as fit in `room` tokens behind the picture or pictures of each row."""
    n_images = len(views[0])
    image, assistant = (tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "assistant:"))
    place_words = set(tokenizer.convert_tokens_to_ids(["row", "column"]))
    prefix = [tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("user:")] + [image] * (PATCHES * n_images)
    start, length = len(prefix), len(prefix) + room
    shape = (len(views), length)
    ids = torch.full(shape, tokenizer.pad_token_id)
    segments, positions, answers = (
        torch.full(shape, -1),
        torch.zeros(shape, dtype=torch.long),
        torch.zeros(shape).bool(),
    )
    ids[:, :start], segments[:, :start], positions[:, :start] = torch.tensor(prefix), 0, torch.arange(start)
    kinds: list[list[str]] = []
    pointers = []
    for row, pictures in enumerate(views):
        at, row_kinds, misses = start, ["prefix"], 0
        while misses < 3:
            question = ask(run.rng.choices(list(mix), list(mix.values()))[0], pictures, run.rng)
            if question is None:
                continue
            asked = _encode(tokenizer, question.text)
            replied = [*_encode(tokenizer, question.answer), tokenizer.eos_token_id]
            tokens = [*asked, assistant, *replied]
            end = at + len(tokens)
            if end > length:
                misses += 1
                continue
            ids[row, at:end], segments[row, at:end] = torch.tensor(tokens), len(row_kinds)
            positions[row, at:end] = torch.arange(start, start + len(tokens))
            answers[row, at + len(asked) + 1 : end] = True
            if question.named is not None and question.named.count(pictures):
                guided = [index for index, token in enumerate(tokens) if token in place_words and index > len(asked)]
                pointers += [(row, at + index, question.named) for index in (len(asked), *guided)]
            row_kinds.append(question.kind)
            at = end
        kinds.append(row_kinds)
    return Pack(ids, segments, positions, answers, kinds, pointers)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def visible(segments: Tensor) -> Tensor:
    """Boolean attention mask (B, 1, L, L): a token sees the prefix and its own segment, up to itself."""
    query, key = segments[:, :, None], segments[:, None, :]
    order = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    return (((key == 0) | (key == query)) & order)[:, None]


# -------------------------------------------------------------------------------------------------------------- model


def build(run: Run) -> tuple[LlavaForConditionalGeneration, Any]:
    """A model of the shipped architecture with random weights, in float32, and the shipped processor."""
    config = AutoConfig.from_pretrained(demo_vlm_path(), local_files_only=True)
    config.dtype = torch.float32
    model = LlavaForConditionalGeneration(config).float().to(run.device)
    return model, AutoProcessor.from_pretrained(demo_vlm_path(), local_files_only=True)


def tower_of(model: Any) -> Any:
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


def features(model: Any, pixels: Tensor) -> Tensor:
    """Output of the last block but one, (B, 257, 192): what the projector reads, with CLS in front."""
    tower = tower_of(model)
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, None)
    return hidden


class Trainer:
    """AdamW on float32 masters of the weights, with warm-up and a cosine over time, for `seconds`."""

    def __init__(self, modules: Sequence[nn.Module], rate: float, seconds: float, warmup: int, run: Run) -> None:
        self.weights = [weight for module in modules for weight in module.parameters()]
        self.masters = [weight.detach().float().clone().requires_grad_() for weight in self.weights]
        for module in modules:
            module.to(run.dtype)
        groups = [
            {"params": [m for m in self.masters if m.ndim > 1], "weight_decay": 0.05},
            {"params": [m for m in self.masters if m.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
        self.rate, self.seconds, self.warmup, self.start, self.step_count = rate, seconds, warmup, time.monotonic(), 0

    @property
    def share(self) -> float:
        """Of the time gone."""
        return (time.monotonic() - self.start) / max(self.seconds, 1e-9)

    def steps(self) -> Iterator[float]:
        """The share of time gone at each step; at least one step."""
        while self.step_count == 0 or self.share < 1:
            yield min(self.share, 1.0)

    def step(self, loss: Tensor) -> None:
        loss.backward()
        for master, weight in zip(self.masters, self.weights):
            master.grad = torch.zeros_like(master) if weight.grad is None else weight.grad.float()
            weight.grad = None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.step_count += 1
        fall = 0.005 + 0.995 * 0.5 * (1 + math.cos(math.pi * min(self.share, 1)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1, self.step_count / self.warmup) * fall
        self.optimizer.step()
        with torch.no_grad():
            for master, weight in zip(self.masters, self.weights):
                weight.copy_(master)


# ------------------------------------------------------------------------------------------------------------ stage A


def start_positions(model: Any) -> None:
    """Position table: 2-D sines and cosines times 0.2; CLS at 0."""
    table = tower_of(model).embeddings.position_embedding.weight
    quarter = table.shape[1] // 4
    angles = torch.arange(GRID)[:, None] / 100 ** (torch.arange(quarter) / quarter)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = waves.repeat_interleave(GRID, 0), waves.repeat(GRID, 1)
    with torch.no_grad():
        table.zero_()
        table[1:] = 0.2 * torch.cat([rows, columns], dim=1).to(table)


def train_vision(model: Any, pictures: Sequence[Picture], seconds: float, run: Run, batch: int = 16) -> None:
    """Stage A: labels per patch, and the names in the picture from CLS, through heads that are thrown away."""
    start_positions(model)
    tower = tower_of(model)
    width = tower.post_layernorm.weight.numel()
    n_shapes, n_colors = len(SHAPES), len(COLORS)
    patch_head = nn.Linear(width, n_shapes + 1 + n_colors + 1 + 1).to(run.device)
    name_head, last_head = (nn.Linear(width, len(NAMES) + n_shapes + n_colors).to(run.device) for _ in range(2))
    trainer = Trainer([tower, patch_head, name_head, last_head], 1e-3, seconds, 150, run)
    tower.train()
    weights = torch.ones(n_shapes + 1, device=run.device)
    weights[-1] = 0.15  # background, the last class
    color_weights = weights[-n_colors - 1 :]
    reported = 0.0
    for share in trainer.steps():
        chosen = [pictures[run.rng.randrange(len(pictures))] for _ in range(batch)]
        hidden = features(model, pixel_batch(chosen, run))
        shape, color, center = (label_batch(chosen, name, run) for name in ("shape", "color", "center"))
        logits = patch_head(hidden[:, 1:]).float()
        shape_logits, color_logits, center_logits = logits.split([n_shapes + 1, n_colors + 1, 1], dim=2)
        loss = F.cross_entropy(shape_logits.flatten(0, 1), (shape % (n_shapes + 1)).flatten(), weights)
        loss = loss + F.cross_entropy(color_logits.flatten(0, 1), (color % (n_colors + 1)).flatten(), color_weights)
        five = torch.tensor(5.0, device=run.device)
        loss = loss + F.binary_cross_entropy_with_logits(center_logits[..., 0], center.float(), pos_weight=five)
        names = name_targets(chosen, run)
        loss = loss + 5 * F.binary_cross_entropy_with_logits(name_head(hidden[:, 0]).float(), names)
        if trainer.step_count % 4 == 0:
            last = tower.encoder.layers[-1](hidden.detach(), None)
            pooled = tower.post_layernorm(last[:, 0])
            loss = loss + 5 * F.binary_cross_entropy_with_logits(last_head(pooled).float(), names)
        trainer.step(loss)
        if share >= reported:
            there = shape >= 0
            accuracy = (shape_logits.argmax(2) == shape)[there].float().mean().item()
            run.say(f"vision {share:4.0%} step {trainer.step_count} loss {loss.item():.2f} patch shape {accuracy:.2f}")
            run.log["patch_shape_accuracy"] = round(accuracy, 3)
            reported = share + 0.05
    run.log["vision_steps"] = trainer.step_count
    tower.eval().requires_grad_(False)


def name_targets(pictures: Sequence[Picture], run: Run) -> Tensor:
    """(B, 116): pairs, shapes, colours that occur."""
    n_shapes, n_colors = len(SHAPES), len(COLORS)
    targets = torch.zeros(len(pictures), len(NAMES) + n_shapes + n_colors, device=run.device)
    for row, picture in enumerate(pictures):
        for thing in picture.things:
            shape, color = SHAPES.index(thing.shape), COLORS.index(thing.color)
            targets[row, [shape * n_colors + color, len(NAMES) + shape, len(NAMES) + n_shapes + color]] = 1
    return targets


# ------------------------------------------------------------------------------------------------------------ stage B


@torch.no_grad()
def start_language(model: Any) -> None:
    """Start values of the language model: heads begin as matchers of content that copy what they match."""
    language, text = model.model.language_model, model.config.text_config
    size, group = text.head_dim, text.num_attention_heads // text.num_key_value_heads
    language.embed_tokens.weight.normal_(0, 0.3)
    model.lm_head.weight.copy_(0.1 * language.embed_tokens.weight)
    for layer in language.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            linear.weight.normal_(0, 0.9 / math.sqrt(linear.in_features))
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight.normal_(0, 1 / math.sqrt(16 * linear.in_features))
        for kv in range(text.num_key_value_heads):
            key, value = (p.weight[kv * size : (kv + 1) * size] for p in (attention.k_proj, attention.v_proj))
            query = slice(kv * group * size, (kv * group + 1) * size)
            noise = torch.randn_like(key) * 0.3 / math.sqrt(key.shape[1])
            attention.q_proj.weight[query] = 1.3 * key + noise
            attention.o_proj.weight[:, query] += 0.25 * value.T


@torch.no_grad()
def start_projector(model: Any, pictures: Sequence[Picture], tokenizer: Any, run: Run) -> None:
    """Projector in closed form: ridge regression to shape, colour, row, column and centre, mapped to word vectors."""
    n_shapes, n_colors = len(SHAPES), len(COLORS)
    width = model.config.vision_config.hidden_size + 1
    eye = torch.eye(GRID, device=run.device)
    place = torch.cat([eye.repeat_interleave(GRID, 0), eye.repeat(GRID, 1)], dim=1)
    left = torch.eye(width, dtype=torch.float64, device=run.device)
    right = torch.zeros(width, n_shapes + n_colors + 2 * GRID + 1, dtype=torch.float64, device=run.device)
    for begin in range(0, len(pictures), 16):
        part = pictures[begin : begin + 16]
        inputs = features(model, pixel_batch(part, run))[:, 1:].double()
        inputs = F.pad(inputs, (0, 1), value=1.0).flatten(0, 1)
        shape, color = label_batch(part, "shape", run), label_batch(part, "color", run)
        one_hot = [F.one_hot(shape + 1, n_shapes + 1)[..., 1:], F.one_hot(color + 1, n_colors + 1)[..., 1:]]
        center = label_batch(part, "center", run)[..., None]
        targets = torch.cat([*one_hot, place.expand(len(part), -1, -1), center], dim=2).double().flatten(0, 1)
        weight = torch.where(shape >= 0, 1.0, 0.15).double().flatten()[:, None]
        left += inputs.T @ (weight * inputs)
        right += inputs.T @ (weight * targets)
    solution = torch.linalg.solve(left, right).float().T  # (53, 193)
    embeddings = model.model.language_model.embed_tokens.weight.float()
    words = embeddings[tokenizer.convert_tokens_to_ids([*SHAPES, *COLORS])]
    places = 0.18 * torch.randn(2 * GRID, words.shape[1], device=run.device)
    centers = 0.3 * torch.randn(1, words.shape[1], device=run.device)
    directions = torch.cat([words, places, centers])
    first, second = model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2
    n = len(solution)
    for sign, rows in ((1.0, slice(0, n)), (-1.0, slice(n, 2 * n))):
        first.weight[rows], first.bias[rows] = sign * 1.6 * solution[:, :-1], sign * 1.6 * solution[:, -1]
        second.weight[:, rows] = sign * directions.T / 1.6
    second.weight[:, 2 * n :] = 0
    second.bias.zero_()


class Probe:
    """Keeps what the attention of some layers was given, so that its scores can be computed once more."""

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        self.seen: dict[int, tuple[Any, Tensor, tuple[Tensor, Tensor]]] = {}
        modules = [(index, model.model.language_model.layers[index].self_attn) for index in layers]
        self.handles = [
            module.register_forward_pre_hook(self._keeper(index), with_kwargs=True) for index, module in modules
        ]

    def _keeper(self, index: int) -> Callable[..., None]:
        def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self.seen[index] = (module, kwargs["hidden_states"], kwargs["position_embeddings"])

        return keep

    def loss(self, rows: Tensor, at: Tensor, targets: Tensor, visual: slice) -> Tensor:
        """Mean of -log(share of the attention to visual tokens that falls on `targets`, (n, number of them))."""
        losses = []
        for module, hidden, (cosine, sine) in self.seen.values():
            split = (*hidden.shape[:2], -1, module.head_dim)
            query, key = module.q_proj(hidden).view(split), module.k_proj(hidden).view(split)
            query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cosine, sine)
            group = query.shape[1] // key.shape[1]
            key = key[:, : GUIDED_HEADS // group, visual].repeat_interleave(group, dim=1)
            scores = torch.einsum("bhqd,bhkd->bqhk", query[:, :GUIDED_HEADS], key)[rows, at].float()
            scores = scores / math.sqrt(module.head_dim)  # (n, heads, visual tokens)
            hit = scores.masked_fill(~targets[:, None], -torch.inf).logsumexp(2)
            losses.append((scores.logsumexp(2) - hit).mean())
        return torch.stack(losses).mean()

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def thin(views: Sequence[Sequence[Picture]], keep: int, rng: random.Random) -> Tensor:
    """Indices (B, n) of patches in order: those of objects first in line, then random background."""
    chosen = []
    for pictures in views:
        row = []
        for number, picture in enumerate(pictures):
            covered = (picture.labels.thing.ravel() >= 0).tolist()
            order = sorted(range(PATCHES), key=lambda index: (not covered[index], rng.random()))
            row += sorted(number * PATCHES + index for index in order[:keep])
        chosen.append(row)
    return torch.tensor(chosen)


def question_step(
    model: Any, views: Sequence[Sequence[Picture]], packed: Pack, keep: int, run: Run, probe: Probe | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of all answer tokens logits (n, vocabulary), keys (n) and places in the pack (n, 2); and the guidance loss."""
    n_images = len(views[0])
    start, n_visual = 2 + PATCHES * n_images, keep * n_images
    patches = thin(views, keep, run.rng)
    rest = torch.arange(start, packed.ids.shape[1]).expand(len(views), -1)
    order = torch.cat([torch.arange(2).expand(len(views), -1), 2 + patches, rest], dim=1)
    ids, segments, positions, answers = (
        part.gather(1, order).to(run.device) for part in (packed.ids, packed.segments, packed.positions, packed.answers)
    )
    with torch.no_grad():
        flat = pixel_batch([picture for pictures in views for picture in pictures], run)
        hidden = features(model, flat)[:, 1:].reshape(len(views), n_images * PATCHES, -1)
        rows = torch.arange(len(views), device=run.device)[:, None]
        hidden = hidden[rows, patches.to(run.device)]
    visual = slice(2, 2 + n_visual)
    words = model.model.language_model.embed_tokens(ids)
    projected = model.model.multi_modal_projector(hidden)
    inputs = torch.cat([words[:, :2], projected, words[:, visual.stop :]], dim=1)
    output = model.model.language_model(
        inputs_embeds=inputs, attention_mask=visible(segments), position_ids=positions, use_cache=False
    ).last_hidden_state
    places = answers.nonzero()
    logits = model.lm_head(output[places[:, 0], places[:, 1] - 1]).float()
    keys = ids[places[:, 0], places[:, 1]]
    guidance = logits.new_zeros(())
    if probe is not None and packed.pointers:
        targets, kept = [], []
        for row, at, named in packed.pointers:
            hit = named_patches(views[row], named)[patches[row]]
            if hit.any():
                targets.append(hit)
                kept.append((row, at - start + visual.stop))
        if kept:
            index = torch.tensor(kept, device=run.device)
            guidance = probe.loss(index[:, 0], index[:, 1], torch.stack(targets).to(run.device), visual)
    shift = torch.tensor([0, start - visual.stop], device=run.device)
    return logits, keys, places + shift, guidance


def named_patches(pictures: Sequence[Picture], named: Named) -> Tensor:
    """Which patches of the pictures, side by side, show the named object; (256 x number of pictures)."""
    parts = []
    for number, picture in enumerate(pictures):
        fitting = np.array(
            [named.fits(thing) and named.picture in (None, number) for thing in picture.things] + [False]
        )
        parts.append(fitting[picture.labels.thing.ravel()])
    return torch.from_numpy(np.concatenate(parts))


def train_language(
    model: Any, pictures: Sequence[Picture], tokenizer: Any, seconds: float, run: Run, batch: int = 8
) -> None:
    """Stage B, tower frozen: few visual tokens and easy questions first, guidance fading out, two pictures late."""
    start_language(model)
    start_projector(model, pictures[:1200], tokenizer, run)
    parts = [model.model.multi_modal_projector, model.model.language_model, model.lm_head]
    trainer = Trainer(parts, 1.2e-3, seconds, 100, run)
    model.model.language_model.train()
    probe = Probe(model, GUIDED_LAYERS)
    easy = [picture for picture in pictures if picture.scene.layout != "mosaic4"] or list(pictures)
    reported = 0.0
    for share in trainer.steps():
        keep, mix, pool, room = PATCHES, MIX, pictures, TEXT_ROOM
        if share < 0.18:
            keep, mix, pool, room = 64, FIRST_MIX, easy, 192
        elif share < 0.45:
            keep = 128
        two = share >= 0.45 and trainer.step_count % 6 == 0
        views = [[pool[run.rng.randrange(len(pool))] for _ in range(1 + two)] for _ in range(batch // (1 + two))]
        packed = pack(views, MIX_OF_TWO if two else mix, tokenizer, run, room)
        strength = 0.4 * max(0.0, 1 - share / 0.6)
        logits, keys, _, guidance = question_step(model, views, packed, keep, run, probe if strength else None)
        loss = F.cross_entropy(logits, keys)
        trainer.step(loss + strength * guidance)
        if share >= reported:
            hits = (logits.argmax(1) == keys).float().mean().item()
            run.say(
                f"language {share:4.0%} step {trainer.step_count} loss {loss.item():.2f} tokens right {hits:.2f} "
                f"guidance {guidance.item():.2f}"
            )
            reported = share + 0.05
        probe.seen.clear()
    probe.close()
    run.log["language_steps"] = trainer.step_count
    model.eval()


@torch.no_grad()
def check(model: Any, pictures: Sequence[Picture], tokenizer: Any, run: Run, batch: int = 8) -> dict[str, float]:
    """Share of whole answers right, by kind of question, about unseen scenes; each token follows the right ones."""
    right: dict[str, list[bool]] = {}
    for begin in range(0, len(pictures), batch):
        views = [[picture] for picture in pictures[begin : begin + batch]]
        packed = pack(views, MIX, tokenizer, run, TEXT_ROOM)
        logits, keys, places, _ = question_step(model, views, packed, PATCHES, run)
        whole: dict[tuple[int, int], bool] = {}
        for (row, at), hit in zip(places.tolist(), (logits.argmax(1) == keys).tolist()):
            key = (row, int(packed.segments[row, at]))
            whole[key] = whole.get(key, True) and hit
        for (row, segment), hit in whole.items():
            right.setdefault(packed.kinds[row][segment], []).append(hit)
    return {kind: round(sum(hits) / len(hits), 3) for kind, hits in sorted(right.items())}


# -------------------------------------------------------------------------------------------------------------- files


def save(model: Any, folder: Path, run: Run) -> None:
    """A folder like the shipped one: weights in bfloat16 under names that old and new transformers read."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, prefix = {}, "model.vision_tower."
    for name, tensor in model.state_dict().items():
        if name.endswith("position_ids"):
            continue
        if name.startswith(prefix) and not name.startswith(prefix + "vision_model."):
            name = prefix + "vision_model." + name.removeprefix(prefix)
        tensors[name] = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    with safe_open(demo_vlm_path() / "model.safetensors", "pt") as shipped:
        difference = set(shipped.keys()) ^ set(tensors)
    if difference:
        raise RuntimeError(f"this release of transformers names weights differently: {sorted(difference)[:5]}")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for path in demo_vlm_path().iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copyfile(path, folder / path.name)
    (folder / "training.json").write_text(json.dumps(run.log, indent=2) + "\n")


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    minutes_vision: Annotated[float, typer.Option(help="Stage A; rendering is not counted.")] = 12.0,
    minutes_language: Annotated[float, typer.Option(help="Stage B.")] = 28.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    scenes: Annotated[int, typer.Option(min=8, help="Number of training scenes; 49 kB of memory each.")] = 30_000,
    check_scenes: Annotated[int, typer.Option(min=0, help="Unseen scenes for the check at the end.")] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Processes that render.")] = 1,
    precision: Annotated[str, typer.Option(help="float32, or bfloat16 where the hardware multiplies it.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train from nothing and write a transformers folder."""
    if precision not in ("float32", "bfloat16"):
        raise typer.BadParameter("give float32 or bfloat16.", param_hint="--precision")
    run = Run(seed, torch.device(device), getattr(torch, precision), typer.echo)
    run.log.update(
        seed=seed, minutes_vision=minutes_vision, minutes_language=minutes_language, scenes=scenes, precision=precision
    )
    run.say(f"rendering {scenes} scenes")
    pictures = render_pictures(scenes, seed, workers)
    model, processor = build(run)
    train_vision(model, pictures, 60 * minutes_vision, run)
    train_language(model, pictures, processor.tokenizer, 60 * minutes_language, run)
    if check_scenes:
        unseen = render_pictures(check_scenes, seed + 1_000)
        run.log["answers_right"] = check(model, unseen, processor.tokenizer, run)
        run.say(json.dumps(run.log["answers_right"]))
    save(model, out, run)
    run.say(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
