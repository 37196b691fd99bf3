"""The optimizers and the command line do without Lightning; once Lightning is there, so is all of the package."""

import subprocess
import sys

import pytest
from inspection.checkpoints import save

import lightning_stosign
from lightning_stosign import health
from lightning_stosign._lazy import after_import

SLOW_TO_IMPORT = {"lightning", "torchmetrics", "torchao", "matplotlib"}


def run_python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)


def test_inspect_does_not_import_lightning(tmp_path):
    save(tmp_path / "last.ckpt")
    command = run_python(
        "-X", "importtime", "-m", "lightning_stosign", "inspect", str(tmp_path / "last.ckpt"), "--json"
    )
    imported = {line.rpartition("|")[2].strip() for line in command.stderr.splitlines()}
    assert "torch" in imported
    assert not imported & SLOW_TO_IMPORT


def test_optimizers_in_plain_torch_do_not_import_lightning():
    run_python(
        "-c",
        "import sys, torch\n"
        "from lightning_stosign import ALIAS, SignConverted, SignSGD, StatePrecision, StoSignSGD\n"
        "from lightning_stosign import OptimizerStateLogger, emulate_state_precision, state_bytes\n"
        "param = torch.nn.Parameter(torch.ones(8192))\n"
        "param.grad = torch.ones(8192)\n"
        "StoSignSGD([param], state_precision='fp8').step()\n"
        "found = {name for name in sys.modules if name.split('.')[0] in "
        "('lightning', 'pytorch_lightning', 'lightning_fabric', 'torchmetrics', 'torchao', 'transformers')}\n"
        "assert not found, sorted(found)[:5]\n",
    )


def test_strategies_and_plugins_are_known_by_name_when_lightning_is_imported_second():
    run_python(
        "-c",
        "import lightning_stosign, sys\n"
        "assert 'lightning' not in sys.modules\n"
        "from lightning.pytorch import Trainer\n"
        "from lightning.pytorch.plugins import Precision\n"
        "trainer = Trainer(strategy='sign_ddp_mean', accelerator='cpu', devices=2, logger=False)\n"
        "assert type(trainer.strategy) is lightning_stosign.SignDDPStrategy\n"
        "from jsonargparse import ArgumentParser\n"
        "parser = ArgumentParser(exit_on_error=False)\n"
        "parser.add_argument('--plugin', type=Precision)\n"
        "plugin = parser.instantiate(parser.parse_args(['--plugin=Float8Precision'])).plugin\n"
        "assert type(plugin) is lightning_stosign.Float8Precision\n",
    )


@pytest.mark.parametrize("package", [lightning_stosign, health], ids=lambda package: package.__name__)
def test_every_public_name_is_there_and_no_other(package):
    assert len(set(package.__all__)) == len(package.__all__)
    assert set(package.__all__) <= set(dir(package))
    assert all(getattr(package, name).__name__ == name for name in package.__all__)
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'StoSingSGD'"):
        package.StoSingSGD  # noqa: B018


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Packages `big` and `small`, which imports from it; what is imported in the test is forgotten after it."""
    for package in ("big", "small"):
        (tmp_path / package).mkdir()
    (tmp_path / "big" / "__init__.py").write_text("from big.part import value\n")
    (tmp_path / "big" / "part.py").write_text("value = 1\n")
    (tmp_path / "small" / "__init__.py").write_text(
        "from lightning_stosign._lazy import LazyPackage, after_import\n"
        "_lazy = LazyPackage(__name__, ['One', 'Two'], {'first': ['One'], 'second': ['Two']})\n"
        "__getattr__, __dir__ = _lazy.get, _lazy.dir\n"
        "after_import('big', _lazy.load)\n"
    )
    (tmp_path / "small" / "first.py").write_text("import big\nclass One: pass\nhidden = 1\n")
    (tmp_path / "small" / "second.py").write_text("from big import value\nclass Two: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    known, finders = set(sys.modules), list(sys.meta_path)
    yield
    for name in set(sys.modules) - known:
        del sys.modules[name]
    sys.meta_path[:] = finders


@pytest.mark.parametrize(
    "code",
    [
        "import big, small",
        "import small, big",
        "import small; small.One",
        "from small import Two",
        "from small import second",
        "import small.first",  # imports big, which imports the package's modules, of which this one is not done
        "from importlib.util import find_spec; import small; find_spec('big'); import big",
    ],
)
def test_modules_are_imported_together_whoever_asks_first(packages, code):
    exec(code, {})
    assert {"small.first", "small.second"} <= set(sys.modules)
    small = sys.modules["small"]
    assert (small.One.__module__, small.Two.__module__) == ("small.first", "small.second")
    assert not hasattr(small, "hidden")
    assert {"One", "Two", "first", "second"} <= set(dir(small))


def test_nothing_is_imported_without_need(packages):
    exec("import small", {})
    assert not {"big", "small.first", "small.second"} & set(sys.modules)


def test_what_follows_an_import_happens_once_and_leaves_no_finder(packages):
    finders, calls = list(sys.meta_path), []
    after_import("big", lambda: calls.append("big" in sys.modules and sys.modules["big"].value))
    assert calls == []
    exec("import big; import big.part", {})
    assert calls == [1]
    assert sys.meta_path == finders
