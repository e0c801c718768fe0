"""Random-weight miniatures of every architecture the project supports: the model axis of the test matrix.

    mini = MINIATURES["llava"]
    model = mini.build()
    inputs = vision_inputs(mini, images=(1, 2, 0))         # a left-padded batch of three
    alone = vision_inputs(mini, images=(1, 2, 0), only=1)  # its second sample with the same content
    model.generate(**inputs, **GREEDY)

Everything is float32 on the CPU, needs no download, and is the same on every call. For every family here,
a row of a padded batch gives the tokens that the sample gives alone (unpatched, greedy).
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

GREEDY = {"max_new_tokens": 8, "do_sample": False}

VOCAB = 128
# Ids below FIRST_TEXT are special in every miniature: never drawn as text, never generated.
PAD, BOS, EOS, IMAGE, VIDEO, START, END, FIRST_TEXT = 0, 1, 2, 3, 4, 5, 6, 8
PATCH = 4
SMALL, LARGE, TILE = 16, 32, 8  # sides of an image of 4 x 4 patches, of 8 x 8, and of a tile of 2 x 2

Picture = tuple[int, dict[str, Tensor]]  # placeholder tokens of an image, and its tensors with a leading axis
Painter = Callable[[int, torch.Generator], Picture]  # takes the number of images in the sample


# --- the miniature ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Miniature:
    """A model family in small, with the traits that tests select by."""

    name: str
    model_type: str = ""  # the name, if empty
    text: dict[str, Any] = field(default_factory=dict)  # settings on top of _TEXT
    layer_pattern: tuple[str, ...] = ()  # layer types, repeated over the layers
    vision: dict[str, Any] | None = None  # settings on top of _VISION
    multimodal: dict[str, Any] = field(default_factory=dict)
    picture: Painter | None = None
    markers: bool = False  # START before and END behind the placeholders of an image
    bidirectional: Literal["none", "image", "prompt"] = "none"  # what attends forwards during prefill

    @property
    def kind(self) -> Literal["text", "vision"]:
        return "text" if self.vision is None else "vision"

    @property
    def num_layers(self) -> int:
        return _TEXT["num_hidden_layers"]

    @property
    def sliding(self) -> Literal["none", "some", "all"]:
        """Which decoder layers have a window of their own."""
        if self.text.get("sliding_window") is None:
            return "none"
        return "some" if self.layer_pattern else "all"

    @property
    def softcap(self) -> bool:
        """Attention scores pass through cap * tanh(scores / cap)."""
        return "attn_logit_softcapping" in self.text

    @property
    def moe(self) -> bool:
        return "num_experts_per_tok" in self.text

    @property
    def image_token_id(self) -> int | None:
        return None if self.vision is None else IMAGE

    @property
    def deepstack(self) -> int:
        """Number of first decoder layers after which visual features are added once more."""
        return len((self.vision or {}).get("deepstack_visual_indexes", ()))

    def config(self, **overrides: Any) -> PreTrainedConfig:
        """The configuration; `overrides` are settings of its text part."""
        text = {**_TEXT, **self.text, **overrides}
        if self.layer_pattern and "layer_types" not in text:
            layers, pattern = text["num_hidden_layers"], self.layer_pattern
            text["layer_types"] = [pattern[i % len(pattern)] for i in range(layers)]
        model_type = self.model_type or self.name
        if self.vision is None:
            return AutoConfig.for_model(model_type, **text)
        parts = {"text_config": text, "vision_config": {**_VISION, **self.vision}}
        ids = {"image_token_id": IMAGE, "tie_word_embeddings": False}
        return AutoConfig.for_model(model_type, **parts, **ids, **self.multimodal)

    def build(self, *, attn_implementation: str | None = None, seed: int = 0, **overrides: Any) -> PreTrainedModel:
        """The same model on every call; `overrides` are settings of the text configuration."""
        if self.softcap and attn_implementation is None:
            attn_implementation = "eager"  # transformers 5.2 defaults to SDPA, which drops the cap silently
        auto = AutoModelForCausalLM if self.vision is None else AutoModelForImageTextToText
        config = self.config(**overrides)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = auto.from_config(config, attn_implementation=attn_implementation, dtype=torch.float32)
            _spread_weights(model)
        # Always the full number of new tokens: the rows of a batch end together.
        model.generation_config.update(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None)
        return model.eval()

    @cached_property
    def accepts(self) -> frozenset[str]:
        """Arguments that this family's forward names in the installed transformers."""
        model_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(self.config())]
        return frozenset(inspect.signature(model_class.forward).parameters)


@torch.no_grad()
def _spread_weights(model: PreTrainedModel, gain: float = 1.3) -> None:
    """Redraw embeddings and matrices so that attention is peaked and greedy tokens vary.

    The initialisation of the families (0.02) gives uniform attention and near-ties between logits.
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, torch.nn.Embedding):
                parameter.normal_()
            elif parameter.dim() >= 2:
                # A convolution reads all trailing axes; a linear layer or a stack of experts the last one.
                fan_in = parameter[0].numel() if parameter.dim() > 3 else parameter.shape[-1]
                parameter.normal_(std=gain * fan_in**-0.5)
    text = model.config.get_text_config()
    if text.model_type.startswith("gemma"):  # these multiply embeddings by sqrt(width)
        model.get_input_embeddings().weight.mul_(text.hidden_size**-0.5)
    model.get_output_embeddings().weight[:FIRST_TEXT] = 0  # a logit of 0 never wins


# --- inputs ----------------------------------------------------------------------------------------------


def text_inputs(
    subject: Miniature | PreTrainedModel,
    lengths: Sequence[int] = (12, 7),
    seed: int = 0,
    side: Literal["left", "right"] = "left",
    only: int | None = None,
) -> dict[str, Tensor]:
    """A padded batch of random prompts; row i depends on `seed`, `i` and its length alone.

    `only=i` returns row i as a batch of one.
    """
    config = subject.config() if isinstance(subject, Miniature) else subject.config
    vocab = config.get_text_config().vocab_size
    rows = [_words(length, _generator(seed, i), vocab) for i, length in enumerate(lengths)]
    return _pad(rows if only is None else [rows[only]], side)


def vision_inputs(
    mini: Miniature,
    images: Sequence[int] = (1, 2, 0),
    text: tuple[int, int] | Sequence[tuple[int, int]] = (5, 9),
    seed: int = 0,
    gap: int = 2,
    side: Literal["left", "right"] = "left",
    only: int | None = None,
) -> dict[str, Tensor]:
    """A padded batch whose sample i shows `images[i]` images between `text` = (before, after) words.

    `text` may be given per sample. `gap` words stand between two images. Sample i depends on `seed`, `i` and
    its own numbers alone; `only=i` returns it as a batch of one.
    """
    texts = [text] * len(images) if isinstance(text[0], int) else text
    samples = [
        _sample(mini, count, words, gap, _generator(seed, i))
        for i, (count, words) in enumerate(zip(images, texts, strict=True))
    ]
    if only is not None:
        samples = [samples[only]]
    inputs = _pad([ids for ids, _ in samples], side)
    is_image = (inputs["input_ids"] == IMAGE).long()
    extras = {
        "mm_token_type_ids": is_image,
        "token_type_ids": torch.zeros_like(is_image) if mini.bidirectional == "prompt" else is_image,
    }
    pictures = [pictures for _, pictures in samples]
    if any(pictures):
        extras["batch_num_images"] = torch.tensor([len(of_sample) for of_sample in pictures])
        inputs |= _per_sample(pictures) if "pixel_attention_mask" in mini.accepts else _flat(pictures)
    return inputs | {key: value for key, value in extras.items() if key in mini.accepts}


def _sample(
    mini: Miniature, count: int, text: tuple[int, int], gap: int, rng: torch.Generator
) -> tuple[list[int], list[dict[str, Tensor]]]:
    """Ids and pictures of one sample."""
    before, after = ([START], [END]) if mini.markers else ([], [])
    ids, pictures = _words(text[0], rng), []
    for index in range(count):
        tokens, tensors = mini.picture(count, rng)
        ids += _words(gap if index else 0, rng) + before + [IMAGE] * tokens + after
        pictures.append(tensors)
    return ids + _words(text[1], rng), pictures


def _flat(pictures: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """All images of the batch along one axis, as most families want them."""
    flat = [picture for of_sample in pictures for picture in of_sample]
    return {key: torch.cat([picture[key] for picture in flat]) for key in flat[0]}


def _per_sample(pictures: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """[samples, most images, 3, height, width], absent images all zero, as Idefics3 wants them."""
    most = max(map(len, pictures))
    pixels = torch.zeros(len(pictures), most, 3, LARGE, LARGE)
    mask = torch.zeros(len(pictures), most, LARGE, LARGE, dtype=torch.bool)
    for i, of_sample in enumerate(pictures):
        for j, picture in enumerate(of_sample):
            pixels[i, j], mask[i, j] = picture["pixel_values"][0], True
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def _generator(seed: int, row: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * seed + row)


def _words(length: int, rng: torch.Generator, vocab: int = VOCAB) -> list[int]:
    return torch.randint(FIRST_TEXT, vocab, (length,), generator=rng).tolist()


def _pad(rows: list[list[int]], side: str) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


# --- pictures: one random image in the form that a family's forward takes --------------------------------


def _large(count: int, rng: torch.Generator) -> Picture:
    """One image of 8 x 8 patches, merged two by two into 16 tokens."""
    return 16, {"pixel_values": torch.randn(1, 3, LARGE, LARGE, generator=rng)}


def _small(count: int, rng: torch.Generator) -> Picture:
    """One image of 4 x 4 patches, each of them a token."""
    return 16, {"pixel_values": torch.randn(1, 3, SMALL, SMALL, generator=rng)}


def _tiled(count: int, rng: torch.Generator) -> Picture:
    """A base view and two tiles side by side: 4 + (4 x 2 + 2 newlines) tokens."""
    pixels = torch.randn(1, 3, 3, TILE, TILE, generator=rng)
    return 14, {"pixel_values": pixels, "image_sizes": torch.tensor([[TILE, 2 * TILE]])}


def _tiled_if_alone(count: int, rng: torch.Generator) -> Picture:
    """As above for a lone image; with others in the sample only its base view and a newline, 4 + 1 tokens."""
    tokens, tensors = _tiled(count, rng)
    return (tokens if count == 1 else 5), tensors


def _patches(count: int, rng: torch.Generator) -> Picture:
    """Flat patches of two equal frames on a 4 x 8 grid, merged two by two: 8 tokens in 2 rows."""
    pixels = torch.randn(32, 3 * 2 * PATCH**2, generator=rng)
    return 8, {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 8]])}


# --- the table -------------------------------------------------------------------------------------------


_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
_HEADS = {"head_dim": 16}  # for the families whose heads need not add up to the width
_WINDOW = {"sliding_window": 6}  # shorter than any prompt of the tests
_GEMMA = {**_HEADS, **_WINDOW, "query_pre_attn_scalar": 16}
_CAPS = {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 8.0}
_TOP_2 = {"num_experts_per_tok": 2}
_LLAMA, _QWEN2 = {"model_type": "llama"}, {"model_type": "qwen2"}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_SLIDING, _FULL = "sliding_attention", "full_attention"

_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "patch_size": PATCH}
_CLIP = {"model_type": "clip_vision_model", "num_hidden_layers": 3, "projection_dim": 32}
_SIGLIP = {"model_type": "siglip_vision_model", "num_hidden_layers": 3, "vision_use_head": False}
_IDEFICS = {"num_hidden_layers": 3, "image_size": LARGE}
_INTERN = {"num_hidden_layers": 3, "image_size": [LARGE, LARGE], "patch_size": [PATCH, PATCH]}
_QWEN2_VISION = {"depth": 3, "num_heads": 4, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
_QWEN3_VISION = {"depth": 3, "num_heads": 4, "out_hidden_size": 64}
# Windows of 2 x 2 merged patches, two per image, and full attention in the middle block.
_WINDOWED = {"window_size": 16, "fullatt_block_indexes": [1]}
_DEEPSTACK = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}

_TILE = {"image_size": TILE}
_GRID = {"image_grid_pinpoints": [[TILE, 2 * TILE], [2 * TILE, TILE]], "video_token_id": VIDEO}
_QWEN_IDS = {"video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
_QWEN_VL: dict[str, Any] = {"multimodal": _QWEN_IDS, "picture": _patches, "markers": True}

_ALL = [
    Miniature("llama"),
    Miniature("mistral", text=_WINDOW),
    Miniature("mistral_full", "mistral", text={"sliding_window": None}),
    Miniature("qwen2"),
    Miniature("qwen3", text=_HEADS),
    Miniature("gemma2", text=_GEMMA | _CAPS, layer_pattern=(_SLIDING, _FULL)),
    Miniature("gemma3_text", text=_GEMMA, layer_pattern=(_SLIDING, _SLIDING, _SLIDING, _FULL)),
    Miniature("phi3"),
    Miniature("gpt_neox"),
    Miniature("mixtral", text={"num_local_experts": 4, **_TOP_2}),
    Miniature("qwen3_moe", text=_HEADS | {"num_experts": 4, **_TOP_2, "moe_intermediate_size": 48}),
    Miniature("llava", text=_LLAMA, vision=_CLIP | {"image_size": SMALL}, picture=_small),
    Miniature("llava_next", text=_LLAMA, vision=_CLIP | _TILE, multimodal=_GRID, picture=_tiled),
    Miniature("llava_onevision", text=_QWEN2, vision=_SIGLIP | _TILE, multimodal=_GRID, picture=_tiled_if_alone),
    Miniature("qwen2_vl", text={"rope_parameters": _MROPE}, vision=_QWEN2_VISION, **_QWEN_VL),
    Miniature("qwen2_5_vl", text={"rope_parameters": _MROPE}, vision=_QWEN3_VISION | _WINDOWED, **_QWEN_VL),
    Miniature(
        "qwen3_vl",
        text=_HEADS | {"rope_parameters": _MROPE | {"mrope_interleaved": True}},
        vision=_QWEN3_VISION | _DEEPSTACK,
        **_QWEN_VL,
    ),
    Miniature("internvl", text=_QWEN2, vision=_INTERN, picture=_large, markers=True),
    Miniature("idefics3", text=_LLAMA, vision=_IDEFICS, picture=_large, markers=True),
    Miniature("smolvlm", text=_LLAMA, vision=_IDEFICS, picture=_large, markers=True),
    Miniature(
        "paligemma",
        text=_HEADS | {"model_type": "gemma"},
        vision=_SIGLIP | {"image_size": SMALL},
        multimodal={"projection_dim": 64, "hidden_size": 64},
        picture=_small,
        bidirectional="prompt",
    ),
    Miniature(
        "gemma3",
        text=_GEMMA,
        layer_pattern=(_SLIDING, _FULL),
        vision=_SIGLIP | {"image_size": LARGE},
        multimodal={"boi_token_index": START, "eoi_token_index": END, "mm_tokens_per_image": 16},
        picture=_large,
        markers=True,
        bidirectional="image",
    ),
]
MINIATURES = {mini.name: mini for mini in _ALL}
