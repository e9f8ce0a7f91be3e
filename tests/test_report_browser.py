"""A report in headless Chromium: what a reader does with it, on a phone and a desk, by day and by night."""

import re
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from heads import head_stats, snapshot

from hnf_attention import report
from hnf_attention.diagnosis import diagnose
from hnf_attention.run_log import RunLog, RunLogWriter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]
HOSTILE = "</script><img src=x onerror=\"window.hacked=1\"><svg onload='window.hacked=1'>{{script}}"
LAYERS, HEADS, STEPS = 3, 4, 30


def log_of(path, name="", treated=False):
    """A run whose layer 1, head 2 grows from step 100 on; treated, it is clipped at step 205."""
    writer, history = RunLogWriter(path, about={"model": f"tiny{name}", "treated": treated}), []
    for number in range(1, STEPS + 1):
        layers = {}
        for layer in range(LAYERS):
            scores = np.full(HEADS, 4.0 + layer)
            if layer == 1:
                scores[2] = 5 * 1.4 ** max(number - 9, 0) if not (treated and number > 20) else 20.0
            bad = (np.arange(HEADS) == 2) * (layer == 1 and number >= 28 and not treated) * 9.0
            numbers = dict(
                max_logit=scores, nonfinite_rows=bad, nonfinite_out=bad, sink_mass=[0.1, 0.5, 0.1, 0.995]
            )
            layers[f"blocks.{layer}.attention{name}"] = head_stats(HEADS, **numbers)
        history = [*history, snapshot(10 * number, **layers)][-12:]
        writer.note(10 * number, loss=float("nan") if number >= 28 and not treated else 3.0 / number)
        writer.write(diagnose(history))
        if treated and number == 20:
            writer.event(205, "intervention", action="qk_clip", threshold=30)
    writer.close()
    return path


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    made = {
        "failed": [log_of(folder / "failed.db")],
        "hostile": [log_of(folder / "hostile.db", HOSTILE)],
        "two": [folder / "failed.db", log_of(folder / "treated.db", treated=True)],
    }
    for name, paths in made.items():
        logs = [RunLog(path) for path in paths]
        report.html(*logs, title=HOSTILE if name == "hostile" else None).save(folder / f"{name}.html")
        for log in logs:
            log.close()
    return folder


@pytest.fixture(scope="module")
def tab():
    browser = Browser()
    yield browser
    browser.close()


def open_page(tab, path, **look):
    tab.look(**look)
    tab.open(path)
    return lambda id: tab.evaluate(f"document.getElementById('{id}').textContent")


def says(tab, text):
    """Wait until the page says so of the chosen head: it does when nothing has moved for a moment."""
    tab.wait(f"document.getElementById('cell').textContent.includes({text!r})")


def is_clean(tab, path):
    assert tab.said == []
    assert tab.requests == [path.as_uri()]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1440])
@pytest.mark.parametrize("name", ["failed", "two"])
def test_a_page_fits_its_window_and_asks_for_nothing(tab, pages, name, width, dark):
    open_page(tab, pages / f"{name}.html", width=width, dark=dark)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    back = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back)[:3])) < 200) == dark
    painted = "c => new Set(new Uint32Array(c.getContext('2d').getImageData(0,0,c.width,c.height).data.buffer)).size"
    assert tab.evaluate(f"({painted})(document.getElementById('map'))") > 10
    assert tab.evaluate(f"[...document.querySelectorAll('.chart canvas')].every(c => ({painted})(c) > 5)")
    assert tab.evaluate("document.querySelectorAll('.chart canvas').length") == 3
    is_clean(tab, pages / f"{name}.html")


def test_the_verdict_is_first_and_the_map_is_at_the_failure(tab, pages):
    text = open_page(tab, pages / "failed.html")
    assert tab.evaluate("document.querySelector('main p').textContent").startswith(
        "This run failed: NaN or inf"
    )
    assert text("cell") == "1.attention head 2 at step 280: " + text("cell").partition(": ")[2]
    assert "NaN or inf" in text("cell") and text("count-nan") == "1"
    assert text("count-sink") == "3" and text("count-dormant") == "3"
    assert "no number from step 280 on" in text("loss-text")


def test_a_click_on_the_map_shows_that_head(tab, pages):
    text = open_page(tab, pages / "failed.html")
    tab.evaluate("document.getElementById('map').scrollIntoView()")
    box = "(r => [r.x, r.y])(document.getElementById('map').getBoundingClientRect())"
    left, top = tab.evaluate(box)
    image = tab.evaluate("document.getElementById('map').clientWidth")
    cell = 44  # the largest, on a wide window
    tab.click(left + image - 0.5 * cell, top + 16 + 0.5 * cell)
    tab.wait("document.getElementById('head').value === '3'")
    assert text("history-title").startswith("0.attention head 3: ")
    says(tab, "dormant")
    is_clean(tab, pages / "failed.html")


def test_keys_move_the_head_and_the_step(tab, pages):
    text = open_page(tab, pages / "failed.html")
    tab.evaluate("document.getElementById('map').focus()")
    for key in ("ArrowUp", "ArrowRight", "PageDown"):
        tab.press(key)
    says(tab, "0.attention head 3 at step 270: about ")
    assert text("cell") in tab.evaluate("document.getElementById('map').getAttribute('aria-label')")
    tab.press("Home")
    says(tab, "0.attention head 0 at step 270")


def test_the_slider_and_the_statistic_redraw_the_map(tab, pages):
    text = open_page(tab, pages / "failed.html")
    picture = "document.getElementById('map').toDataURL()"
    before = tab.evaluate(picture)
    slide = "(s => { s.value = 0; s.dispatchEvent(new Event('input')); })(document.getElementById('step'))"
    tab.evaluate(slide)
    tab.wait("document.getElementById('step-text').textContent === '10'")
    tab.wait("document.getElementById('count-nan').textContent === '0'")
    assert tab.evaluate(picture) != before
    assert tab.evaluate("document.getElementById('step').getAttribute('aria-valuetext')") == "step 10"
    before = tab.evaluate(picture)
    tab.evaluate(
        "(s => { s.value = 'sink_mass'; s.dispatchEvent(new Event('change')); })(document.getElementById('metric'))"
    )
    tab.wait("document.getElementById('history-title').textContent.includes('sink')")
    assert tab.evaluate(picture) != before
    assert "0.3: Gu et al." in text("history-sources")
    is_clean(tab, pages / "failed.html")


def test_a_chart_takes_the_map_to_a_step(tab, pages):
    text = open_page(tab, pages / "failed.html")
    tab.evaluate("document.getElementById('loss').scrollIntoView({block: 'center'})")
    box = "(r => [r.x, r.y, r.width, r.height])(document.querySelector('#history .u-over').getBoundingClientRect())"
    tab.evaluate("document.getElementById('history').scrollIntoView({block: 'center'})")
    left, top, width, height = tab.evaluate(box)
    tab.click(left + 2, top + height / 2)
    tab.wait("document.getElementById('step-text').textContent === '10'")
    assert text("history-text").startswith("step 10: ")


def test_an_issue_shows_its_story_and_its_place(tab, pages):
    open_page(tab, pages / "two.html")
    story = tab.evaluate("document.querySelector('#issues-1 details').innerText")
    assert "first sign" in story and "done: qk clip (threshold 30)" in story and "gone" in story
    assert "helped" in story and "Judged by" in story
    tab.evaluate(
        "[...document.querySelectorAll('#issues-1 button')].find(b => b.textContent === 'Show it on the map').click()"
    )
    tab.wait("document.querySelector('[name=view][value=\"1\"]').checked")
    says(tab, "1.attention head 2 at step 180")


def test_a_forecast_is_drawn_and_told(tab, tmp_path):
    """Head 1 grows as unstable heads do, and passes what was forecast of it."""
    writer, history = RunLogWriter(tmp_path / "run.db"), []
    for step in range(10, 201, 10):
        scores = np.array([4.0, (2 + 0.08 * step) ** 2, 4.0, 4.0])
        layers = {"a": head_stats(4, max_logit=scores), "b": head_stats(4, max_logit=scores)}
        history = [*history, snapshot(step, **layers)][-10:]
        writer.write(diagnose(history))
    writer.close()
    with RunLog(tmp_path / "run.db") as log:
        report.html(log, metrics=["logit_range_max"]).save(tmp_path / "page.html")
    text = open_page(tab, tmp_path / "page.html")
    told = tab.evaluate("document.querySelector('#issues-0').textContent")
    assert "in four of five cases. It came by step 1" in told and "of such runs the loss suffered" in told
    colour = tab.evaluate("getComputedStyle(document.body).getPropertyValue('--forecast')").strip()
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    drawn = (
        "(() => { const c = document.querySelector('#history canvas'); let n = 0;"
        " const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        f" for (let i = 0; i < d.length; i += 4) n += d[i] === {red} && d[i + 1] === {green} && d[i + 2] === {blue};"
        " return n; })()"
    )
    choose = (
        "(e => { e.value = HEAD; e.dispatchEvent(new Event('change')); })(document.getElementById('head'))"
    )
    for head, hidden in ((1, "false"), (3, "true")):
        tab.evaluate(choose.replace("HEAD", str(head)))
        tab.wait(f"document.getElementById('forecast-key').hidden === {hidden}")
        assert (tab.evaluate(drawn) > 20) == (head == 1)
        assert ("It came by step 1" in text("history-text")) == (head == 1)
    is_clean(tab, tmp_path / "page.html")


def test_two_runs_are_compared(tab, pages):
    text = open_page(tab, pages / "two.html")
    pictures = set()
    for view in ("0", "1", "difference"):
        tab.evaluate(f"document.querySelector('[name=view][value=\"{view}\"]').click()")
        tab.wait(f"document.querySelector('[name=view][value=\"{view}\"]').checked")
        says(tab, "treated.db: " if view == "difference" else "at step")
        tab.evaluate("new Promise(requestAnimationFrame)")
        pictures.add(tab.evaluate("document.getElementById('map').toDataURL()"))
    assert len(pictures) == 3
    assert (
        "failed.db" in text("cell")
        and "treated.db" in text("cell")
        and "treated.db higher" in text("scale-high")
    )
    rows = tab.evaluate("document.getElementById('comparison').innerText")
    assert "run.treated" in rows and "recovered" in rows
    is_clean(tab, pages / "two.html")


@pytest.mark.parametrize("width", [390, 1440])
def test_names_with_markup_never_run(tab, pages, width):
    open_page(tab, pages / "hostile.html", width=width)
    tab.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    assert tab.evaluate("window.hacked") is None
    assert tab.evaluate("document.querySelectorAll('img, svg, iframe').length") == 0
    assert HOSTILE in tab.evaluate("document.querySelector('h1').textContent")
    assert HOSTILE in tab.evaluate("document.querySelector('#issues-0').textContent")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    is_clean(tab, pages / "hostile.html")


def test_the_policy_refuses_what_a_stranger_adds(tab, pages, tmp_path):
    """A script, a handler and a request that were put into the file do nothing."""
    text = (pages / "failed.html").read_text()
    bad = "<script>window.hacked=1</script><b onclick='window.hacked=1' id=bad>x</b><img src='https://example.com/x.png'>"
    path = tmp_path / "bad.html"
    path.write_text(text.replace("<main>", f"<main>{bad}"))
    open_page(tab, path)
    tab.evaluate("document.getElementById('bad').click()")
    assert tab.evaluate("window.hacked") is None
    assert (
        len(
            [
                line
                for line in tab.said
                if "Content Security Policy" in line or "Content-Security-Policy" in line
            ]
        )
        >= 2
    )


def test_a_notebook_s_frame_runs_the_page(tab, pages, tmp_path):
    page = report.html(diagnose([snapshot(1, a={})]))
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><body data-state=ready>{page._repr_html_()}</body>")
    open_page(tab, path)
    tab.wait("document.querySelector('iframe').clientHeight > 500")
    assert tab.said == []


def test_a_printed_page_opens_its_issues_and_drops_its_controls(tab, pages):
    open_page(tab, pages / "failed.html")
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.evaluate("[...document.querySelectorAll('details.issue')].every(each => each.open)")
    tab.send("Emulation.setEmulatedMedia", media="print")
    shown = tab.evaluate("getComputedStyle(document.querySelector('.controls')).display")
    tab.send("Emulation.setEmulatedMedia", media="")
    assert shown == "none"


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    """The source of axe-core, from npm's registry."""
    folder, npm = tmp_path_factory.mktemp("axe"), shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    done = subprocess.run([npm, "pack", "axe-core@4.14.1"], cwd=folder, capture_output=True, timeout=120)
    if done.returncode:
        pytest.skip("npm's registry cannot be reached")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["failed", "two"])
@pytest.mark.parametrize("width", [390, 1440])
def test_axe_finds_no_fault(tab, pages, axe, name, dark, width):
    open_page(tab, pages / f"{name}.html", width=width, dark=dark)
    tab.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    tab.evaluate(axe)
    found = tab.evaluate("axe.run({resultTypes: ['violations']}).then(found => found.violations)")
    told = [
        (each["id"], each["impact"], [node["html"][:200] for node in each["nodes"][:3]]) for each in found
    ]
    assert told == []
