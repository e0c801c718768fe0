"""ACT's and VAR's Triton kernels without a GPU: numbers in the interpreter, what the compiler says, who runs where."""

import os
import subprocess
import sys

import pytest
import torch
from test_triton_kernels import (
    ROOT,
    compiles,
    launches,  # noqa: F401
    script,
)

from infer_patch.kernels.calibrated_attention import lower_columns
from infer_patch.kernels.calibrated_row import running_row
from infer_patch.kernels.image_shift import ImageRule, shift_to_images
from infer_patch.kernels.row_attention import lse_and_column_sums

CASES = [
    (capability, case)
    for capability in (80, 90)
    for case in script.cases(capability)
    if case.kernel.__module__.endswith(("calibrated_triton", "calibrated_row_triton", "image_shift_triton"))
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


@compiles
@pytest.mark.slow
def test_one_binary_serves_every_length(launches):  # noqa: F811
    """Of `var`'s step and of `act`'s, with either way to spare a sink: two binaries where that is compiled in."""
    from infer_patch.kernels import calibrated_row_triton, image_shift_triton

    index, rule = torch.zeros(4, dtype=torch.long), ImageRule(0.5, 0.2, 0.4)
    for keys in (1000, 1001, 1024, 9000):
        q, k = torch.zeros(1, 8, 1, 64, dtype=torch.bfloat16), torch.zeros(1, 2, keys, 64, dtype=torch.bfloat16)
        marks = torch.ones(1, keys, dtype=torch.bool)
        image_shift_triton.shift_to_images(q, q, k, k, marks, marks, marks[:, :1], rule, 0.1)
        row, sums = q[:, :4].contiguous(), torch.zeros(1, 4, keys - 1)
        for spare_token in (False, True):
            calibrated_row_triton.running_row(row, row, k, k, sums, index, 0.1, spare_token, 1, 0.4, 0.1, 2.0)
    assert {name: len(binaries) for name, binaries in launches.items()} == {
        "probe_sums_kernel": 1,
        "shift_to_images_kernel": 1,
        "row_scores_kernel": 1,
        "add_row_kernel": 2,
        "lower_row_kernel": 2,
        "finish_row_kernel": 1,
    }


def test_the_processor_runs_torch_and_refuses_triton(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, listed = torch.randn(1, 1, 4, 16), torch.ones(1, 1, 4, dtype=torch.bool)
    marks, rule = torch.ones(1, 4, dtype=torch.bool), ImageRule(0.5, 0.2, 0.4)
    row, index = (q[:, :, :1], q, q, torch.ones(1, 1, 3), (0,)), torch.tensor([0])
    lse_and_column_sums(q, q, (0,), 1.0)
    running_row(q[:, :, :1], *row, index, 0.1, "first_token", 1, 0.4, 1.0)
    for ask in (
        lambda: lse_and_column_sums(q, q, (0,), 1.0, implementation="triton"),
        lambda: lower_columns(q, q, q, q, (0,), listed, 0.4, 1.0, implementation="triton"),
        lambda: shift_to_images(q, q, q, q, marks, marks, marks, rule, 1.0, implementation="triton"),
        lambda: running_row(q, *row, index, 0.1, "first_token", 1, 0.4, 1.0, implementation="triton"),
    ):
        with pytest.raises(ValueError, match=r"the Triton kernels cannot run: .* Use the implementation 'cpu'"):
            ask()
