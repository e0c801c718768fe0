"""The result of an evaluation as one HTML page that needs nothing else: no network, no scripts, no fonts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from infer_patch.errors import PatchError
from infer_patch.evals.eval_schema import EvalSample, EvalSummary
from infer_patch.evals.results import read_files, write_text
from infer_patch.evals.schema import Manifest
from infer_patch.evals.summary import UNPATCHED
from infer_patch.report import eval_tables
from infer_patch.report.eval_plots import heat_map, pareto
from infer_patch.report.kept_page import Pictures, kept_examples, legends
from infer_patch.report.layer_shares import layer_strips, svg
from infer_patch.report.page import environment, manifest_facts, plan_yaml

Run = tuple[Manifest, EvalSummary, Sequence[EvalSample], Mapping[str, bytes]]


def render_eval(
    manifest: Manifest, summary: EvalSummary, samples: Sequence[EvalSample], pictures: Mapping[str, bytes]
) -> str:
    """The page of one evaluation as text. Everything that a model, a file or a user wrote is escaped.

    `pictures` are the files that `summary` names in its examples; one that is missing is left out.
    """
    return render_runs([(manifest, summary, samples, pictures)])


def render_runs(runs: Sequence[Run]) -> str:
    """Several evaluations on one page, with an overview in front; one of them is a page of its own."""
    pages = environment()
    from markupsafe import Markup

    pages.globals.update(tables=eval_tables, metric=_shown_as)
    part = pages.get_template("eval_run.html.jinja")
    shown, room = [], Pictures()
    for i, (manifest, summary, samples, pictures) in enumerate(runs):
        at = f"run-{i + 1}-" if len(runs) > 1 else ""
        body = Markup(part.render(at=at, **_values(manifest, summary, samples, pictures, room)))
        shown.append({"id": at + "top", "manifest": manifest, "summary": summary, "body": body})
    title = runs[0][1]["title"] if len(runs) == 1 else f"{len(runs)} evaluations"
    return pages.get_template("eval.html.jinja").render(
        runs=shown,
        title=title,
        version=runs[0][0]["machine"]["versions"]["infer_patch"],
        show=lambda name, row: eval_tables.metric(name, row["metrics"][name]),
    )


def _values(
    manifest: Manifest,
    summary: EvalSummary,
    samples: Sequence[EvalSample],
    pictures: Mapping[str, bytes],
    room: Pictures,
) -> dict[str, Any]:
    """What the template of one run asks for."""
    from markupsafe import Markup

    def safe(drawn: str | None) -> Any:
        return None if drawn is None else Markup(drawn)

    rows = summary["rows"]
    shown = eval_tables.shown_metrics(summary, 4)
    return {
        "manifest": manifest,
        "summary": summary,
        "plans": [row for row in rows if row["role"] == "plan"],
        "metrics": shown,
        "parts": [name for name in rows[0]["metrics"] if name not in shown],
        "heat": [(title, safe(drawn)) for title, drawn in _heat_maps(summary)],
        "pareto": safe(_pareto(summary)),
        "flips": _flips(summary, samples),
        "kept": kept_examples(summary, samples, pictures, room),
        "legends": legends(summary),
        "layers": manifest["model"]["layers"],
        "layer_strips": _layer_strips(manifest, summary, samples),
        "yaml": {plan["name"]: plan_yaml(plan) for plan in manifest["plans"]},
        "facts": manifest_facts(manifest),
    }


def _shown_as(name: str) -> Any:
    return lambda value: eval_tables.metric(name, value)


def read_eval(path: str | Path) -> tuple[Manifest, EvalSummary, list[EvalSample], dict[str, bytes]]:
    """Manifest, summary, samples and pictures of a finished evaluation."""
    found: Any = read_files(path)
    if "task" not in found[1]:
        raise PatchError(f"{path} holds a comparison, not an evaluation; give folders of `infer-patch eval`.")
    manifest, written, samples = found
    summary: Any = {"question_last": False, "examples": [], **written}  # keys that older results lack
    files = Path(path).glob("kept/*.*")
    return manifest, summary, samples, {f"kept/{file.name}": file.read_bytes() for file in files}


def write_eval_page(folder: str | Path) -> Path:
    """Render the page of a result folder again; returns its path."""
    page = Path(folder) / "report.html"
    write_text(page, render_eval(*read_eval(folder)))
    return page


def _heat_maps(summary: EvalSummary) -> list[tuple[str, str | None]]:
    """Unpatched; then for every plan its own map and the difference to unpatched."""
    grids, axes = summary["grids"], summary["grid_axes"]
    if grids is None or axes is None:
        return []
    base = grids[UNPATCHED]
    maps = [(UNPATCHED, heat_map(UNPATCHED, base, axes, signed=False))]
    for name, grid in grids.items():
        if name != UNPATCHED:
            change = [
                [None if a is None or b is None else b - a for a, b in zip(before, after)]
                for before, after in zip(base, grid)
            ]
            maps.append((name, heat_map(name, grid, axes, signed=False)))
            maps.append((f"{name} minus unpatched", heat_map(f"{name} minus unpatched", change, axes, signed=True)))
    return maps


def _layer_strips(
    manifest: Manifest, summary: EvalSummary, samples: Sequence[EvalSample]
) -> dict[str, list[dict[str, Any]]]:
    """By plan what there is to draw, with the drawings as ready-made markup."""
    from markupsafe import Markup

    layers, found = manifest["model"]["layers"], {}
    for row in summary["rows"]:
        strips = layer_strips([s for s in samples if s["plan"] == row["name"]], layers)
        if strips:
            found[row["name"]] = [{**vars(strip), "svg": Markup(svg(strip, layers, row["name"]))} for strip in strips]
    return found


def _pareto(summary: EvalSummary) -> str | None:
    headline = summary["headline"]
    points = []
    for row in summary["rows"]:
        ratio = row["cost"]["first_token_ratio"]
        if row["role"] == "unpatched":
            points.append((row["name"], 1.0, row["metrics"][headline]))
        elif row["role"] == "plan" and row["status"] == "ok" and ratio is not None:
            points.append((row["name"], ratio["median"], row["metrics"][headline]))
    return pareto(f"{headline} against time to first token", points, headline) if len(points) > 1 else None


def _flips(summary: EvalSummary, samples: Sequence[EvalSample]) -> dict[str, list[dict[str, Any]]]:
    """Answers that went from right to wrong or back (`won`), and for drift all that differ; by run, both outputs."""
    base = {s["item"]: s for s in samples if s["plan"] == UNPATCHED}
    found: dict[str, list[dict[str, Any]]] = {}
    for row in summary["rows"] if summary["unit"] == "share" else ():
        if row["role"] != "plan":
            continue
        rows = []
        for own in (s for s in samples if s["plan"] == row["name"]):
            before, after = base[own["item"]]["score"]["correct"], own["score"]["correct"]
            won = None if None in (before, after) or (before >= 0.5) == (after >= 0.5) else after >= 0.5
            if won is not None or own["score"].get("same_output") is False:
                what = {"item": own["item"], "reference": own["reference"], "won": won}
                rows.append({**what, "before": base[own["item"]]["output"], "after": own["output"]})
        found[row["name"]] = rows
    return found
