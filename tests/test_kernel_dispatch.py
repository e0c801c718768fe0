"""Which implementation of a kernel runs, and what is said where the one asked for cannot."""

import importlib
from types import SimpleNamespace

import pytest
import torch

import infer_patch.kernels
from infer_patch.kernels import dispatch
from infer_patch.kernels.block_mask import sink_window_blocks
from infer_patch.kernels.block_sparse_attention import block_sparse_attention
from infer_patch.kernels.dispatch import choose, triton_refusal
from infer_patch.kernels.envelope import block_envelope, score_key_blocks, select_blocks
from infer_patch.kernels.kv_pack import PLAIN, Groups, quantise_and_pack
from infer_patch.kernels.packed_attention import packed_attention
from infer_patch.kernels.probe_scores import probe_scores

KNOWN = ("reference", "cpu", "triton")


class OnGPU:
    """As much of a tensor on a GPU as the dispatcher looks at."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, size=64, dtype=torch.bfloat16, requires_grad=False):
        self.shape, self.dtype, self.requires_grad = (1, 1, 1, size), dtype, requires_grad


@pytest.fixture
def a100(monkeypatch):
    monkeypatch.delenv("INFER_PATCH_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "_triton_is_installed", lambda: True)
    monkeypatch.setattr(dispatch, "_capability", lambda index: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)


def test_automatic_choice(a100, monkeypatch):
    assert choose(None, KNOWN, torch.zeros(1, 1, 1, 64)) == "cpu"
    assert choose(None, KNOWN, OnGPU(), OnGPU()) == "triton"
    assert choose("cpu", KNOWN, OnGPU()) == "cpu"
    monkeypatch.setenv("INFER_PATCH_KERNELS", "reference")
    assert choose(None, KNOWN, OnGPU()) == "reference"
    assert choose("triton", KNOWN, OnGPU()) == "triton"


@pytest.mark.parametrize(
    "tensors, reason",
    [
        ([OnGPU(dtype=torch.float64)], "need one dtype of float32, bfloat16 and float16, got torch.float64"),
        ([OnGPU(), OnGPU(dtype=torch.float16)], "got torch.bfloat16, torch.float16"),
        ([OnGPU(size=320)], "head size is 320, and 256 is the largest for torch.bfloat16"),
        ([OnGPU(size=256, dtype=torch.float32)], "and 128 is the largest for torch.float32"),
        ([OnGPU(), OnGPU(requires_grad=True)], "gradients are wanted"),
    ],
)
def test_calls_the_kernels_do_not_serve(a100, tensors, reason):
    assert choose(None, KNOWN, *tensors) == "cpu"
    with pytest.raises(ValueError, match=reason):
        choose("triton", KNOWN, *tensors)


def test_gradients_count_only_where_they_are_recorded(a100):
    with torch.no_grad():
        assert choose(None, KNOWN, OnGPU(requires_grad=True)) == "triton"


def test_devices_the_kernels_do_not_run_on(a100, monkeypatch):
    assert triton_refusal("cuda:0") is None
    monkeypatch.setattr(dispatch, "_capability", lambda index: (7, 5))
    assert triton_refusal("cuda:0") == "the GPU has compute capability 7.5, and 8.0 is needed"
    assert choose(None, KNOWN, OnGPU()) == "cpu"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in triton_refusal("cuda:0")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton_refusal("cpu") == "they need an NVIDIA GPU, not cpu"
    monkeypatch.setattr(dispatch, "_triton_is_installed", lambda: False)
    assert "not installed" in triton_refusal("cuda:0") and "not installed" in triton_refusal("cpu")


def test_the_environment_reaches_every_operation(monkeypatch):
    """Asking for Triton where it cannot run is an error, not a silent torch path."""
    q, k = torch.randn(1, 2, 100, 32), torch.randn(1, 1, 200, 32)
    mask = sink_window_blocks(100, 200, 4, [2])
    envelope = block_envelope(k, 4)
    calls = [
        lambda: block_sparse_attention(q, k, k, mask),
        lambda: block_envelope(k, 4),
        lambda: select_blocks(q, k, envelope, budget=128, sinks=4, window=1, score_block=4),
        lambda: quantise_and_pack(k, k, torch.zeros(1, 1, 1, 16, dtype=torch.long), 4),
        lambda: packed_attention(q, [], k, k, 0.1),
        lambda: probe_scores(q, k, 0.1, torch.zeros(1, 100, dtype=torch.long)),
    ]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for value, complaint in [("triton", "Triton kernels cannot run"), ("cuda", "choose from reference, cpu, triton")]:
        monkeypatch.setenv("INFER_PATCH_KERNELS", value)
        for call in calls:
            with pytest.raises(ValueError, match=complaint):
                call()


def test_key_blocks_of_too_many_score_blocks(a100):
    envelope = OnGPU(), None
    with pytest.raises(ValueError, match="3 score blocks to a key block"):
        score_key_blocks(OnGPU(), envelope, 96, 48, 3, 1, 0.1, 0.2, "triton")


def test_packed_calls_that_triton_does_not_serve(a100):
    """Groups too high for one program; groups of 16 bits in another dtype than the queries."""
    with pytest.raises(ValueError, match="groups have 272 tokens, and 256 are the most"):
        quantise_and_pack(OnGPU(), OnGPU(), torch.zeros(1, 1, 1, 272, dtype=torch.long), 4, implementation="triton")
    plain = Groups(PLAIN, OnGPU(dtype=torch.float16), OnGPU(dtype=torch.float16))
    with pytest.raises(ValueError, match=r"got torch.bfloat16, torch.float16"):
        packed_attention(OnGPU(), [plain], OnGPU(), OnGPU(), 0.1, implementation="triton")


def test_packed_operations_take_triton_on_a_gpu(a100, monkeypatch):
    """By themselves, and `cpu` where asked for."""
    rows, taken = torch.zeros(1, 1, 1, 16, dtype=torch.long), []
    for module in map(importlib.import_module, ("infer_patch.kernels.kv_pack", "infer_patch.kernels.probe_scores")):
        for name in ("triton", "cpu"):
            monkeypatch.setitem(
                module.IMPLEMENTATIONS, name, lambda *_, name=name: taken.append(name) or Groups(4, rows, rows)
            )
    fake = SimpleNamespace(attention=lambda *_: taken.append("triton"))
    monkeypatch.setattr(infer_patch.kernels, "packed_attention_triton", fake, raising=False)
    packed_attention(OnGPU(), [], OnGPU(), OnGPU(), 0.1)
    for asked in (None, "cpu"):
        quantise_and_pack(OnGPU(), OnGPU(), rows, 4, implementation=asked)
        probe_scores(OnGPU(), OnGPU(), 0.1, rows, torch.zeros(1, 1), implementation=asked)
    assert taken == ["triton", "triton", "triton", "cpu", "cpu"]


@pytest.mark.parametrize("queries, keys", [(700, 700), (130, 333), (1, 700), (5, 642), (20, 20)])
@pytest.mark.parametrize("score_block, stride", [(1, 4), (16, 1), (64, 5)])
def test_the_torch_path_scores_as_the_reference_does(queries, keys, score_block, stride):
    generator = torch.Generator().manual_seed(keys)
    q = torch.randn(2, 6, queries, 32, generator=generator)
    envelope = block_envelope(torch.randn(2, 2, keys, 32, generator=generator), score_block)
    sizes = (keys, 64, 64 // score_block, stride, 0.3, 0.2)
    found, expected = (score_key_blocks(q, envelope, *sizes, implementation=name) for name in ("cpu", "reference"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
