"""The HTML page: self-contained, escaped, and its numbers are those of summary.json."""

import io
import itertools
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from miniatures import MINIATURES, text_inputs

from infer_patch import Plan
from infer_patch.evals import results
from infer_patch.evals.compare import Settings, compare
from infer_patch.evals.prompts import Prompt
from infer_patch.patches import Envelope, SinkWindow
from infer_patch.report import page, plots, tables

EVIL = "<script>alert('x')</script> & \"quotes\""


class Scripts:
    """A tokenizer whose every word is an attack."""

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(f"<script>w{i}</script>" for i in ids)


class Tags(HTMLParser):
    """Start tags with their attributes, and the exact values behind the shown ones."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    mini = MINIATURES["llama"]
    plans = [
        Plan((SinkWindow(window=64, evict=True),), "evict"),
        Plan((Envelope(budget=1024),), f"lazy {EVIL}"),
        Plan(),
    ]
    prompts = [Prompt(EVIL * 40, f"{n} {EVIL}", answer="w5", inputs=text_inputs(mini, (n,))) for n in (300, 200)]
    out = tmp_path_factory.mktemp("result")
    settings = Settings(max_new_tokens=4, rounds=1, warm_up=False)
    compare(mini.build(), Scripts(), plans, prompts, settings, out=out, title=EVIL, command=f"x {EVIL}")
    return out


@pytest.fixture(scope="module")
def html(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def test_nothing_of_a_model_or_user_becomes_markup(html):
    tags = [tag for tag, _ in Tags(html).tags]
    assert "script" not in tags and "&lt;script&gt;w" in html and "&lt;script&gt;alert" in html
    assert not any(name.startswith("on") for _, attrs in Tags(html).tags for name in attrs)


def test_nothing_is_loaded(html):
    for _tag, attrs in Tags(html).tags:
        assert not {"src", "href", "xlink:href", "srcset", "data"} & set(attrs)
    assert not re.search(r"https?://|@import|url\(", html)
    assert "link" not in {tag for tag, _ in Tags(html).tags}


def test_numbers_are_those_of_the_summary(folder, html):
    _, summary, _ = results.read(folder)
    shown = {}
    for text in re.split(r"(?=<tr)", html):
        if name := re.match(r'<tr class="\w+" data-row="([^"]*)"', text):
            shown[name[1].split("&")[0].strip()] = [float(v) for v in re.findall(r'<data value="([^"]+)"', text)]
    assert len(shown) == len(summary["rows"])
    for row in summary["rows"]:
        values = shown[row["name"].split("<")[0].strip()]
        expected = [row[key]["count"] for key in ("found", "identical") if row[key]]
        drift = row["drift"] or {}
        expected += [drift[key] for key in ("kl_mean", "kl_p99", "top1", "max_logit_gap") if drift]
        for cost in row["cost"][:1]:
            for kind in ("first_token", "per_token"):
                expected.append(cost[f"{kind}_s"]["median"])
                expected += [cost[f"{kind}_ratio"]] if cost[f"{kind}_ratio"] is not None else []
            expected += [cost["peak_bytes"]["median"]] if cost["peak_bytes"] else []
            expected.append(cost["cache_bytes"])
        assert values == expected, row["name"]


def test_it_can_be_read_without_a_mouse_or_eyes(html):
    parsed = Tags(html).tags
    assert ("html", {"lang": "en"}) in parsed
    assert all("scope" in attrs for tag, attrs in parsed if tag == "th")
    assert all(attrs.get("aria-label") for tag, attrs in parsed if tag == "svg")
    levels = [int(tag[1]) for tag, _ in parsed if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    ids = [attrs["id"] for _, attrs in parsed if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_verdicts_plans_and_failure_are_told(folder, html):
    _, summary, _ = results.read(folder)
    assert "never took effect" in html and 'class="badge failed">failed' in html
    assert "method: sink_window" in html and "<mark>" in html
    assert [cost["prompt_tokens"] for cost in summary["rows"][0]["cost"]] == [300, 200]
    assert "Cost at every prompt length" in html


def test_rendered_again_it_is_the_same(folder, html):
    assert page.write_page(folder).read_text(encoding="utf-8") == html


def test_without_matplotlib_there_are_tables(folder, monkeypatch):
    monkeypatch.setattr(plots, "is_available", lambda name: False)
    text = page.render(*results.read(folder))
    assert "<svg" not in text and "infer_patch[report]" in text and "The same as a table" in text


def test_long_prompts_are_cut_in_the_middle():
    start, hidden, end = page.excerpt("a" * 400 + "b" * 900 + "c" * 400)
    assert (start, hidden, end) == ("a" * 400, 900, "c" * 400)
    assert page.excerpt("short") == ("short", 0, "")


def test_the_terminal_table_fits_100_columns(folder):
    from rich.console import Console

    _, summary, samples = results.read(folder)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(tables.comparison_table(summary))
    console.print(tables.verdicts(summary))
    console.print(tables.outputs(samples[:4]))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert "unpatched again" in text and "FAILED" in text and "<script>w" in text and "…" not in text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_shows_it(folder, tmp_path):
    flags = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
        --disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --window-size=400,900"""
    html, shot = folder / "report.html", tmp_path / "page.png"
    run = subprocess.run(
        ["chromium", *flags.split(), f"--user-data-dir={tmp_path}", f"--screenshot={shot}", html.resolve().as_uri()],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert run.returncode == 0 and shot.stat().st_size > 10_000
    assert "CONSOLE" not in run.stderr
