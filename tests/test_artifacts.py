import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from infer_patch.artifacts import load_artifact, save_artifact
from infer_patch.errors import ArtifactError

TENSORS = {"spans": torch.arange(6).reshape(2, 3), "scale": torch.tensor([0.5, -1.0], dtype=torch.bfloat16)}
META = {"samples": 3, "grid": [0.1, 0.2], "note": "a test"}


def tiny_llama(seed=0, **changes):
    torch.manual_seed(seed)
    config = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes}))


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def folder(tmp_path, model):
    return save_artifact(tmp_path / "a" / "moa", "moa", TENSORS, META, model)


def edit(folder, **changes):
    file = folder / "artifact.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_round_trip(folder, model):
    artifact = load_artifact(folder, "moa", model)
    assert (artifact.method, artifact.meta) == ("moa", META)
    assert artifact.fingerprint["architecture"] == "LlamaForCausalLM"
    assert artifact.fingerprint["head_dim"] == 8
    assert artifact.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert artifact.tensors[name].dtype == tensor.dtype
        assert torch.equal(artifact.tensors[name], tensor)
    assert sorted(file.name for file in folder.iterdir()) == ["artifact.json", "artifact.safetensors"]


def test_saving_again_replaces(folder, model):
    save_artifact(folder, "moa", {"spans": torch.zeros(1)}, {}, model)
    assert load_artifact(folder, "moa", model).tensors.keys() == {"spans"}


def test_saves_views_and_shared_memory(tmp_path, model):
    base = torch.randn(4, 4)
    folder = save_artifact(tmp_path / "views", "moa", {"a": base.T, "b": base[:, 1]}, {}, model)
    assert torch.equal(load_artifact(folder, "moa", model).tensors["a"], base.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_same_weights_in_another_dtype_fit(folder, model, dtype):
    assert load_artifact(folder, "moa", model.to(dtype)).tensors.keys() == TENSORS.keys()


def test_artifact_of_a_half_precision_model_fits_the_full_one(tmp_path):
    folder = save_artifact(tmp_path / "half", "moa", TENSORS, META, tiny_llama().to(torch.bfloat16))
    assert load_artifact(folder, "moa", tiny_llama()).tensors.keys() == TENSORS.keys()


def test_wrong_model(folder):
    with pytest.raises(ArtifactError, match=r"num_hidden_layers is 3, expected 2.*infer-patch calibrate moa"):
        load_artifact(folder, "moa", tiny_llama(num_hidden_layers=3))


def test_other_weights(folder):
    other = tiny_llama(seed=1)
    with pytest.raises(ArtifactError, match=r"other weights.*strict_weights=False"):
        load_artifact(folder, "moa", other)
    load_artifact(folder, "moa", other, strict_weights=False)


def test_slightly_trained_weights_are_other_weights(folder, model):
    with torch.no_grad():
        for weight in model.parameters():
            weight += 1e-3
    with pytest.raises(ArtifactError, match="other weights"):
        load_artifact(folder, "moa", model)


def test_weights_that_cannot_be_compared_are_refused(folder, model):
    with pytest.raises(ArtifactError, match="other weights"):
        load_artifact(folder, "moa", model.to("meta"))


def test_wrong_method(folder, model):
    with pytest.raises(ArtifactError, match=r"method 'moa', not for 'dyvte'.*infer-patch calibrate dyvte"):
        load_artifact(folder, "dyvte", model)


def test_tampered_tensor_file(folder, model):
    file = folder / "artifact.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"damaged.*sha256"):
        load_artifact(folder, "moa", model)


def test_tensors_that_the_json_does_not_describe(folder, model):
    edit(folder, tensors={"spans": {"shape": [2, 3], "dtype": "int64"}})
    with pytest.raises(ArtifactError, match="holds the tensors"):
        load_artifact(folder, "moa", model)


def test_truncated_json(folder, model):
    file = folder / "artifact.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(ArtifactError, match="not valid JSON"):
        load_artifact(folder, "moa", model)


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": "something else"}'])
def test_foreign_json(folder, model, text):
    (folder / "artifact.json").write_text(text)
    with pytest.raises(ArtifactError, match="does not describe"):
        load_artifact(folder, "moa", model)


@pytest.mark.parametrize("field", ["meta", "model", "tensors", "tensors_sha256", "method", "created_with"])
def test_missing_field(folder, model, field):
    edit(folder, **{field: None})
    with pytest.raises(ArtifactError, match=f"at '{field}', got None"):
        load_artifact(folder, "moa", model)


@pytest.mark.parametrize("name", ["artifact.json", "artifact.safetensors"])
def test_missing_file(folder, model, name):
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"no {name}"):
        load_artifact(folder, "moa", model)


def test_missing_folder(tmp_path, model):
    with pytest.raises(ArtifactError, match="expected an artifact folder"):
        load_artifact(tmp_path / "nowhere", "moa", model)


def test_newer_format(folder, model):
    edit(folder, format_version=2)
    with pytest.raises(ArtifactError, match=r"format version 2.*Update infer_patch"):
        load_artifact(folder, "moa", model)


@pytest.mark.parametrize("meta", [{"x": float("nan")}, {"x": torch.zeros(1)}])
def test_meta_must_be_plain(tmp_path, model, meta):
    with pytest.raises(ArtifactError, match="meta"):
        save_artifact(tmp_path / "bad", "moa", TENSORS, meta, model)
    assert not (tmp_path / "bad").exists()
