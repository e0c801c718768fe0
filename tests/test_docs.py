"""The documentation says what the code does: pages are complete, links lead somewhere, the example runs."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import pytest
from miniatures import MINIATURES

import infer_patch
from infer_patch import method

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").rglob("*.md")])


def test_the_example_method_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "adding-a-method.md").read_text()
    file = tmp_path / "strided_example.py"
    file.write_text("\n\n".join(re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)))
    monkeypatch.setattr(method, "_REGISTRY", dict(method._REGISTRY))
    monkeypatch.setenv("INFER_PATCH_DEBUG", "1")
    spec = importlib.util.spec_from_file_location("strided_example", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "strided_example", module)
    spec.loader.exec_module(module)
    assert infer_patch.Plan.from_yaml("methods: [{method: strided, every: 3}]").methods == (module.Strided(every=3),)
    said = f"read {share(module.report):.0%} of the causal key blocks in 2 layers"
    assert said in str(module.report) and said in page


def share(report):
    figures = report.methods["strided"]
    return figures["blocks_read"] / figures["blocks_causal"]


@pytest.mark.parametrize("name", infer_patch.methods())
def test_every_method_has_a_page_with_all_its_options(name):
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", page, re.MULTILINE))
    fields = {f.name: f for f in dataclasses.fields(infer_patch.methods()[name])}
    assert set(rows) == set(fields)
    for option, default in rows.items():
        assert default == repr(fields[option].default).replace("'", '"'), option


def test_the_readme_lists_the_methods_there_are():
    rows = re.findall(r"^\| \[`(\w+)`\]\(docs/methods/\w+\.md\) .*\|$", read("README.md"), re.MULTILINE)
    assert sorted(rows) == list(infer_patch.methods())


def test_the_readme_names_every_tested_family():
    table = read("README.md").split("## Models")[1].split("\n## ")[0]
    named = re.sub(r"[^a-z0-9]", "", table.lower())
    for mini in MINIATURES.values():
        words = mini.name.replace("_", ""), mini.model_type.replace("_", "") or mini.name
        assert any(word in named for word in words), mini.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
        if target != "docs/images/demo.png":  # made by `make demo`
            assert (page.parent / target).exists(), target


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= 150


def read(name):
    return (ROOT / name).read_text()
