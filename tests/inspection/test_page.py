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
    return render_page(inspect_checkpoint(folder / "x.ckpt"))


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "x.ckpt"
    params = [torch.nn.Parameter(torch.ones(i + 1)) for i in range(len(HOSTILE))]
    optimizer = torch.optim.Adam(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    lightning_file(
        path,
        state_dict=dict(zip(HOSTILE, params, strict=True)),
        optimizer_states=[optimizer.state_dict()],
        **{"pytorch-lightning_version": HOSTILE[0]},
    )
    return render_page(inspect_checkpoint(path))


def test_the_page_holds_everything_itself(page):
    elements = _Elements(page).found
    assert {tag for tag, _ in elements}.isdisjoint({"script", "link", "iframe", "object", "a"})
    images = [attributes for tag, attributes in elements if tag == "img"]
    assert len(images) == 2
    assert all(image["src"].startswith("data:image/svg+xml;base64,") and image["alt"] for image in images)
    assert not re.search(r"https?:|url\(|@import", page)


def test_every_layer_and_state_has_its_row(page):
    for text in ("first.weight", "head.bias", "exp_avg_sq", "all layers", "lost in fp8-raw", "AdamW at lr 0.01"):
        assert text in page


def test_names_in_the_file_are_text(hostile_page):
    elements = _Elements(hostile_page).found
    assert [tag for tag, _ in elements].count("img") == 2
    assert [tag for tag, _ in elements].count("h1") == 1
    assert "script" not in {tag for tag, _ in elements}
    assert "&lt;script&gt;" in hostile_page
    assert "\x1b" not in hostile_page


@needs_browser
@pytest.mark.parametrize("which", ["page", "hostile_page"])
def test_a_browser_shows_the_page(browser, request, tmp_path, which):  # noqa: F811
    (tmp_path / "page.html").write_text(request.getfixturevalue(which), encoding="utf-8")
    browser.requests.clear()
    browser.open(f"file://{tmp_path}/page.html")
    images = "Array.from(document.images)"
    assert browser.evaluate(f"{images}.map(image => image.complete && image.naturalWidth > 300)") == [True, True]
    assert "all layers" in browser.evaluate("document.body.innerText")
    assert browser.evaluate("document.title").startswith("x.ckpt: ")
    assert browser.evaluate("document.scrollingElement.scrollWidth <= window.innerWidth")
    assert {request.partition(":")[0] for request in browser.requests} == {"file", "data"}
    assert browser.complaints == []
