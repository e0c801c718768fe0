"""ACT's and VAR's Triton kernels without a GPU: numbers in the interpreter, what the compiler says, who runs where."""

import os
import subprocess
import sys

import pytest
import torch
from test_triton_kernels import ROOT, compiles, script

from infer_patch.kernels.calibrated_attention import ImageRule, lower_columns, shift_to_images
from infer_patch.kernels.row_attention import lse_and_column_sums

CASES = [
    (capability, case)
    for capability in (80, 90)
    for case in script.cases(capability)
    if case.kernel.__module__.endswith(("calibrated_triton", "image_shift_triton"))
]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["not test_lowered", "test_lowered"])
def test_numbers_in_the_interpreter(which):
    options = ["-p", "no:cacheprovider", "-k", which, "tests/calibrated_cases.py"]
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


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    "capability, case", CASES, ids=[f"sm_{c}-{case.name}-{case.size}-{case.dtype}-{case.tile}" for c, case in CASES]
)
def test_kernels_fit_the_gpu(capability, case):
    assert script.problems(script.compile_case(case, capability), capability) == []


def test_the_processor_runs_torch_and_refuses_triton(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, listed = torch.randn(1, 1, 4, 16), torch.ones(1, 1, 4, dtype=torch.bool)
    marks, rule = torch.ones(1, 4, dtype=torch.bool), ImageRule(0.5, 0.2, 0.4)
    lse_and_column_sums(q, q, (0,), 1.0)
    for ask in (
        lambda: lse_and_column_sums(q, q, (0,), 1.0, implementation="triton"),
        lambda: lower_columns(q, q, q, q, (0,), listed, 0.4, 1.0, implementation="triton"),
        lambda: shift_to_images(q, q, q, q, marks, marks, marks, rule, 1.0, implementation="triton"),
    ):
        with pytest.raises(ValueError, match=r"the Triton kernels cannot run: .* Use the implementation 'cpu'"):
            ask()
