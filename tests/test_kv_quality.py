"""The comparison of caches in few bits, on a tiny model: every row is measured, and exact rows drift by nothing."""

import importlib.util
import sys
import warnings
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import DynamicCache
from transformers.cache_utils import QuantizedLayer

from infer_patch.evals.needle import NeedleGrid

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kv_quality.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("kv_quality", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kv_quality"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["kv_quality"]


def test_every_row_is_measured(script, tiny, capsys):
    model, tokenizer = tiny
    rows, _ = script.sides(model, ["sink_window-evict"])
    rows = [row for row in rows if "transformers" not in row.name]
    task = NeedleGrid((700,), (0.5,), max_new_tokens=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 16 bits take no effect, and say so
        script.measure(model, tokenizer, rows, task, lambda text: None)
    found = {row["side"]: row for row in script.results(rows)}
    assert list(found)[:2] == ["unpatched", "kv_quant, 16 bits"] and "sink_window-evict" in found
    drift = {name: row["drift"]["kl_mean"] for name, row in found.items()}
    assert drift["unpatched"] == drift["kv_quant, 16 bits"] == 0
    assert 0 < drift["kv_quant, 8 bits"] < drift["kv_quant, 4 bits"] < drift["kv_quant, 2 bits"]
    sizes = [found[f"kv_quant, {bits} bits"]["cache_bytes"][0] for bits in (16, 8, 4, 2)]
    assert sizes == sorted(sizes, reverse=True) and found["unpatched"]["cache_bytes"][0] == sizes[0]
    assert all(row["needles"][1] == 1 for row in found.values())
    script.show(
        list(found.values()), {"transformers hqq, 4 bits": "the package hqq is not installed"}, Console(width=100)
    )
    said = capsys.readouterr().out
    assert "kv_quant, 4/2 at 42 %" in said and "Not run: transformers hqq" in said


def test_an_answer_goes_on_from_a_copy_as_if_alone(script, tiny):
    """The drift run and the side's own answer share a prefill; neither changes the other."""
    model, _ = tiny
    rows, _ = script.sides(model, [])
    side = next(row for row in rows if row.name == "kv_quant, 2 bits")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (400,), generator=generator)
    alone = script.run(model, side, ids[:380], ids[380:], None, 100)  # long enough to pack while answering
    other = [(token + 1) % model.config.vocab_size if at == 20 else token for at, token in enumerate(alone.answer)]
    forced = script.run(model, side, ids[:380], ids[380:], other, 100)
    assert forced.answer == alone.answer
    assert torch.equal(forced.logits[:21], alone.logits[:21]) and not torch.equal(forced.logits[21:], alone.logits[21:])
    same = script.run(model, side, ids[:380], ids[380:], alone.answer, 100)
    assert same.answer == alone.answer and torch.equal(same.logits, alone.logits)


class Held:
    """Codes of a backend whose tensors cannot be copied."""

    def __init__(self, x):
        self.x = x

    def __deepcopy__(self, memo):
        raise RuntimeError("not to be copied")


class Backend(QuantizedLayer):
    def _quantize(self, tensor, axis):
        return Held(tensor)

    def _dequantize(self, held):
        return held.x


def test_quantised_layers_of_transformers_go_on_apart(script):
    cache = DynamicCache()
    cache.layers = [Backend(residual_length=4)]
    new = torch.arange(8.0).view(1, 1, 4, 2)
    for tokens in (new, new[:, :, :2]):
        cache.update(tokens, tokens, 0)
    apart = script.twin(cache)
    for _ in range(3):  # packs again
        apart.update(-new, -new, 0)
    assert (cache.get_seq_length(), apart.get_seq_length()) == (6, 18)
    seen, _ = cache.update(new[:, :, :1], new[:, :, :1], 0)
    assert torch.equal(seen, torch.cat([new, new[:, :, :2], new[:, :, :1]], 2))
