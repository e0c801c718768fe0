"""Registers, spills and shared memory of the Triton kernels, compiled ahead of time: no GPU is needed.

    python benchmarks/kernel_resources.py            compile, write results/kernel-resources.json and docs/kernels.md
    python benchmarks/kernel_resources.py --check    compile nothing: does the table match the result file?

Says which sizes cannot work or must be slow. It says nothing about time, which only a GPU can tell.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "kernel-resources.json"
PAGE = ROOT / "docs" / "kernels.md"
SHARED = {80: 166912, 86: 101376, 90: 232448}  # bytes a program may use, by compute capability
REGISTERS = 65536  # of a multiprocessor
BEGIN, END = "<!-- table: made by benchmarks/kernel_resources.py -->\n", "<!-- end of table -->\n"
_SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_FP32 = {f"{name}_ptr" for name in ("lse", "lses", "parts", "score", "sums", "mass", "old", "found", "p", "factor")}
_INT64 = {"idx_ptr", "count_ptr", "rows_ptr", "probe_ptr", "position_ptr"}
_SCALARS = dict.fromkeys(("scale", "slack", "beta", "limit", "threshold", "portion", "least_mass", "move"), "fp32")
_PACKED = {  # types of pointers in packed groups, whatever the dtype of the model
    **{f"{name}_ptr": "fp16" for name in ("k_step", "k_low", "v_step", "v_low", "channel")},
    "valid_ptr": "i32",
    "visible_ptr": "u8",
}
_ALIGNED = re.compile(r"(q|k|v|c|h|out)_(batch|head|row|split)$")


@dataclass(frozen=True)
class Case:
    """One kernel in one size. `matrix`: it multiplies matrices, so `mma` must stand in its code."""

    kernel: Any
    tile: str
    size: int
    dtype: torch.dtype
    constants: dict[str, Any]
    options: dict[str, int]
    matrix: bool = True
    wide_out: bool = False  # writes fp32, to be merged
    types: Mapping[str, str] = field(default_factory=dict)  # of pointers that are not of `dtype`

    @property
    def name(self) -> str:
        return self.kernel.__name__.removesuffix("_kernel")


def cases(capability: int) -> Iterator[Case]:
    """Every kernel in the sizes that models use, as launched on a GPU of this compute capability (80, 86 or 90)."""
    shared = SHARED[capability]
    bf16, fp32 = torch.bfloat16, torch.float32
    # head size, query heads, key heads: two heads to a tile with 32/8, one with 9/3
    for size, heads, kv_heads, dtype in [
        (64, 32, 8, bf16),
        (64, 9, 3, bf16),
        (128, 32, 8, bf16),
        (128, 8, 8, bf16),
        (256, 8, 4, bf16),
        (64, 32, 8, fp32),
        (128, 32, 8, fp32),
    ]:
        yield _prefill(heads, kv_heads, size, dtype, shared)
    for size, dtype in [(64, bf16), (128, bf16), (256, bf16), (128, fp32)]:
        yield _decode(32, 8, 1, size, dtype, shared)
    yield _decode(32, 8, 16, 128, bf16, shared)  # drafts of 16 tokens
    for size in (64, 128):
        yield _merge(size)
        yield _envelope(4, size)
    # envelopes of one key and every 4th query, as in prefill; of 4 keys and the newest query, as in decode
    for size, block, stride, queries, dtype in [
        (64, 1, 4, 64, bf16),
        (128, 1, 4, 64, bf16),
        (128, 4, 4, 1, bf16),
        (128, 16, 1, 64, bf16),
        (256, 1, 4, 64, bf16),
        (128, 1, 4, 64, fp32),
    ]:
        yield from _scores(size, block, stride, queries, dtype, shared)
    # one query of 32/8 heads in 16 rows; 9 new tokens in 36 rows, 32 a tile; 16 bits is also the full-precision tail
    for size, dtype, queries, widths in [
        (64, bf16, 1, (2, 4, 16)),
        (128, bf16, 1, (2, 4, 8, 16)),
        (128, bf16, 9, (2, 4, 16)),
        (256, bf16, 1, (2, 4, 16)),
        (128, fp32, 1, (2, 4, 16)),
    ]:
        for bits in widths:
            yield _packed_decode(bits, queries, size, dtype, shared)
    yield _packed_decode(4, 1, 128, bf16, shared, value_bits=2)
    yield _packed_merge(128)
    for size, bits in [(64, 2), (64, 4), (128, 2), (128, 4), (128, 8), (256, 8)]:
        yield _quantise(bits, size)
    for size, dtype in [(64, bf16), (128, bf16), (256, bf16), (128, fp32)]:
        yield from _probes(size, dtype, shared)
    for size, dtype in [(64, bf16), (128, bf16), (256, bf16), (128, fp32)]:
        yield from _calibrated(8, size, dtype)
    # 32/8 heads: the last row, a draft of 8, a prompt
    for size, dtype, queries in [
        (64, bf16, 1),
        (64, bf16, 512),
        (128, bf16, 1),
        (128, bf16, 8),
        (128, bf16, 512),
        (256, bf16, 1),
        (256, bf16, 512),
        (64, fp32, 512),
        (128, fp32, 512),
    ]:
        yield _shift(queries, size, dtype)
    for size, dtype in [(64, bf16), (128, bf16), (256, bf16), (128, fp32)]:
        yield from _running(8, size, dtype)


def _prefill(heads: int, kv_heads: int, size: int, dtype: torch.dtype, shared: int) -> Case:
    from infer_patch.kernels import block_sparse_prefill_triton as module

    constants, options = module.constants(heads, kv_heads, kv_heads, 64, 64, size, size, dtype, shared)
    tile = f"{constants['STACK']} x {constants['TILE_Q']} rows, {constants['TILE_K']} keys"
    return Case(module.prefill_kernel, tile, size, dtype, constants, options)


def _decode(heads: int, kv_heads: int, queries: int, size: int, dtype: torch.dtype, shared: int) -> Case:
    from infer_patch.kernels import block_sparse_decode_triton as module

    constants, options = module.constants(heads, kv_heads, kv_heads, queries, 8, 64, 64, size, size, dtype, shared)
    tile = f"{constants['ROWS']} rows, {constants['TILE_K']} keys"
    return Case(module.decode_kernel, tile, size, dtype, constants, options, wide_out=True)


def _merge(size: int) -> Case:
    from infer_patch.kernels.block_sparse_decode_triton import OPTIONS, merge_kernel

    constants = {"HEADS": 32, "SIZE_V": size, "PAD_V": size, "LSE": False}
    return Case(merge_kernel, "32 splits", size, torch.bfloat16, constants, {"num_warps": 4, **OPTIONS}, matrix=False)


def _envelope(block: int, size: int) -> Case:
    from infer_patch.kernels.envelope_triton import OPTIONS, envelope_kernel

    constants = {"BLOCK": block, "BLOCKS": 16, "SIZE": size, "PAD": size}
    tile = f"16 blocks of {block} keys"
    return Case(envelope_kernel, tile, size, torch.bfloat16, constants, {"num_warps": 4, **OPTIONS}, matrix=False)


def _scores(size: int, score_block: int, stride: int, queries: int, dtype: torch.dtype, shared: int) -> Iterator[Case]:
    from infer_patch.kernels import envelope_triton as module

    samples = -(-queries // stride)
    constants, options = module.constants(
        32, 8, 64, 64 // score_block, stride, samples, size, dtype, shared, half=score_block > 1
    )
    tile = f"{constants['ROWS']} rows, {constants['COLUMNS']} blocks of {score_block}"
    yield Case(module.row_sums_kernel, tile, size, dtype, constants, options)
    maxima = constants | {"CHUNK": 1 if queries == 1 else 8}
    yield Case(module.block_maxima_kernel, tile, size, dtype, maxima, options)


def _packed_decode(
    bits: int, queries: int, size: int, dtype: torch.dtype, shared: int, value_bits: int | None = None
) -> Case:
    from infer_patch.kernels import packed_attention_triton as module

    constants, options = module.constants(8, 4, queries, 128, bits, size, dtype, shared, value_bits)
    constants |= {"VALID": bits < 16, "VISIBLE": bits == 16}
    tile = f"{constants['ROWS']} rows, {constants['TILE']} keys in {bits} bits" + (
        f", values in {value_bits}" if value_bits else ""
    )
    types = _PACKED | ({"k_ptr": "u8", "v_ptr": "u8"} if bits < 16 else {})
    return Case(module.packed_decode_kernel, tile, size, dtype, constants, options, wide_out=True, types=types)


def _packed_merge(size: int) -> Case:
    from infer_patch.kernels.packed_attention_triton import OPTIONS, packed_merge_kernel

    constants = {"HEADS": 32, "SIZE": size, "PAD": size, "PARTS": 16}
    options = {"num_warps": 4, **OPTIONS}
    return Case(packed_merge_kernel, "16 parts at a time", size, torch.bfloat16, constants, options, matrix=False)


def _quantise(bits: int, size: int) -> Case:
    from infer_patch.kernels import kv_pack_triton as module

    constants, options = module.constants(8, 128, bits, size)
    types = _PACKED | {"k_codes_ptr": "u8", "v_codes_ptr": "u8"}
    tile = f"a group of 128 tokens to {bits} bits"
    return Case(module.quantise_kernel, tile, size, torch.bfloat16, constants, options, matrix=False, types=types)


def _probes(size: int, dtype: torch.dtype, shared: int) -> Iterator[Case]:
    from infer_patch.kernels import probe_scores_triton as module

    constants, options = module.constants(32, 8, 128, size, dtype, shared)
    tile = f"{constants['ROWS']} rows, {constants['COLUMNS']} keys"
    yield Case(module.probe_sums_kernel, tile, size, dtype, constants, options)
    yield Case(module.probe_mass_kernel, tile, size, dtype, constants, options)


def _calibrated(heads: int, size: int, dtype: torch.dtype) -> Iterator[Case]:
    from infer_patch.kernels import calibrated_triton as module

    constants, options = module.constants(heads, size, dtype)
    types = {"kv_ptr": "i32"}
    tile = f"{constants['TILE_Q']} rows, {constants['TILE_K']} keys"
    yield Case(module.row_lse_kernel, tile, size, dtype, constants, options, types=types)
    yield Case(module.column_sums_kernel, tile, size, dtype, constants, options, types=types)
    constants, options = module.constants(heads, size, dtype, size)
    tile = f"{constants['TILE_Q']} rows, {constants['TILE_K']} listed keys"
    yield Case(module.lower_columns_kernel, tile, size, dtype, constants, options, types=types)


def _shift(queries: int, size: int, dtype: torch.dtype) -> Case:
    from infer_patch.kernels import image_shift_triton as module

    constants, options = module.constants(32, 8, queries, size, size, dtype)
    types = {"kinds_ptr": "u8", "asked_ptr": "u8", "chosen_ptr": "u8"}
    tile = f"{constants['ROWS']} rows, {constants['TILE']} listed keys"
    return Case(module.shift_to_images_kernel, tile, size, dtype, constants, options, types=types)


def _running(heads: int, size: int, dtype: torch.dtype) -> Iterator[Case]:
    from infer_patch.kernels import calibrated_row_triton as module

    constants, options = module.sizes(heads, size), {"num_warps": 4, **module.OPTIONS}
    types = {"kv_ptr": "i64", "first_ptr": "i32", "changed_ptr": "u8"}
    case = partial(Case, size=size, dtype=dtype, options=options, matrix=False, types=types)
    tile = f"{constants['TILE']} keys"
    yield case(module.row_scores_kernel, tile, constants=constants)
    if (size, dtype) == (128, torch.bfloat16):  # the same in every size and dtype
        summed = {"TILE": module.SUMMED, "SPARE_TOKEN": False}
        yield case(module.add_row_kernel, f"{module.SUMMED} keys", constants=summed)
    yield case(module.lower_row_kernel, tile, constants=constants | {"SPARE_TOKEN": False})
    merged = {name: constants[name] for name in ("HEADS", "SIZE", "PAD")}
    yield case(module.finish_row_kernel, "32 splits", constants=merged)


def compile_case(case: Case, capability: int) -> dict[str, Any]:
    """Compile and read what the binary needs; `ptx` is the code in text."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attrs = {}, {}
    for i, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            wide = name in _FP32 or (name == "out_ptr" and case.wide_out)
            usual = "i64" if name in _INT64 else "fp32" if wide else _SHORT[case.dtype]
            signature[name] = f"*{case.types.get(name, usual)}"
            attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = _SCALARS.get(name, "i32")
            if _ALIGNED.match(name):
                attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=case.constants, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=case.options)
    registers, stack = _resources(compiled.asm["cubin"])
    warps, shared = case.options["num_warps"], compiled.metadata.shared
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = SHARED[capability] // (shared + 1024)
    return {
        "kernel": case.name,
        "tile": case.tile,
        "head_size": case.size,
        "dtype": _SHORT[case.dtype],
        "warps": warps,
        "stages": case.options.get("num_stages"),
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": shared,
        "programs_per_multiprocessor": min(by_registers, by_shared, 64 // warps, 32),
        "matrix": case.matrix,
        "ptx": compiled.asm["ptx"],
    }


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of stack: where spilled registers go) of a binary."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {said!r}")
    return int(found[1]), int(found[2])


def problems(result: dict[str, Any], capability: int) -> list[str]:
    """What is wrong with a compiled kernel; empty if nothing is."""
    found = []
    if result["stack_bytes"]:
        found.append(f"spills: {result['stack_bytes']} bytes of stack")
    if result["shared_bytes"] > SHARED[capability]:
        found.append(f"{result['shared_bytes']} bytes of shared memory, {SHARED[capability]} are there")
    if result["matrix"] and not re.search(r"\b(mma|wgmma)\b", result["ptx"]):
        found.append("no tensor-core instruction")
    return found


def read_result() -> dict[str, Any]:
    return json.loads(RESULT.read_text(encoding="utf-8"))


def table(document: dict[str, Any]) -> str:
    """The result file as a Markdown table, one row a kernel and size."""
    rows: dict[tuple[str, ...], dict[int, str]] = {}
    order = list(dict.fromkeys(entry["kernel"] for entry in document["results"]))
    for entry in sorted(document["results"], key=lambda e: (order.index(e["kernel"]), e["dtype"], e["head_size"])):
        key = entry["kernel"], entry["dtype"], str(entry["head_size"]), entry["tile"]
        figures = f"{entry['registers']} / {entry['stack_bytes']} / {entry['shared_bytes']}"
        launch = f"{entry['warps']}w" + (f" {entry['stages']}s" if entry["stages"] else "")
        rows.setdefault(key, {})[entry["capability"]] = f"{figures} ({launch}, {entry['programs_per_multiprocessor']})"
    capabilities = sorted({entry["capability"] for entry in document["results"]})
    heading = ["kernel", "dtype", "D", "tile", *(f"sm_{capability}" for capability in capabilities)]
    lines = [[f"`{key[0]}`", *key[1:], *(cells.get(c, "-") for c in capabilities)] for key, cells in rows.items()]
    return f"| {' | '.join(heading)} |\n|{'---|' * len(heading)}\n" + "".join(f"| {' | '.join(x)} |\n" for x in lines)


def page_with(text: str) -> str:
    """The documentation page with `text` as its table."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return before + BEGIN + text + END + rest.split(END)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="compare the page with the result file, compile nothing")
    if parser.parse_args().check:
        text = table(read_result())
        fine = page_with(text) == PAGE.read_text(encoding="utf-8")
        print(
            "docs/kernels.md matches" if fine else "docs/kernels.md does not match its result file; run without --check"
        )
        return 0 if fine else 1
    import triton

    from infer_patch.machine import versions

    results, wrong = [], []
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for capability in SHARED:
        for case in cases(capability):
            result = compile_case(case, capability)
            found = problems(result, capability)
            wrong += found
            del result["ptx"], result["matrix"]
            results.append({"capability": capability, **result})
            print(json.dumps(results[-1]), *found, file=sys.stderr, flush=True)
    document = {
        "benchmark": "kernel_resources",
        "schema": 1,
        "started": started,
        "command": "python benchmarks/kernel_resources.py",
        "compiler": f"triton {triton.__version__}",
        "shared_limits": {f"sm_{capability}": limit for capability, limit in SHARED.items()},
        "results": results,
        "versions": versions(),
    }
    RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page_with(table(document)), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
