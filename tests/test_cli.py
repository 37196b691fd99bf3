import builtins
import json
import os
import subprocess
import sys

import pytest
from inspection.checkpoints import lightning_file, save, touch_by

from lightning_stosign.cli import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    save(path)
    return path


def test_the_table_is_the_default(checkpoint, capsys):
    assert main(["inspect", str(checkpoint)]) == 0
    out, err = capsys.readouterr()
    assert "all layers" in out and "lost in fp8-block" in out
    assert err == ""


def test_json_is_all_that_is_printed(checkpoint, capsys):
    assert main(["inspect", str(checkpoint), "--json", "--forecast", "fp8-raw", "fp4-block"]) == 0
    report = json.loads(capsys.readouterr().out)
    (optimizer,) = report["optimizers"]
    assert report["global_step"] == 3
    assert optimizer["optimizer"] == "StoSignSGD"
    assert list(optimizer["states"]["exp_inf"]["underflow_fraction"]) == ["fp8-raw", "fp4-block"]


def test_a_forecast_of_nothing_is_possible(checkpoint, capsys):
    assert main(["inspect", str(checkpoint), "--forecast"]) == 0
    assert "lost in" not in capsys.readouterr().out


def test_html_is_written_besides(checkpoint, tmp_path, capsys):
    assert main(["inspect", str(checkpoint), "--json", "--html", str(tmp_path / "page.html")]) == 0
    json.loads(capsys.readouterr().out)
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{folder}/none.ckpt"], "none.ckpt cannot be opened: No such file or directory"),
        (["{folder}"], "is a folder, a sharded checkpoint"),
        (["{folder}/cut.ckpt"], "cut.ckpt is truncated, or not a PyTorch checkpoint: it is no zip archive"),
        (["{folder}/text.ckpt", "--json"], "text.ckpt is truncated, or not a PyTorch checkpoint: it is no zip archive"),
        (["{folder}/evil.ckpt"], "evil.ckpt holds code: loading it would call builtins.exec; refused"),
        (["{folder}/sound.ckpt", "--forecast", "fp7"], "--forecast: state_precision='fp7' is unknown; accepted: "),
        (["{folder}/sound.ckpt", "--html", "{folder}/no/page.html"], "cannot be written: No such file or directory"),
    ],
)
def test_what_goes_wrong_is_one_line(tmp_path, capsys, options, message):
    sound = lightning_file(tmp_path / "sound.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(sound[:1000])
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    lightning_file(tmp_path / "evil.ckpt", hyper_parameters=touch_by("exec", tmp_path / "canary"))
    assert main(["inspect", *(option.format(folder=tmp_path) for option in options)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lightning-stosign inspect: ") and err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("package", "options"), [("rich", []), ("matplotlib", ["--html", "page.html"])], ids=["rich", "matplotlib"]
)
def test_a_missing_package_is_named_with_its_remedy(checkpoint, capsys, monkeypatch, package, options):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["inspect", str(checkpoint), *options]) == 2
    assert f"need{'' if package == 'matplotlib' else 's'} {package}: pip install 'lightning-stosign[dashboard]'" in (
        capsys.readouterr().err
    )


def test_the_module_runs_as_a_command(tmp_path, checkpoint):
    command = [sys.executable, "-m", "lightning_stosign", "inspect", str(tmp_path / "none.ckpt")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"}, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
