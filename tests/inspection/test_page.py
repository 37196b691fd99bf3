import base64
import hashlib
import html.parser
import re

import pytest
import torch
from browser import browser, needs_browser  # noqa: F401
from callbacks.fits import Regression
from inspection.checkpoints import lightning_file, save

from lightning_stosign.inspection import inspect_checkpoint
from lightning_stosign.inspection.page import render_page

HOSTILE = [
    "<script>document.title = 'run'</script>",
    "<img src=x onerror=\"document.title = 'run'\">",
    "</style></table><h1>injected</h1>",
    "http://example.com/$\\frac{1$ &amp;",
    "Gewichte.Ω\x1b[31m",
]


class _Elements(html.parser.HTMLParser):
    """Every tag with its attributes; complains of one that is not closed in order."""

    def __init__(self, page):
        super().__init__()
        self.found, self._open = [], []
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    save(folder / "x.ckpt", Regression("adamw"))
    return render_page([inspect_checkpoint(folder / "x.ckpt", histograms=True)])


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "x.ckpt"
    params = [torch.nn.Parameter(torch.ones(i + 1)) for i in range(len(HOSTILE))]
    optimizer = torch.optim.Adam(params)
    for param in params:
        param.grad = torch.ones_like(param)
        param.grad[0] = 0.0
    optimizer.step()
    lightning_file(
        path,
        state_dict=dict(zip(HOSTILE, params, strict=True)),
        optimizer_states=[optimizer.state_dict()],
        **{"pytorch-lightning_version": HOSTILE[0]},
    )
    return render_page([inspect_checkpoint(path, histograms=True)])


def test_the_page_holds_everything_itself(page):
    elements = _Elements(page).found
    assert {tag for tag, _ in elements}.isdisjoint({"link", "iframe", "object", "a", "img"})
    assert [tag for tag, _ in elements].count("script") == 1
    figures = [attributes for tag, attributes in elements if tag == "svg"]
    assert [figure["aria-label"] for figure in figures][:2] == ["exp_avg: 19.5% is 0", "exp_avg_sq: 19.5% is 0"]
    assert len(figures) == 3
    assert not re.search(r"https?:|url\(|@import", page)


def test_every_layer_and_state_has_its_row(page):
    for text in ("first.weight", "head.bias", "exp_avg_sq", "all layers", "lost in fp8-raw", "AdamW at lr 0.01"):
        assert text in page


def rows_of_heat_map(page):
    return {
        label.partition(",")[0] for label in re.findall(r"<title>([^<]*)</title></rect>", page) if ": zero:" in label
    }


def test_the_heat_map_leaves_out_layers_that_can_lose_nothing(page, tmp_path):
    assert rows_of_heat_map(page) == {"first.weight"}  # it has zeros; none has min_numel=4096 values
    assert "3 parameters without zeros are too small to be stored in these formats" in page
    save(tmp_path / "x.ckpt", Regression("adamw"))
    every = render_page([inspect_checkpoint(tmp_path / "x.ckpt", ["fp8", "fp8-raw:min_numel=0"])])
    assert rows_of_heat_map(every) == {"first.weight", "first.bias", "head.weight", "head.bias"}
    assert "too small" not in every


def test_names_in_the_file_are_text(hostile_page):
    tags = [tag for tag, _ in _Elements(hostile_page).found]
    assert (tags.count("img"), tags.count("h1"), tags.count("script")) == (0, 1, 1)
    assert "&lt;script&gt;" in hostile_page
    assert "\x1b" not in hostile_page


def test_the_script_that_runs_is_the_one_that_the_policy_names(page):
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page


@needs_browser
@pytest.mark.parametrize("which", ["page", "hostile_page"])
def test_a_browser_shows_the_page(browser, request, tmp_path, which):  # noqa: F811
    (tmp_path / "page.html").write_text(request.getfixturevalue(which), encoding="utf-8")
    browser.requests.clear()
    browser.open(f"file://{tmp_path}/page.html")
    figures = "Array.from(document.querySelectorAll('svg'))"
    assert browser.evaluate(f"{figures}.length") == 3
    assert browser.evaluate(f"{figures}.every(figure => figure.getBoundingClientRect().width > 300)")
    assert "all layers" in browser.evaluate("document.body.innerText")
    assert browser.evaluate("document.title").startswith("x.ckpt: ")
    assert browser.evaluate("document.scrollingElement.scrollWidth <= window.innerWidth")
    assert {request.partition(":")[0] for request in browser.requests} == {"file"}
    assert browser.complaints == []


@needs_browser
def test_a_click_on_a_heading_sorts_the_table(browser, page, tmp_path):  # noqa: F811
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    browser.open(f"file://{tmp_path}/page.html")
    column = "Array.from(document.querySelectorAll('table')[1].tBodies[0].rows).map(row => row.cells[{}].textContent)"
    heading = "document.querySelectorAll('table')[1].querySelectorAll('th button')[{}].click()"
    browser.evaluate(heading.format(2))
    assert browser.evaluate(column.format(2)) == ["24", "24", "8", "8", "8", "8", "1", "1"]
    browser.evaluate(heading.format(2))
    assert browser.evaluate(column.format(2)) == ["1", "1", "8", "8", "8", "8", "24", "24"]
    browser.evaluate(heading.format(5))
    values = [float(text) for text in browser.evaluate(column.format(5))]
    assert values == sorted(values, reverse=True)


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_is_readable_on_a_phone_in_light_and_dark(browser, page, tmp_path, dark):  # noqa: F811
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    browser.emulate(width=375, height=700, dark=dark)
    try:
        browser.open(f"file://{tmp_path}/page.html")
        assert browser.evaluate("document.scrollingElement.scrollWidth <= window.innerWidth")
        style = "getComputedStyle({}).{}.match(/\\d+/g).slice(0, 3).map(Number)"
        ink, paper = (
            sum(browser.evaluate(style.format("document.body", what))) / 3 for what in ("color", "backgroundColor")
        )
        letters = sum(browser.evaluate(style.format("document.querySelector('svg text')", "fill"))) / 3
        assert (ink > paper) == dark and abs(ink - paper) > 150
        assert (letters > paper) == dark and abs(letters - paper) > 150
    finally:
        browser.emulate(width=1200, height=1600, dark=False)


@needs_browser
def test_a_page_of_several_checkpoints_has_plots_over_steps(browser, tmp_path):  # noqa: F811
    reports = [
        inspect_checkpoint(lightning_file(tmp_path / f"{step}.ckpt", global_step=step), histograms=True)
        for step in (3, 20, 100)
    ]
    (tmp_path / "page.html").write_text(render_page(reports), encoding="utf-8")
    browser.open(f"file://{tmp_path}/page.html")
    plots = "Array.from(document.querySelectorAll('svg')).filter(x => x.querySelector('polyline'))"
    assert browser.evaluate(f"{plots}.map(x => x.getAttribute('aria-label'))")[:2] == [
        "Share of zeros over steps",
        "Root mean square over steps",
    ]
    assert browser.evaluate(f"{plots}[1].querySelectorAll('polyline').length") == 2
    assert browser.evaluate(f"{plots}[1].querySelector('polyline').points.length") == 3
    assert browser.complaints == []
