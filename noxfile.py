"""Test sessions on several versions: ``nox --list``, ``nox -s tests-3.12``, ``nox -s lowest``."""

import re
import sys
from pathlib import Path

import nox

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
PYTEST = ["python", "-m", "pytest", "--numprocesses", "auto", "--maxprocesses", "4", "--dist", "loadfile"]

nox.options.sessions = ["tests"]


def lowest_versions() -> list[str]:
    """Return pyproject's direct dependencies, each at the lowest version that it allows."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    return [re.sub(r">=", "==", requirement) for requirement in project["dependencies"]]


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the tests with the newest versions that pyproject allows."""
    session.install("torch")
    session.install("--editable", ".[dev]")
    session.run(*PYTEST, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(python="3.10")
def lowest(session: nox.Session) -> None:
    """Run the tests with the lowest direct versions that pyproject allows."""
    lowest = lowest_versions()
    session.install(next(requirement for requirement in lowest if requirement.startswith("torch==")), "numpy<2.3")
    session.install(*lowest)
    session.install("--editable", ".[dev]", *lowest)
    session.run(*PYTEST, *session.posargs, env={"OMP_NUM_THREADS": "1"})
