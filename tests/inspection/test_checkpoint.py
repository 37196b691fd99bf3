import contextlib
import dataclasses
import datetime
import pathlib
import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inspection.checkpoints import lightning_file, pickle_in, save, touch_by, with_pickle

from lightning_stosign.inspection.checkpoint import CheckpointError, printable, read_checkpoint


@dataclasses.dataclass
class Config:
    width: int
    parent: object = None


def test_a_run_s_checkpoint_is_read(tmp_path):
    module, _ = save(tmp_path / "run.ckpt")
    checkpoint = read_checkpoint(tmp_path / "run.ckpt")
    assert checkpoint.facts["global_step"] == 3
    assert checkpoint.size == (tmp_path / "run.ckpt").stat().st_size
    assert checkpoint.placeholders == ()
    for name, value in module.state_dict().items():
        assert torch.equal(checkpoint.weights[name], value)


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (Config(3, Config(4)), ("test_checkpoint.Config",)),
        ({"deep": [(Config(3),)]}, ("test_checkpoint.Config",)),
        (Config, ("test_checkpoint.Config",)),
        (pathlib.Path("data"), ("pathlib.PosixPath",)),
        (datetime.timedelta(hours=1), ("datetime.timedelta",)),
        (torch.nn.Linear, ("torch.nn.modules.linear.Linear",)),
    ],
)
def test_objects_among_the_hyperparameters_are_left_unread(tmp_path, value, names):
    checkpoint = read_checkpoint(lightning_file(tmp_path / "x.ckpt", hyper_parameters={"config": value}))
    assert tuple(name.replace("pathlib._local", "pathlib") for name in checkpoint.placeholders) == names
    assert checkpoint.weights["weight"].shape == (2,)


def test_numpy_numbers_among_the_hyperparameters_are_left_unread(tmp_path):
    path = lightning_file(tmp_path / "x.ckpt", hyper_parameters={"lr": np.float64(0.1)})
    assert "numpy.dtype" in read_checkpoint(path).placeholders


def test_a_module_that_the_file_names_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "noisy_module.py").write_text("class Config:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import noisy_module

    path = lightning_file(tmp_path / "x.ckpt", hyper_parameters=noisy_module.Config())
    del sys.modules["noisy_module"]
    assert read_checkpoint(path).placeholders == ("noisy_module.Config",)
    assert "noisy_module" not in sys.modules


@pytest.mark.parametrize("how", ["os.system", "eval", "exec", "subprocess", "open", "pickle.load"])
@pytest.mark.parametrize("where", ["hyper_parameters", "optimizer_states", "state_dict"])
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, how, where):
    canary = tmp_path / "canary"
    lightning_file(tmp_path / "x.ckpt", **{where: {"weight": touch_by(how, canary)}})
    with pytest.raises(CheckpointError, match=r"^.*x\.ckpt holds code: .*; refused$") as error:
        read_checkpoint(tmp_path / "x.ckpt")
    assert "\n" not in str(error.value)
    assert not canary.exists()
    with contextlib.suppress(TypeError):
        torch.load(tmp_path / "x.ckpt", weights_only=False)
    assert canary.exists(), "the file would not have run code anywhere"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    data = lightning_file(tmp_path / "x.ckpt").read_bytes()
    (tmp_path / "x.ckpt").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match="is truncated, or not a PyTorch checkpoint"):
        read_checkpoint(tmp_path / "x.ckpt")


def _legacy(path):
    torch.save({"state_dict": {}, "optimizer_states": []}, path, _use_new_zipfile_serialization=False)


def _zip(path, name, compression):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, b"\0" * 1000)


def _adam(**changes):
    return [{**torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]).state_dict(), **changes}]


_HUGE = {0: {"exp_avg": torch.ones(1).expand(1 << 40)}}

FOREIGN = {
    "text": (lambda path: path.write_text("lr: 0.1\n"), "it is no zip archive"),
    "before torch 1.6": (_legacy, "it is no zip archive"),
    "compressed": (lambda path: _zip(path, "archive/data.pkl", zipfile.ZIP_DEFLATED), "it is compressed"),
    "other zip": (lambda path: _zip(path, "a.txt", zipfile.ZIP_STORED), "cannot be read"),
    "TorchScript": (lambda path: torch.jit.script(torch.nn.Linear(1, 1)).save(path), "."),
    "a list": (lambda path: torch.save([1], path), "holds no 'state_dict'"),
    "a state_dict": (lambda path: torch.save(torch.nn.Linear(1, 1).state_dict(), path), "holds no 'state_dict'"),
    "weights only": (
        lambda path: torch.save({"state_dict": {}}, path),
        r"holds no optimizer states: it was saved with ModelCheckpoint\(save_weights_only=True\)",
    ),
    "states of another form": (lambda path: lightning_file(path, optimizer_states=[{"m": 1}]), "not in torch's form"),
    "no groups": (lambda path: lightning_file(path, optimizer_states=_adam(param_groups=[])), "not in torch's form"),
    "keys of another kind": (
        lambda path: lightning_file(path, optimizer_states=_adam(param_groups=[{"params": [[1]]}])),
        "not in torch's form",
    ),
    "a state larger than the file": (
        lambda path: lightning_file(path, optimizer_states=_adam(state=_HUGE)),
        r"a state of shape \[1099511627776\] exceeds the file",
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused(tmp_path, kind):
    make, message = FOREIGN[kind]
    make(tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=message) as error:
        read_checkpoint(tmp_path / "x.ckpt")
    assert "\n" not in str(error.value)


def test_a_folder_is_told_from_a_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"is a folder, a sharded checkpoint; .*consolidate_checkpoint"):
        read_checkpoint(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.ckpt cannot be opened: No such file or directory"):
        read_checkpoint(tmp_path / "none.ckpt")


@pytest.fixture(scope="module")
def sound_pickle(tmp_path_factory):
    return pickle_in(lightning_file(tmp_path_factory.mktemp("sound") / "x.ckpt", hyper_parameters=Config(3)))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_pickle_is_read_or_refused(tmp_path, sound_pickle, data):
    damaged = bytearray(sound_pickle)
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with_pickle(tmp_path / "x.ckpt", bytes(damaged[: data.draw(st.integers(1, len(damaged)))]))
    try:
        read_checkpoint(tmp_path / "x.ckpt")
    except CheckpointError as error:
        assert str(error).isprintable()


def test_control_characters_are_escaped():
    assert printable("head\x1b[2J.weight\n") == "head\\x1b[2J.weight\\n"
    assert printable("größe.Ω") == "größe.Ω"
