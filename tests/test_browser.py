"""The page of an evaluation in a real browser: nothing fails to load, plots show, it fits a phone and a keyboard."""

import json
import re
import shutil
import subprocess

import pytest
from PIL import Image
from test_evaluate import NARROW, WIDE
from test_kept_tokens import run as look_at_pictures
from typer.testing import CliRunner

from infer_patch.evals.compare import Settings, compare
from infer_patch.evals.evaluate import evaluate
from infer_patch.evals.needle import NeedleGrid
from infer_patch.patches import RetrievalHeads
from infer_patch.plan import Plan

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>
addEventListener("error", e => { document.title = "broken: " + e.message; }, true);
addEventListener("load", () => {
  const page = document.documentElement, seen = new Set();
  const controls = [...document.querySelectorAll("summary, a[href], [tabindex='0']")];
  const reach = controls.filter(e => (e.focus(), document.activeElement === e));
  const scrolled = [...document.querySelectorAll("*")].filter(e => e.scrollWidth > e.clientWidth + 1
    && ["auto", "scroll"].includes(getComputedStyle(e).overflowX));
  document.body.dataset.probe = JSON.stringify({
    fits: page.scrollWidth <= innerWidth, width: innerWidth, svgs: document.querySelectorAll("svg").length,
    drawn: [...document.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().height > 20).length,
    images: document.images.length, labelled: [...document.querySelectorAll("svg")].filter(s => s.ariaLabel).length,
    seen: [...document.images].filter(i => i.complete && i.naturalWidth > 100 && i.width > 100 && i.alt).length,
    rows: document.querySelectorAll("tbody tr").length, focusable: reach.length,
    unreachable: scrolled.filter(e => e.tabIndex < 0).length,
    requests: performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length });
});
</script>"""


@pytest.fixture(scope="module")
def page(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "result"
    task = NeedleGrid(lengths=(700, 900), depths=(0.0, 0.5, 1.0), max_new_tokens=4)
    return evaluate(*tiny, task, [NARROW, WIDE], out=out).page


def probe(page, tmp_path, width):
    text = page.read_text("utf-8").replace("</head>", PROBE + "</head>")
    (tmp_path / "probed.html").write_text(text, "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={width},900"]
    command = [
        BROWSER,
        *flags,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        f"file://{tmp_path}/probed.html",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'data-probe="([^"]*)"', ran.stdout)
    assert found, ran.stderr[-2000:]
    assert "<title>broken" not in ran.stdout
    return json.loads(found[1].replace("&quot;", '"')), [line for line in ran.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 500])  # headless Chromium opens no window narrower than 500 px
def test_the_page_in_a_browser(page, tmp_path, width):
    found, console = probe(page, tmp_path, width)
    assert not console
    assert found["requests"] == 0
    assert found["fits"], found
    # a heat map each, two differences, quality against time, five strips of shares per layer
    assert found["svgs"] == found["drawn"] == found["labelled"] == 11
    assert found["rows"] >= 4 and found["focusable"] >= 5 and found["unreachable"] == 0


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 500])
def test_kept_tokens_in_a_browser(tmp_path, width):
    found, console = probe(look_at_pictures(tmp_path / "result").page, tmp_path, width)
    assert not console and found["fits"], (console, found)
    assert found["images"] == found["seen"] == 9  # three examples: the picture, and under two plans
    assert found["svgs"] == found["drawn"] == found["labelled"] >= 3  # shares per layer
    assert found["requests"] == 0 and found["unreachable"] == 0


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 500])
def test_attention_before_and_after_in_a_browser(tiny, tmp_path, width):
    settings = Settings(max_new_tokens=2, rounds=1, warm_up=False, attention=(1, 2))
    masked = Plan((RetrievalHeads(heads=("1-2",), phase="all"),), name="masked")
    found = compare(*tiny, [masked, "identity"], ["One word, and another. " * 6], settings, out=tmp_path / "result")
    shown, console = probe(found.page, tmp_path, width)
    assert not console and shown["fits"], (console, shown)
    assert shown["images"] == 2 and shown["seen"] >= 1  # the second is folded
    assert shown["requests"] == 0 and shown["unreachable"] == 0


@pytest.fixture(scope="module")
def sinks_page(tmp_path_factory):
    from infer_patch.cli import app

    out = tmp_path_factory.mktemp("sinks") / "sinks.html"
    picture = out.with_name("picture.png")
    Image.radial_gradient("L").convert("RGB").save(picture)
    asked = ["demo-vlm", "--image", str(picture), "--prompt", "What is there in this picture? Name it."]
    ran = CliRunner().invoke(app, ["report", "sinks", *asked, "--threshold", "0.02", "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    return out


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 500])
def test_sinks_in_a_browser(sinks_page, tmp_path, width):
    found, console = probe(sinks_page, tmp_path, width)
    assert not console and found["fits"], (console, found)
    assert found["images"] == found["seen"] == 2  # the overlay, and the map of heads
    assert found["rows"] >= 5 and found["requests"] == 0 and found["unreachable"] == 0


def test_the_page_names_nothing_outside_itself(page):
    text = page.read_text("utf-8")
    assert not re.search(r'(src|href)="?(https?:|//)', text) and "<script" not in text
    assert len(text) < 3_000_000
