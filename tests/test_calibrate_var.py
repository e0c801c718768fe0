"""`calibrate var` finds dimensions that were planted, and those of the demo language model."""

import json

import pytest
import torch
from miniatures import MINIATURES
from typer.testing import CliRunner

from infer_patch.calibration.var import calibrate, relative_size
from infer_patch.cli import app
from infer_patch.errors import PatchError
from infer_patch.patches.var import read_dims, sink_activation


@pytest.fixture(scope="module")
def planted(tiny, tmp_path_factory):
    """A model with a large value in dimension 40, which nothing else reads or writes, and its folder."""
    model = MINIATURES["llama"].build(hidden_size=512, num_hidden_layers=7, vocab_size=tiny[0].config.vocab_size)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 40] = 900
        for layer in model.model.layers:
            layer.input_layernorm.weight[40] = layer.post_attention_layernorm.weight[40] = 0
            layer.self_attn.o_proj.weight[40] = layer.mlp.down_proj.weight[40] = 0
    folder = tmp_path_factory.mktemp("planted")
    model.save_pretrained(folder)
    tiny[1].save_pretrained(folder)
    return model, tiny[1], folder


def test_planted_dimensions_are_found(planted):
    steps = []
    found = calibrate(*planted[:2], on_progress=lambda *step: steps.append(step[:2]))
    assert found["dims"] == [40]
    largest = found["largest"][0]
    assert largest["dim"] == 40 and largest["share_above"] == 1.0
    assert 22.5 < largest["median"] <= largest["max"] <= 512**0.5
    assert found["layers"] == [3, 5]
    assert steps == [(i, 6) for i in range(6)]


def test_nothing_is_found_where_nothing_is(tiny):
    model = MINIATURES["llama"].build(num_hidden_layers=6, vocab_size=tiny[0].config.vocab_size)
    with pytest.raises(PatchError, match=r"no hidden dimension .* The most there can be is 8\.0"):
        calibrate(model, tiny[1])
    with pytest.raises(PatchError, match="this llama has 4 layers"):
        calibrate(*tiny)


def test_the_measure_is_that_of_the_method():
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(relative_size(x)[..., [2, 9]].amax(-1), sink_activation(x, (2, 9)))


def test_the_command_writes_a_file_that_plans_read(planted, tmp_path):
    out = tmp_path / "dims.json"
    done = CliRunner().invoke(app, ["calibrate", "var", str(planted[2]), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert read_dims(out) == (40,)
    assert json.loads(out.read_text())["model"]["hidden_size"] == 512
    refused = CliRunner().invoke(app, ["calibrate", "var", "demo", "--out", str(tmp_path / "dims.txt")])
    assert refused.exit_code != 0


@pytest.mark.slow
def test_the_demo_model_has_one_at_its_first_token():
    from infer_patch.demo_model import load_demo_llm

    found = calibrate(*load_demo_llm())
    assert found["dims"] == [507]
    assert 22 < found["largest"][0]["median"] <= 24  # sqrt(576) = 24
