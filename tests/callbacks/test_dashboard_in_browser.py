"""TensorBoard's own pages, from its server and in a real browser: AdamW, which has collapsed, beside StoSignSGD."""

import json
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import pytest
from browser import browser, needs_browser  # noqa: F401
from callbacks.fits import Regression, fit
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from lightning_stosign import OptimizerDashboard, OptimizerStateMonitor

# TensorBoard's elements hide in shadow roots and, for some plugins, in frames.
EVERYTHING = """
(function walk(root) {
  let found = [];
  for (const element of root.querySelectorAll('*')) {
    found.push(element);
    if (element.shadowRoot) found = found.concat(walk(element.shadowRoot));
    if (element.tagName === 'IFRAME' && element.contentDocument) found = found.concat(walk(element.contentDocument));
  }
  return found;
})(document)
"""
TEXT = f"{EVERYTHING}.flatMap(e => Array.from(e.childNodes)).filter(n => n.nodeType === 3).map(n => n.data).join(' ')"
LOADED_IMAGES = f"{EVERYTHING}.filter(e => e.tagName === 'IMG' && e.complete && e.naturalWidth > 300).length"


def _has_read(url):
    """Whether the server answers and has found the figures of both runs."""
    try:
        with urllib.request.urlopen(f"{url}/data/plugin/images/tags") as answer:
            return sum("optimizer_state/magnitudes" in tags for tags in json.load(answer).values()) == 2
    except OSError:
        return False


@pytest.fixture(scope="module", params=["false", "auto"])  # "auto" is the fast loader, where it is installed
def tensorboard(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("adamw", "stosign"):
        callbacks = [OptimizerDashboard(every_n_steps=1), OptimizerStateMonitor(every_n_steps=1)]
        # The squares of such gradients are 0 in float32.
        fit(Regression(name, scale=lambda step: 1e-30), folder / name, max_steps=12, callbacks=callbacks)
    port = find_free_network_port()
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tensorboard.main",
            f"--logdir={folder}",
            f"--port={port}",
            f"--load_fast={request.param}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://localhost:{port}"
    end = time.monotonic() + 120
    while not _has_read(url):
        assert server.poll() is None and time.monotonic() < end
        time.sleep(0.5)
    yield url
    server.terminate()
    server.wait()


def get(url, **query):
    with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(query)}") as answer:
        return json.load(answer)


@pytest.mark.slow
def test_tensorboard_groups_the_global_tags_before_those_of_layers_and_describes_each(tensorboard):
    tags = get(f"{tensorboard}/data/plugin/scalars/tags")["adamw"]
    groups = sorted({tag.partition("/")[0] for tag in tags if "/" in tag})
    assert groups[0] == "optimizer_state" and all(group.startswith("per_layer_") for group in groups[1:])
    global_tags = [tag for tag in tags if tag.startswith("optimizer_state/")]
    assert 20 <= len(global_tags) <= 30
    assert all(tags[tag]["description"] for tag in tags if "/" in tag)
    histograms = get(f"{tensorboard}/data/plugin/histograms/tags")["adamw"]
    assert "log10" in histograms["optimizer_state/log10_abs/exp_avg"]["description"]


@pytest.mark.slow
def test_the_first_charts_of_the_panels_show_the_collapse_of_one_run_beside_the_other(tensorboard):
    layout = get(f"{tensorboard}/data/plugin/custom_scalars/layout")
    first, *_ = layout["category"]
    titles = [chart["title"] for chart in first["chart"]]
    assert titles[:2] == ["denominator: share of zeros", "coordinates that explode"]
    for chart, collapsed in zip(first["chart"][:2], ("zeros", "exploding"), strict=True):
        last = {}
        for run in ("adamw", "stosign"):
            (pattern,) = chart["multiline"]["tag"]
            found = get(f"{tensorboard}/data/plugin/custom_scalars/scalars", run=run, tag=pattern)
            (series,) = found["tag_to_events"].values()
            last[run] = series[-1][2]
        assert last["adamw"] > 0.6 and last["stosign"] < 0.4, collapsed


@needs_browser
@pytest.mark.slow
def test_tensorboard_shows_the_figures(browser, tensorboard, tmp_path):  # noqa: F811
    browser.open(f"{tensorboard}/?darkMode=false#images")
    # magnitudes and two heat maps of each run; groups of one tag prefix are open
    browser.wait_until(f"{LOADED_IMAGES} >= 2", seconds=90)
    text = browser.evaluate(TEXT)
    assert "magnitudes" in text and "zeros_by_layer" in text
    browser.screenshot(tmp_path / "images.png")


@needs_browser
@pytest.mark.slow
def test_tensorboard_lays_out_the_panels(browser, tensorboard, tmp_path):  # noqa: F811
    browser.open("about:blank")
    browser.open(f"{tensorboard}/?darkMode=false#custom_scalars")
    browser.wait_until(f"{TEXT}.includes('AdamW and StoSignSGD')", seconds=90)
    browser.wait_until(f"{TEXT}.includes('denominator: share of zeros')")
    # a chart has drawn both runs
    browser.wait_until(f"{EVERYTHING}.some(e => e.tagName.toLowerCase() === 'vz-line-chart2')")
    text = browser.evaluate(TEXT)
    assert "coordinates that explode" in text and "Layer by layer" in text
    browser.screenshot(tmp_path / "custom_scalars.png")


@needs_browser
@pytest.mark.slow
def test_the_first_screenful_shows_the_collapse(browser, tensorboard, tmp_path):  # noqa: F811
    browser.emulate(width=1280, height=800, dark=False)
    try:
        browser.open("about:blank")
        browser.open(f"{tensorboard}/?darkMode=false#custom_scalars")
        seen = f"{EVERYTHING}.filter(e => (r => r.height > 0 && r.top < window.innerHeight)(e.getBoundingClientRect()))"
        browser.wait_until(f"{seen}.filter(e => e.tagName.toLowerCase() === 'vz-line-chart2').length >= 2", seconds=90)
        for title in ("denominator: share of zeros", "coordinates that explode"):
            browser.wait_until(f"{seen}.some(e => e.children.length === 0 && e.textContent.includes('{title}'))")
        browser.screenshot(tmp_path / "first_screenful.png")
    finally:
        browser.emulate(width=1200, height=1600, dark=False)
