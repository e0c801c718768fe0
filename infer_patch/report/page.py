"""The result as one HTML page that needs nothing else: no network, no scripts, no fonts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infer_patch.availability import require
from infer_patch.evals.results import read, write_text
from infer_patch.evals.schema import Manifest, Sample, Summary
from infer_patch.report import formats
from infer_patch.report.kept_page import Pictures
from infer_patch.report.plots import layer_figures, svg

_EXCERPT = 400  # characters of a prompt's start and end that are shown


def render(
    manifest: Manifest, summary: Summary, samples: Sequence[Sample], files: Mapping[str, bytes] | None = None
) -> str:
    """The page as text; `files` are its pictures. Everything that a model, a file or a user wrote is escaped."""
    pages = environment()
    from markupsafe import Markup

    pages.globals.update(excerpt=excerpt)
    return pages.get_template("template.html.jinja").render(
        manifest=manifest,
        summary=summary,
        unpatched=summary["rows"][0],
        plans=[row for row in summary["rows"] if row["role"] == "plan"],
        prompts=_by_prompt(samples),
        lengths=_lengths(summary),
        proofs=_proofs(summary, Markup),
        yaml={plan["name"]: plan_yaml(plan) for plan in manifest["plans"]},
        facts=manifest_facts(manifest),
        attention=_attention(summary, files or {}),
    )


def environment() -> Any:
    """Templates of this package, with all values escaped; needs jinja2."""
    require("jinja2", "The HTML page")
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("infer_patch.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.globals.update(number=number, formats=formats)
    return pages


def number(value: Any, show: Any) -> Any:
    """A figure as people read it, with the exact value for programs: safe markup."""
    from markupsafe import Markup, escape

    if value is None:
        return escape(formats.NONE)
    return Markup('<data value="{}">{}</data>').format(value, show(value))


def write_page(folder: str | Path) -> Path:
    """Render the page of a result folder again; returns its path."""
    page = Path(folder) / "report.html"
    manifest, summary, samples = read(folder)
    names = [view["file"] for view in summary.get("attention", ()) if view["file"] is not None]
    files = {name: (Path(folder) / name).read_bytes() for name in names if (Path(folder) / name).is_file()}
    write_text(page, render(manifest, summary, samples, files))
    return page


def _attention(summary: Summary, files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """One head before and after each plan, with pictures as data URIs."""
    pictures = Pictures()
    return [{**view, "uri": pictures.uri(view["file"], files)} for view in summary.get("attention", ())]


def excerpt(text: str) -> tuple[str, int, str]:
    """Start and end of a long text, and the number of characters between them."""
    hidden = len(text) - 2 * _EXCERPT
    if hidden <= _EXCERPT // 2:
        return text, 0, ""
    return text[:_EXCERPT], hidden, text[-_EXCERPT:]


def _by_prompt(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples of each prompt, in the order of the run: the unpatched one first."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample["prompt"], []).append(sample)
    return list(groups.values())


def _lengths(summary: Summary) -> list[int]:
    """Prompt lengths that costs were measured at, longest first."""
    return [cost["prompt_tokens"] for cost in summary["rows"][0]["cost"]]


def _proofs(summary: Summary, safe: Any) -> list[dict[str, Any]]:
    """What each method of each plan did, with plots as ready-made markup."""
    proofs = []
    for row in summary["rows"]:
        for effect in row["effect"]:
            figures = [
                {"title": f.title, "unit": f.unit, "values": f.values, "svg": _safe_svg(f, safe)}
                for f in layer_figures(effect["figures"])
            ]
            proofs.append({"plan": row["name"], "status": row["status"], **effect, "plots": figures})
    return proofs


def _safe_svg(figure: Any, safe: Any) -> Any:
    drawn = svg(figure)  # holds numbers and this package's own words only
    return None if drawn is None else safe(drawn)


def plan_yaml(plan: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(plan, sort_keys=False)


def manifest_facts(manifest: Manifest) -> list[tuple[str, str]]:
    """The manifest's lines for people; everything is in manifest.json."""
    model, machine = manifest["model"], manifest["machine"]
    memory = f"{machine['memory_gib']} GiB" if machine.get("memory_gib") else "unknown"
    facts = {
        "Model": f"{model['id']}: {model['type']}, {model['layers']} layers, {model['parameters']:,} parameters",
        "Precision": f"{model['dtype']}, {formats.megabytes(model['weights_bytes'])} of weights",
        "Attention": f"{model['attention']} on {model['device']}",
        "Processor": f"{machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} threads, {memory} memory",
        "GPU": ", ".join(machine["gpus"]) or "none",
        "Versions": ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        "Started": manifest["started"],
        "Took": "unknown" if manifest["seconds"] is None else f"{manifest['seconds']:,.0f} s",
        "Seed": str(manifest["seed"]),
        "Settings": ", ".join(f"{name} {value}" for name, value in manifest["settings"].items()),
        "Command": manifest["command"] or "called from Python",
        "Git": manifest["git"] or "no repository",
    }
    return list(facts.items())
