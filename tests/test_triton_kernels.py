"""Triton kernels without a GPU: numbers in Triton's interpreter, registers and shared memory from the compiler."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.slow
@pytest.mark.parametrize("which", ["prefill or decode or splits", "not (prefill or decode or splits)"])
def test_numbers_in_the_interpreter(which):
    """kernel_cases.py, in processes of its own: kernels imported with TRITON_INTERPRET=1 stay interpreted."""
    options = ["-p", "no:cacheprovider", "-k", which, "tests/kernel_cases.py"]
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


def test_the_committed_table_is_that_of_the_result_file():
    assert script.page_with(script.table(script.read_result())) == script.PAGE.read_text(encoding="utf-8")
    for entry in script.read_result()["results"]:
        assert entry["stack_bytes"] == 0, entry
        assert entry["shared_bytes"] <= script.SHARED[entry["capability"]], entry
