"""Triton kernels without a GPU: numbers in Triton's interpreter, registers and shared memory from the compiler."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infer_patch.kernels.block_mask import BlockMask

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases, which",
    [
        ("kernel_cases.py", "prefill or decode or splits"),
        ("kernel_cases.py", "not (prefill or decode or splits)"),
        ("packed_kernel_cases.py", "test_packed and not model"),
        ("packed_kernel_cases.py", "not test_packed or model"),
    ],
)
def test_numbers_in_the_interpreter(cases, which):
    """In processes of their own: kernels imported with TRITON_INTERPRET=1 stay interpreted."""
    options = ["-p", "no:cacheprovider", "-k", which, f"tests/{cases}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout


def load_script():
    spec = importlib.util.spec_from_file_location("kernel_resources", ROOT / "benchmarks" / "kernel_resources.py")
    module = sys.modules["kernel_resources"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()
COMPILED = [
    (capability, case)
    for capability in (80, 90)
    for case in script.cases(capability)
    if case.dtype == torch.bfloat16 and (case.size == 128 or (case.size == 64 and case.name == "prefill"))
    if case.constants.get("BITS") != 8  # some ten seconds each, and like those of 4 bits
]
compiles = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: nothing is compiled")


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    "capability, case", COMPILED, ids=[f"sm_{c}-{case.name}-{case.size}-{case.tile}" for c, case in COMPILED]
)
def test_kernels_fit_the_gpu(capability, case):
    """No spilled registers, shared memory within the limit, tensor-core instructions where matrices are multiplied."""
    assert script.problems(script.compile_case(case, capability), capability) == []


@compiles
@pytest.mark.slow
def test_a_tile_too_large_is_found():
    """The tile of 64 keys that suits sm_90 spills registers on sm_80."""
    case = next(c for c in script.cases(90) if c.name == "prefill" and c.size == 128 and c.constants["STACK"] == 1)
    result = script.compile_case(case, 80)
    assert any("spills" in problem for problem in script.problems(result, 80))
    wrong = result | {"shared_bytes": 200_000, "ptx": ".target sm_80"}
    assert [p for p in script.problems(wrong, 80) if "spills" not in p] == [
        "200000 bytes of shared memory, 166912 are there",
        "no tensor-core instruction",
    ]


@pytest.fixture
def launches(monkeypatch):
    """Kernels are compiled for an H100 as they would be launched, but not launched; {kernel: its binaries}."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class H100:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    made, run = {}, JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        binary = run(self, *args, grid=grid, warmup=True, **kwargs)
        made.setdefault(self.__name__, set()).add(binary.hash)
        return binary

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", H100())  # `reset_active` looks for a GPU, which need not be here
    return made


@compiles
@pytest.mark.slow
def test_one_binary_serves_every_length(launches):
    """Keys grow by one each step of generation: a kernel compiled anew each time would take seconds a token."""
    from infer_patch.kernels import (
        block_sparse_decode_triton,
        block_sparse_prefill_triton,
        envelope_triton,
        kv_pack_triton,
        packed_attention_triton,
        probe_scores_triton,
    )

    def tensors(queries, keys):
        shapes = [(1, 8, queries, 64), (1, 2, keys, 64), (1, 2, keys, 64)]
        return [torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes]

    for keys in (1000, 1001, 1024, 1025, 9000):
        idx = torch.zeros(1, 2, 2, keys // 64, dtype=torch.long)
        mask = BlockMask(idx, torch.ones(1, 2, 2, dtype=torch.long))
        block_sparse_prefill_triton.prefill(*tensors(100, keys), mask, 0.1)
        q, k, v = tensors(1, keys)
        block_sparse_decode_triton.decode(q, k, v, mask, 0.1)
        envelope = envelope_triton.envelope(k, 4)
        envelope_triton.scores(q, envelope, keys, 64, 16, 4, 0.1, 0.1)
        n, tail = keys // 128, keys % 128  # as many groups, and a tail of as many rows
        groups = kv_pack_triton.quantise_and_pack(k, v, torch.zeros(1, 1, n, 128, dtype=torch.long), 4)
        packed_attention_triton.attention(q, [groups], k[:, :, :tail], v[:, :, :tail], 0.1)
        at = torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, keys, dtype=torch.long)
        probe_scores_triton.probe_scores(q.expand(-1, -1, 8, -1), k, 0.1, *at)
    assert {name: len(binaries) for name, binaries in launches.items()} == {
        "prefill_kernel": 1,
        "decode_kernel": 1,
        "merge_kernel": 1,
        "envelope_kernel": 1,
        "row_sums_kernel": 1,
        "block_maxima_kernel": 1,
        "quantise_kernel": 1,
        "packed_decode_kernel": 2,  # of groups and of the tail
        "packed_merge_kernel": 1,
        "probe_sums_kernel": 1,
        "probe_mass_kernel": 1,
    }


def test_the_committed_table_is_that_of_the_result_file():
    assert script.page_with(script.table(script.read_result())) == script.PAGE.read_text(encoding="utf-8")
    for entry in script.read_result()["results"]:
        assert entry["stack_bytes"] == 0, entry
        assert entry["shared_bytes"] <= script.SHARED[entry["capability"]], entry
