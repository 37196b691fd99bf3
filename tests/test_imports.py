"""The package's modules import one another in one direction."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_stosign"


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def runs_when_imported(tree):
    """Every statement that runs at import: not in functions, nor for type checkers alone."""
    for node in tree.body if hasattr(tree, "body") else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from runs_when_imported(node)


def imported_modules(tree, modules):
    for node in runs_when_imported(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in names]
        else:
            continue
        yield from (name for name in names if name in modules)


def test_no_module_needs_itself_to_be_imported():
    paths = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    needs = {name: set(imported_modules(ast.parse(path.read_text()), paths)) for name, path in paths.items()}
    assert sum(map(len, needs.values())) > 300  # it does see imports
    TopologicalSorter(needs).prepare()  # CycleError names the circle


FIRST = """
import importlib, os, sys
import lightning.pytorch, torch, torchao.float8, torchmetrics
for name in sys.argv[1:]:
    child = os.fork()  # what all of them need is imported already
    if child == 0:
        importlib.import_module(name)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{name} cannot be imported first")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_any_package_can_be_imported_first():
    names = [module_name(path) for path in PACKAGE.rglob("__init__.py")]
    assert len(names) >= 12
    ran = subprocess.run([sys.executable, "-c", FIRST, *names], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
