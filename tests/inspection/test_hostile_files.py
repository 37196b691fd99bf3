"""Files that nobody has to trust: read without running, loading or believing what is in them, in bounded memory."""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import pickle
import socket
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from inspection.checkpoints import Calls, lightning_file, touch_by, with_pickle
from sklearn.preprocessing import StandardScaler

from lightning_stosign.cli import main
from lightning_stosign.inspection import CheckpointError, inspect_checkpoint
from lightning_stosign.inspection.folders import read_checkpoint
from lightning_stosign.inspection.messages import printable


@dataclasses.dataclass
class Config:
    width: int
    parent: object = None


def line_of(path, capsys, *options):
    """Run the command; returns its exit code and its only line on standard error."""
    code = main(["inspect", str(path), *options])
    err = capsys.readouterr().err
    assert err.count("\n") <= 1
    assert err.rstrip("\n").isprintable()
    assert (code == 2) == (err != "")
    return code, err


# ---- what is left unread, and no reason to refuse ----

OBJECTS = {
    "dataclasses": (Config(3, Config(4)), "test_hostile_files.Config"),
    "nested": ({"deep": [(Config(3),)]}, "test_hostile_files.Config"),
    "paths": (pathlib.Path("data"), "pathlib.PosixPath"),
    "times": (datetime.timedelta(hours=1), "datetime.timedelta"),
    "arrays": (np.arange(5), "numpy.ndarray"),
    "large arrays": (np.zeros(1 << 19), "numpy.ndarray"),
    "partials": (functools.partial(torch.optim.AdamW, lr=0.1), "functools.partial"),
    "namespaces": (argparse.Namespace(lr=0.1), "argparse.Namespace"),
    "counters": (collections.Counter("abc"), "collections.Counter"),
    "modules": (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    "loaders": (torch.utils.data.DataLoader(torch.zeros(3)), "torch.utils.data.dataloader.DataLoader"),
    "scalers": (StandardScaler().fit(np.eye(3)), "sklearn.preprocessing._data.StandardScaler"),
    "sparse tensors": (torch.eye(3).to_sparse(), "torch.Tensor (sparse)"),
    "nested tensors": (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "torch.Tensor (nested)"),
    "meta tensors": (torch.ones(2, device="meta"), "torch.Tensor (meta)"),
    "huge numbers": (10**400, "int of 1336 bits"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OBJECTS)
@pytest.mark.parametrize("where", ["hyper_parameters", "callbacks", "state_dict"])
def test_objects_are_left_unread(tmp_path, kind, where):
    value, name = OBJECTS[kind]
    path = lightning_file(tmp_path / "x.ckpt", **{where: {"a": value}})
    report = inspect_checkpoint(path)
    assert name in [unread.replace("pathlib._local", "pathlib") for unread in report.left_unread] or (
        where != "hyper_parameters" and report.left_unread
    )
    assert report.optimizers[0].states["exp_avg"].size == 2


def test_numpy_numbers_are_numbers(tmp_path):
    group = {**torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict()["param_groups"][0]}
    group |= {"lr": np.float64(0.25), "weight_decay": np.float32(0.5), "eps": torch.tensor(0.125)}
    path = lightning_file(tmp_path / "x.ckpt", optimizer_states=[{"state": {}, "param_groups": [group]}])
    options = inspect_checkpoint(path).optimizers[0].options
    assert (options["lr"], options["weight_decay"], options["eps"]) == (0.25, 0.5, 0.125)


def test_a_module_that_the_file_names_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "noisy_module.py").write_text("class Config:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import noisy_module

    path = lightning_file(tmp_path / "x.ckpt", hyper_parameters=noisy_module.Config())
    del sys.modules["noisy_module"]
    assert inspect_checkpoint(path).left_unread == ["noisy_module.Config"]
    assert "noisy_module" not in sys.modules


@pytest.mark.parametrize("how", ["os.system", "eval", "exec", "subprocess", "open", "pickle.load"])
@pytest.mark.parametrize("where", ["hyper_parameters", "optimizer_states", "state_dict"])
def test_code_in_a_file_does_not_run_and_is_warned_about(tmp_path, how, where, capsys):
    canary = tmp_path / "canary"
    lightning_file(tmp_path / "x.ckpt", **{where: {"weight": touch_by(how, canary)}})
    code = main(["inspect", str(tmp_path / "x.ckpt")])
    out, err = capsys.readouterr()
    assert not canary.exists()
    assert code == (2 if where == "optimizer_states" else 0)
    assert code == 2 or "Warning: torch.load(weights_only=False) would let this file call " in out
    assert err.count("\n") == (code == 2)
    with contextlib.suppress(TypeError):
        torch.load(tmp_path / "x.ckpt", weights_only=False)
    assert canary.exists(), "the file would not have run code anywhere"


# ---- what is no checkpoint ----


def _zip(path, name, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, b"\0" * 1000)


def _adam(**changes):
    return [{**torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]).state_dict(), **changes}]


def _meta_weights(path):
    lightning_file(path, optimizer_states=_adam(state={0: {"exp_avg": torch.ones(1).expand(1 << 40)}}))


FOREIGN = {
    "text": (lambda path: path.write_text("lr: 0.1\n"), "it is text"),
    "nothing": (lambda path: path.touch(), "is empty"),
    "zeros": (lambda path: path.write_bytes(bytes(1000)), "it begins with zeros"),
    "noise": (lambda path: path.write_bytes(b"\xa3\x91" * 500), "it is no zip archive"),
    "Git LFS": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
    "GGUF": (lambda path: path.write_bytes(b"GGUF" + bytes(100)), "is a GGUF model"),
    "HDF5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), "is an HDF5 file"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b" + bytes(100)), "is compressed by gzip"),
    "plain pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "is a plain Python pickle"),
    "npz": (lambda path: np.savez(path.open("wb"), a=np.ones(3)), "it is a NumPy archive"),
    "compressed": (lambda path: _zip(path, "archive/data.pkl", zipfile.ZIP_DEFLATED), "it is compressed"),
    "other zip": (lambda path: _zip(path, "a.txt"), "without torch's records"),
    "TorchScript": (
        lambda path: torch.jit.script(torch.nn.Linear(1, 1)).save(path),
        "TorchScript model|without torch's records",
    ),
    "a list": (lambda path: torch.save([1], path), "holds no optimizer's state_dict"),
    "weights": (lambda path: torch.save(torch.nn.Linear(1, 1).state_dict(), path), "holds weights and no optimizer"),
    "weights only": (
        lambda path: torch.save({"state_dict": {}, "pytorch-lightning_version": "2"}, path),
        r"holds no optimizer states: it was saved with ModelCheckpoint\(save_weights_only=True\)",
    ),
    "stripped": (
        lambda path: torch.save({"model": None, "optimizer": None}, path),
        "were stripped when training ended",
    ),
    "states of another form": (lambda path: lightning_file(path, optimizer_states=[{"m": 1}]), "no optimizer states"),
    "no groups": (lambda path: lightning_file(path, optimizer_states=_adam(param_groups=[])), "no optimizer states"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_named(tmp_path, kind, capsys):
    make, message = FOREIGN[kind]
    make(tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "x.ckpt")
    assert line_of(tmp_path / "x.ckpt", capsys)[0] == 2


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "null byte", "too long a name"])
def test_what_is_no_regular_file_is_not_opened(tmp_path, kind, capsys):
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    path = {"device": "/dev/zero", "null byte": "a\0b", "too long a name": "a" * 5000}.get(kind, path)
    assert line_of(path, capsys)[0] == 2


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share, capsys):
    data = lightning_file(tmp_path / "x.ckpt").read_bytes()
    (tmp_path / "x.ckpt").write_bytes(data[: int(len(data) * share)])
    assert line_of(tmp_path / "x.ckpt", capsys)[0] == 2


# ---- what costs more than it is ----


def _doubled(levels):
    value = ["x"]
    for _ in range(levels):
        value = [value, value]
    return value


def _itself():
    value = {"a": 1}
    value["self"] = [value]
    return value


def _deep(depth, kind):
    opening, closing = {"list": (b"]", b"a"), "tuple": (b"", b"\x85"), "dict": (b"}K\x00", b"s")}[kind]
    return b"\x80\x02" + opening * depth + b"N" + closing * depth + b"."


COSTLY = {
    "shared references": lambda: {"lr": _doubled(200)},
    "itself": lambda: {"lr": _itself()},
    "bytearray(3e9)": lambda: {"lr": Calls(bytearray, 3_000_000_000)},
    "range": lambda: {"lr": Calls(list, range(10**12))},
    "10**400": lambda: {"lr": 10**400},
    "-10**400": lambda: {"lr": -(10**400)},
    "text": lambda: {"lr": "x" * 5_000_000},
    "nan": lambda: {"lr": float("nan"), "betas": (float("inf"), "x", None)},
    "meta": lambda: {"lr": torch.ones(3, device="meta"), "weight_decay": torch.ones(2, 2)},
    "surrogate": lambda: {"\ud800": "\udfff", "lr": "\x1b[2J"},
    "objects": lambda: {"betas": Config(1), "decoupled_weight_decay": Config(2), "use_muon": Config(3)},
    "keys": lambda: {(1, (2, 3)): 1, 5: 2, None: 3, Config: 4},
}


@pytest.mark.parametrize("kind", COSTLY)
def test_options_of_any_kind_are_shown_or_left_out(tmp_path, kind, capsys):
    path = tmp_path / "x.ckpt"
    group = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict()["param_groups"][0]
    state = {"state": {0: {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}}}
    lightning_file(path, optimizer_states=[{**state, "param_groups": [{**group, **COSTLY[kind]()}]}])
    for options in ((), ("--json",), ("--check",), ("--html", str(tmp_path / "page.html"))):
        assert line_of(path, capsys, *options) == (0, "")


@pytest.mark.parametrize("kind", ["list", "tuple", "dict"])
def test_a_depth_of_100_000_is_no_recursion(tmp_path, kind, capsys):
    path = with_pickle(tmp_path / "x.ckpt", _deep(100_000, kind))
    assert line_of(path, capsys)[0] == 2


BOMBS = {
    "empty dicts": b"\x80\x02(" + b"}" * 8_000_000 + b"l.",
    "small texts": b"\x80\x02(" + b"\x8c\x02ab" * 3_000_000 + b"l.",
    "duplicates": b"\x80\x02(N" + b"2" * 12_000_000 + b"l.",
    "memo": b"\x80\x02N" + b"".join(b"r" + i.to_bytes(4, "little") for i in range(2_000_000)) + b".",
    "a far memo": b"\x80\x02Nr\xff\xff\xff\xff.",
    "a long text": b"\x80\x02X\xff\xff\xff\xffabc.",
    "a longer text": b"\x80\x04\x8d" + b"\xff" * 8 + b"abc.",
    "a long int": b"\x80\x02\x8b\xff\xff\xff\x7f\x00.",
    "a million keys": b"\x80\x02}(" + b"".join(b"J" + i.to_bytes(4, "little") + b"N" for i in range(1_000_000)) + b"u.",
    "no end": b"\x80\x02]",
    "nothing": b"",
}


_PEAKS = """
import contextlib, io, json, sys
from pathlib import Path
import torch
from lightning_stosign.cli import main

def memory(name):
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(name))

for path in [sys.argv[1], *sys.argv[1:]]:  # the first one twice: once for what is loaded late
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = main(["inspect", path, "--json"])
    print(json.dumps([path, code, err.getvalue(), memory("VmHWM") - before]), file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="a peak of memory needs Linux's /proc")
def test_a_small_pickle_takes_no_large_memory(tmp_path):
    paths = [with_pickle(tmp_path / name, data) for name, data in BOMBS.items()]
    command = [sys.executable, "-c", _PEAKS, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = [json.loads(line) for line in done.stderr.splitlines()][1:]
    assert len(results) == len(BOMBS)
    for path, code, err, peak in results:
        assert (code, err.count("\n")) == (2, 1), path
        assert peak < 4 * os.path.getsize(path) + 200_000_000, path


def test_more_parameters_than_any_model_has_are_refused(tmp_path, capsys):
    params = list(range(300_000))
    states = [{"state": {}, "param_groups": [{"params": params, "lr": 0.1}]}]
    code, err = line_of(lightning_file(tmp_path / "x.ckpt", optimizer_states=states), capsys)
    assert code == 2 and "300,000 parameters" in err


def test_states_that_share_their_bytes_are_not_read_again_and_again(tmp_path, capsys):
    value = torch.ones(1 << 18)
    states = {i: {"exp_avg": value, "exp_avg_sq": value} for i in range(500)}
    group = {**_adam()[0]["param_groups"][0], "params": list(states)}
    path = lightning_file(tmp_path / "x.ckpt", optimizer_states=[{"state": states, "param_groups": [group]}])
    code, err = line_of(path, capsys)
    assert code == 2 and "many times larger than the file" in err


def test_a_tensor_that_exceeds_its_storage_is_left_unread(tmp_path):
    path = tmp_path / "x.ckpt"
    _meta_weights(path)
    (optimizer,) = inspect_checkpoint(path).optimizers
    assert optimizer.states == {}


# ---- names ----

HOSTILE_NAMES = [
    "\x1b[2J\x1b]0;owned\x07",
    "a\nb\r\tc",
    "\ud800",
    "\u202egpj.exe",
    "<script>alert(1)</script>",
    "x" * 5000,
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_no_name_steers_the_terminal_or_the_page(tmp_path, name, capsys):
    state = {name: torch.ones(2), "exp_avg": torch.ones(2)}
    group = {"params": [0], "lr": 0.1, name: name}
    content = {
        "optimizer_states": [{"state": {0: state}, "param_groups": [group]}],
        "state_dict": {name: torch.ones(2)},
        "pytorch-lightning_version": name,
    }
    path = lightning_file(tmp_path / "x.ckpt", **content)
    page = tmp_path / "page.html"
    for options in ((), ("--all",), ("--json",), ("--check", "--states", name), ("--html", str(page))):
        assert main(["inspect", str(path), *options]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert all(c.isprintable() or c == "\n" for c in out)
    text = page.read_text(encoding="utf-8")
    assert all(c.isprintable() or c == "\n" for c in text)
    assert text.count("<script>") == 1


def test_a_name_of_a_file_does_not_steer_the_terminal(tmp_path, capsys):
    path = tmp_path / "x\x1b[2J.ckpt"
    lightning_file(path)
    assert main(["inspect", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    path.write_text("text")
    assert line_of(path, capsys)[0] == 2


def test_control_characters_are_escaped():
    assert printable("head\x1b[2J.weight\n") == "head\\x1b[2J.weight\\n"
    assert printable("größe.Ω") == "größe.Ω"
    assert printable("\ud800") == "\\ud800"
    assert printable("x" * 1000) == "x" * 299 + "…"
