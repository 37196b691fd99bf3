import builtins
import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint
from inspection.checkpoints import lightning_file, save

from lightning_stosign import StateCollapseGuard
from lightning_stosign.cli import main
from lightning_stosign.inspection.verdict import Limits


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
        (["{folder}"], "is a folder with checkpoints in it; inspect one or several of them: "),
        (["{folder}/cut.ckpt"], "cut.ckpt is truncated, or not a PyTorch checkpoint: its zip archive has no end"),
        (["{folder}/text.ckpt", "--json"], "text.ckpt is not a PyTorch checkpoint: it is text"),
        (["-"], "standard input is not read"),
        (["https://example.com/last.ckpt"], "https://example.com/last.ckpt is a URL: download it first"),
        (["s3://bucket/last.ckpt"], "is a URL"),
        (["/dev/zero"], "/dev/zero is a device"),
        (["{folder}/sound.ckpt", "--check", "--states", "exp_inf"], "--states: there is no state ['exp_inf']"),
        (["{folder}/sound.ckpt", "--forecast", "fp7"], "--forecast: state_precision='fp7' is unknown; accepted: "),
        (["{folder}/sound.ckpt", "--html", "{folder}/no/page.html"], "cannot be written: No such file or directory"),
    ],
)
def test_what_goes_wrong_is_one_line(tmp_path, capsys, options, message):
    sound = lightning_file(tmp_path / "sound.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(sound[:1000])
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    assert main(["inspect", *(option.format(folder=tmp_path) for option in options)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lightning-stosign inspect: ") and err.count("\n") == 1
    assert message in err


def test_a_missing_rich_is_named_with_its_remedy(checkpoint, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "rich":
            raise ModuleNotFoundError("No module named 'rich'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["inspect", str(checkpoint)]) == 2
    assert "needs rich: pip install 'lightning-stosign[dashboard]'" in capsys.readouterr().err
    assert main(["inspect", str(checkpoint), "--json"]) == 0


def test_the_module_runs_as_a_command(tmp_path, checkpoint):
    command = [sys.executable, "-m", "lightning_stosign", "inspect", str(tmp_path / "none.ckpt")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"}, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


# ---- --check ----


def _collapsed(path, share, **content):
    """Write a checkpoint whose second moments are 0 in such a share of places, in the second of two layers."""
    params = [torch.nn.Parameter(torch.ones(1000)) for _ in range(2)]
    optimizer = torch.optim.AdamW(params)
    for param in params:
        param.grad = torch.ones(1000)
    optimizer.step()
    state = optimizer.state[params[1]]
    state["exp_avg"][: int(1000 * share)] = 0
    state["exp_avg_sq"][: int(1000 * share)] = 0
    weights = {"a": params[0], "b": params[1]}
    return lightning_file(path, state_dict=weights, optimizer_states=[optimizer.state_dict()], **content)


@pytest.mark.parametrize(
    ("share", "options", "code", "line"),
    [
        (0.5, [], 0, "x.ckpt: healthy: 25.0% of exp_avg_sq is zero (limit 50.0%)"),
        (0.5, ["--max-zero-fraction", "0.2"], 1, "x.ckpt: collapsed: 25.0% of exp_avg_sq is zero (limit 20.0%)"),
        (0.9, ["--per-layer"], 1, "x.ckpt: collapsed: 90.0% of exp_avg_sq is zero in b (limit 50.0%)"),
        (0.5, ["--max-dead-fraction", "0.1"], 1, "x.ckpt: collapsed: 25.0% of the coordinates are dead (limit 10.0%)"),
        (0.9, ["--states", "exp_avg"], 0, "x.ckpt: healthy: 45.0% of exp_avg is zero (limit 50.0%)"),
    ],
)
def test_check_exits_by_the_guard_s_rules_with_one_line(tmp_path, capsys, share, options, code, line):
    path = _collapsed(tmp_path / "x.ckpt", share)
    assert main(["inspect", str(path), "--check", *options]) == code
    assert capsys.readouterr().out == line + "\n"


def test_exploding_coordinates_and_nan_are_collapses(tmp_path, capsys):
    path = _collapsed(tmp_path / "x.ckpt", 0.0)
    content = torch.load(path)
    states = content["optimizer_states"][0]["state"]
    states[0]["exp_avg_sq"][:30] = 0
    torch.save(content, path)
    assert main(["inspect", str(path), "--check"]) == 1
    assert "1.5% of the quotients explode (limit 1.0%)" in capsys.readouterr().out
    states[1]["exp_avg_sq"][0] = float("nan")
    torch.save(content, path)
    assert main(["inspect", str(path), "--check"]) == 1
    assert "collapsed: exp_avg_sq holds values that are not finite; " in capsys.readouterr().out


def test_check_s_limits_are_those_of_the_guard():
    guard = inspect.signature(StateCollapseGuard).parameters
    limits = Limits()
    for name in ("max_zero_fraction", "max_dead_fraction", "max_exploding_fraction", "per_layer", "states"):
        assert guard[name].default == getattr(limits, name)


def test_one_collapsed_checkpoint_of_several_fails_the_check(tmp_path, capsys):
    paths = [_collapsed(tmp_path / f"{i}.ckpt", share, global_step=i) for i, share in enumerate((0.1, 1.0))]
    assert main(["inspect", *map(str, paths), "--check", "--max-zero-fraction", "0.4", "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert [checkpoint["global_step"] for checkpoint in content["checkpoints"]] == [0, 1]
    assert content["check"]["collapsed"] is True
    assert [line.split(": ")[1] for line in content["check"]["lines"]] == ["healthy", "collapsed"]


# ---- --html ----


def test_a_page_replaces_an_earlier_page_and_nothing_else(tmp_path, checkpoint, capsys):
    page = tmp_path / "page.html"
    assert main(["inspect", str(checkpoint), "--html", str(page)]) == 0
    page.write_text(page.read_text(encoding="utf-8") + "old", encoding="utf-8")
    assert main(["inspect", str(checkpoint), "--html", str(page)]) == 0
    assert not page.read_text(encoding="utf-8").endswith("old")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("kind", ["itself", "another file", "link to a file", "link to nothing", "folder", "pipe"])
def test_a_page_overwrites_no_input_and_follows_no_link(tmp_path, capsys, kind):
    path = lightning_file(tmp_path / "x.ckpt")
    data = path.read_bytes()
    page = tmp_path / "page.html"
    if kind == "itself":
        page = path
    elif kind == "another file":
        page.write_text("precious")
    elif kind == "link to a file":
        page.symlink_to(path)
    elif kind == "link to nothing":
        page.symlink_to(tmp_path / "target")
    elif kind == "folder":
        page.mkdir()
    else:
        os.mkfifo(page)
    assert main(["inspect", str(path), "--html", str(page)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert path.read_bytes() == data
    assert not (tmp_path / "target").exists()
    assert kind != "another file" or page.read_text() == "precious"


def test_a_page_is_not_written_into_a_checkpoint_folder(tmp_path, capsys):
    folder = tmp_path / "step-3"
    torch.distributed.checkpoint.save({"a": torch.ones(2)}, checkpoint_id=folder)
    assert main(["inspect", str(folder), "--html", str(folder / "page.html")]) == 2
    assert "lies in the checkpoint" in capsys.readouterr().err


def test_a_terminal_without_unicode_gets_the_table(tmp_path, checkpoint):
    command = [sys.executable, "-m", "lightning_stosign", "inspect", str(checkpoint)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "all layers" in done.stdout
