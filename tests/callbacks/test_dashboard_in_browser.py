"""TensorBoard's own pages, in a real browser, with the figures and panels of two runs."""

import json
import subprocess
import sys
import time
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


@pytest.fixture(scope="module")
def tensorboard(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("adamw", "stosign"):
        callbacks = [OptimizerDashboard(every_n_steps=1), OptimizerStateMonitor(every_n_steps=1)]
        fit(Regression(name), folder / name, max_steps=12, callbacks=callbacks)
    port = find_free_network_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", f"--logdir={folder}", f"--port={port}", "--load_fast=false"],
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
