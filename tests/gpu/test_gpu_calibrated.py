"""ACT's and VAR's Triton kernels on a GPU: the cases of the interpreter, long prompts, steps that do not wait."""

import os
from contextlib import contextmanager

import pytest
import torch

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("triton")

from calibrated_cases import *  # noqa: F403
from calibrated_cases import key_heads, reference_probabilities
from test_act import LOW, PARTS, call, draw
from test_calibrated_row import step

from infer_patch.kernels.calibrated_attention import lower_columns
from infer_patch.kernels.calibrated_row import running_row
from infer_patch.kernels.dense_attention import dense_attention
from infer_patch.kernels.dispatch import triton_refusal
from infer_patch.kernels.image_shift import ImageRule, shift_to_images
from infer_patch.kernels.row_attention import lse_and_column_sums
from infer_patch.patches import ACT

if triton_refusal("cuda"):
    pytest.skip(triton_refusal("cuda"), allow_module_level=True)


@pytest.mark.parametrize("size", [64, 80, 128, 256])
def test_long_prompts_in_half_precision(size):
    generator = torch.Generator("cuda").manual_seed(size)
    shape = dict(device="cuda", dtype=torch.bfloat16, generator=generator)
    q, (k, v) = torch.randn(1, 4, 8192, size, **shape), (torch.randn(1, 2, 8192, size, **shape) for _ in range(2))
    kv, scale = (0, 0, 1, 1), size**-0.5
    found, expected = (lse_and_column_sums(q, k, kv, scale, implementation=name) for name in ("triton", "cpu"))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    listed = torch.rand(1, 4, 8192, device="cuda", generator=generator) < 0.01
    output = dense_attention(q, k, v, scale)
    new, old = (lower_columns(output, q, k, v, kv, listed, 0.4, scale, implementation=x) for x in ("triton", "cpu"))
    assert torch.equal(new[1], old[1])
    torch.testing.assert_close(new[0], old[0], atol=2e-2, rtol=2e-2)


def long_picture(queries, keys, device="cuda"):
    """Two samples, 576 and 1,200 visual tokens, a sink in every 50 of them, and text sinks."""
    visual = torch.zeros(2, keys, dtype=torch.bool, device=device)
    visual[0, 30:606], visual[1, 100:1300] = True, True
    sinks = torch.zeros_like(visual)
    sinks[:, ::50] = True
    asked = (torch.arange(keys - queries, keys, device=device) >= 1300).expand(2, -1)
    return sinks, visual, asked


@pytest.mark.parametrize("queries", [1, 8, 2000])
@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_rows_shifted_in_half_precision(queries, size, dtype, tolerance):
    generator = torch.Generator("cuda").manual_seed(size)
    shape = dict(device="cuda", dtype=dtype, generator=generator)
    q, (k, v) = torch.randn(2, 8, queries, size, **shape), (torch.randn(2, 2, 2000, size, **shape) for _ in range(2))
    marks, rule = long_picture(queries, 2000), ImageRule(0.6, 0.2, 0.6)
    a = reference_probabilities(q, k, key_heads(8, 2), size**-0.5)
    output = (a @ v.float().repeat_interleave(4, 1)).to(dtype)
    found, expected = (
        shift_to_images(output, q, k, v, *marks, rule, size**-0.5, implementation=name)
        for name in ("triton", "reference")
    )
    assert torch.equal(found[1], expected[1]) and found[1][0].any() and found[1][1].any()
    torch.testing.assert_close(found[0], expected[0], atol=tolerance, rtol=tolerance)
    assert torch.equal(found[0][~found[1]], output[~found[1]])


@contextmanager
def no_waiting():
    """Every wait for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def without_waiting(work):
    """What `work` gives where it must not wait for the GPU; it ran once before."""
    work()  # compiles
    with no_waiting():
        return work()


def test_steps_of_var_never_wait_for_the_gpu():
    q, k, v = (torch.randn(2, h, n, 64, device="cuda", dtype=torch.float16) for h, n in ((8, 1), (2, 2000), (2, 2000)))
    marks, rule = long_picture(1, 2000), ImageRule(1.0, 0.0, 0.4)
    a = reference_probabilities(q, k, key_heads(8, 2), 0.1)
    output = (a @ v.float().repeat_interleave(4, 1)).to(q.dtype)
    found, chosen = without_waiting(lambda: shift_to_images(output, q, k, v, *marks, rule, 0.1))
    expected = shift_to_images(output, q, k, v, *marks, rule, 0.1, implementation="reference")
    assert torch.equal(chosen, expected[1]) and chosen.any()
    torch.testing.assert_close(found, expected[0], atol=3e-3, rtol=3e-3)


@pytest.mark.parametrize("keys", [60, 4000, 65536])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("spare, min_queries", [("first_detected", 1), ("first_token", 6)])
def test_a_step_of_act_repeats_and_never_waits_for_the_gpu(keys, dtype, tolerance, spare, min_queries):
    tensors = [x.cuda() if torch.is_tensor(x) else x for x in step(2, 4, (0, 0, 1, 3), dtype, keys)]
    rule = 0.1, spare, min_queries, 0.4, 0.3
    found = without_waiting(lambda: running_row(*tensors, *rule))
    again, expected = (running_row(*tensors, *rule, implementation=name) for name in ("triton", "reference"))
    assert all(torch.equal(a, b) for a, b in zip(found, again))
    assert torch.equal(found[1], expected[1]) and found[1].any() and not found[1].all()
    torch.testing.assert_close(found[0], expected[0], atol=tolerance, rtol=tolerance)
    assert torch.equal(found[0][~found[1]], tensors[0][~found[1]])
    for a, b in zip(found[2:], expected[2:]):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [64, 80, 128, 256])
def test_steps_of_act_in_a_cuda_graph(size):
    """Other rows, sums and keys are served by the same graph."""
    first, second = (
        [
            torch.randn(2, h, n, size, device="cuda", dtype=torch.bfloat16)
            for h, n in ((4, 1), (4, 1), (2, 3000), (2, 3000))
        ]
        + [torch.rand(2, 4, 2999, device="cuda") * torch.arange(3000, 1, -1, device="cuda") * 0.11]
        for _ in range(2)
    )
    rest = (0, 0, 1, 1), torch.tensor([0, 0, 1, 1], device="cuda"), 0.1, "first_detected", 1, 0.4, size**-0.5
    held = [x.clone() for x in first]
    running_row(*held, *rest)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = running_row(*held, *rest)
    for tensors in (first, second, first):
        for to, x in zip(held, tensors):
            to.copy_(x)
        graph.replay()
        expected = running_row(*tensors, *rest, implementation="reference")
        assert torch.equal(out[1], expected[1]) and out[1].all()
        torch.testing.assert_close(out[0], expected[0], atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(out[2], expected[2], atol=1e-4, rtol=1e-4)


def decoded(device, rows=60, steps=4):
    """What ACT gives for a prompt and the steps behind it, the last of which must not wait."""
    q, k, v = (x.to(device) for x in draw(rows))
    plain = reference_probabilities(q, k, key_heads(6, 2), 0.25) @ v.repeat_interleave(3, 1)
    runtime, memory, first = ACT(**LOW).runtime(PARTS, (0,)), [{}, {}], rows - steps
    found = [runtime.calibrate(0, call(q, k, v, first, memory, first), plain[:, :, :first])]
    for until in range(first + 1, rows):
        found.append(runtime.calibrate(0, call(q, k, v, 1, memory, until), plain[:, :, until - 1 : until]))
    with no_waiting():
        found.append(runtime.calibrate(0, call(q, k, v, 1, memory), plain[:, :, rows - 1 :]))
    return torch.cat(found, 2).cpu(), [x.sums.cpu() for sample in memory for x in sample.values()]


def test_act_decodes_on_a_gpu_as_on_the_processor_and_never_waits():
    for a, b in zip(decoded("cuda"), decoded("cpu")):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
