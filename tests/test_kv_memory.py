"""The memory benchmark, on a tiny model: every row in its own process, allocated bytes hold those in use."""

import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import infer_patch
from infer_patch.errors import PatchError
from infer_patch.patches import KVQuant

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch, tiny):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("kv_memory", FOLDER / "kv_memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "load", lambda *names: tiny)
    yield module
    sys.modules.pop("kv_quality", None)


def test_every_row_is_measured_in_a_process_of_its_own(script, monkeypatch, capsys, tmp_path):
    commands = []

    def run(command, **options):
        commands.append(command)
        script.main(command[2:])
        return subprocess.CompletedProcess(command, 0, capsys.readouterr().out, "")

    monkeypatch.setattr(script.subprocess, "run", run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 16 bits take no effect, and say so
        script.main(["--length=700", "--chunk=256", "--tokens=3", f"--json={tmp_path / 'out.json'}"])
    assert all(command[0] == sys.executable and "--length=700" in command for command in commands)
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(commands) == len(found) >= 6
    sizes = [found[f"kv_quant, {bits} bits"]["cache_bytes"] for bits in (16, 8, 4, 2)]
    assert sizes == sorted(sizes, reverse=True) and found["unpatched"]["cache_bytes"] == sizes[0]
    for row in found.values():
        assert row["allocated_bytes"] >= row["cache_bytes"] > 0
        if sys.platform == "linux" and row["rss_peak"] is not None:
            assert row["rss_peak"] >= row["rss_before"] > 0


def test_all_memory_of_a_packed_cache_counts_once(script, tiny):
    model, _ = tiny
    ids = torch.randint(5, model.config.vocab_size, (1, 500), generator=torch.Generator().manual_seed(0))
    with infer_patch.patch(model, KVQuant(bits=4, other_bits=2, important=0.4)), torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(input_ids=ids, past_key_values=cache)
        for layer in cache.layers:
            layer.groups()  # views of the slabs are kept: not counted again
        layer = cache.layers[0]
        slabs = [slab for pool in layer.pools for slab in pool.slabs.values()]
        parts = [x for slab in slabs for x in slab._held().values()] + [layer.tail.keys, layer.tail.values]
        expected = sum(x.untyped_storage().nbytes() for x in parts)
        one = DynamicCache()
        one.layers = [layer]
        assert script.allocated_bytes(one) - expected <= 1024  # besides: bookkeeping of a few numbers
        assert script.allocated_bytes(cache) > expected >= layer.nbytes()


def test_a_row_that_is_not_there_or_fails_is_named(script, monkeypatch):
    with pytest.raises(PatchError, match="no side is called 'nothing'"):
        script.main(["--side=nothing", "--length=700"])
    broken = subprocess.CompletedProcess([], 1, "", "Traceback\nMemoryError")
    monkeypatch.setattr(script.subprocess, "run", lambda *command, **options: broken)
    with pytest.raises(PatchError, match=r"unpatched failed.*MemoryError"):
        script.main(["--length=700"])
