"""The documentation says what the package does: its snippets run, its links lead somewhere, its names are all there."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from inspection.written_by import table

import lightning_stosign

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if not {"_build", "gallery"} & set(path.parts))
MARKDOWN = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"))]


def snippets():
    for page in PAGES:
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
            yield pytest.param(code, id=f"{page.relative_to(ROOT / 'docs')}-{number}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("code", list(snippets()))
def test_snippet_runs(code, tmp_path, monkeypatch):
    for needed in re.findall(r"^# needs: (.*)$", code, re.MULTILINE):
        missing = [name for name in needed.split(", ") if find_spec(name) is None]
        if missing:
            pytest.skip(f"{', '.join(missing)} not installed")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


def links():
    for page in MARKDOWN:
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
            if not re.match(r"[a-z]+:|#", target):
                yield pytest.param(page, target, id=f"{page.name}-{target}")


@pytest.mark.parametrize(("page", "target"), list(links()))
def test_link_leads_somewhere(page, target):
    assert (page.parent / target.partition("#")[0]).exists()


@pytest.mark.parametrize("name", lightning_stosign.__all__)
def test_public_name_is_in_the_api_reference(name):
    assert re.search(rf"auto\w+:: lightning_stosign\.{name}$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", lightning_stosign.health.__all__)
def test_public_name_of_health_is_documented(name):
    value = getattr(lightning_stosign.health, name)
    assert (value.__doc__ or "").strip()


def test_table_of_checkpoints_is_the_tests_own():
    assert table() in (ROOT / "docs" / "guides" / "inspect.md").read_text()


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
