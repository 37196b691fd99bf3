"""A checkpoint is the old one or the new one: under kills, full disks and across filesystems."""

import stat
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_stosign import AtomicCheckpointIO

# Writers that share one import: each is forked, and killed a while after its third checkpoint.
WRITERS = """
import os, signal, sys, time, torch
from lightning_stosign import AtomicCheckpointIO
torch.set_num_threads(1)
path, *delays = sys.argv[1:]
io, (done, tell) = AtomicCheckpointIO(), os.pipe()
for delay in map(float, delays):
    writer = os.fork()
    if writer == 0:
        for number in range(10_000):
            io.save_checkpoint({"number": number, "values": torch.full((1 << 22,), number)}, path)
            os.write(tell, b".")
    for _ in range(3):
        os.read(done, 1)
    time.sleep(delay)
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    os.set_blocking(done, False)
    try:
        os.read(done, 1 << 16)
    except BlockingIOError:
        pass
    os.set_blocking(done, True)
    saved = torch.load(path, weights_only=True)
    assert bool((saved["values"] == saved["number"]).all()) and saved["number"] >= 2, saved["number"]
    print(saved["number"], flush=True)
"""


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "new" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"values": torch.arange(5)}, path)
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(path)["values"], torch.arange(5))
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_writer_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    command = [sys.executable, "-c", WRITERS, str(path), "0.0", "0.003", "0.011", "0.017", "0.023"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.split()) == 5


def test_failing_write_leaves_the_old_checkpoint_and_nothing_else(tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"number": 1}, path)

    class Unwritable:
        def __reduce__(self):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        io.save_checkpoint({"number": 2, "rest": Unwritable()}, path)
    assert torch.load(path, weights_only=True) == {"number": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_full_disk_leaves_the_old_checkpoint(tmp_path):
    # A limit on the size of files stands for the disk: torch's writer meets it in the middle of a write.
    script = (
        "import resource, signal, sys, torch\n"
        "from lightning_stosign import AtomicCheckpointIO\n"
        "io, path = AtomicCheckpointIO(), sys.argv[1]\n"
        "io.save_checkpoint({'number': 1}, path)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try:\n"
        "    io.save_checkpoint({'number': 2, 'values': torch.ones(1 << 20)}, path)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__)\n"
        "assert torch.load(path, weights_only=True) == {'number': 1}\n"
    )
    path = tmp_path / "last.ckpt"
    ran = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.strip(), ran.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_temporary_folder_plays_no_part(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    AtomicCheckpointIO().save_checkpoint({"number": 1}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True) == {"number": 1}


def test_other_filesystems_and_the_trainer_take_it():
    io = AtomicCheckpointIO()
    io.save_checkpoint({"number": 3}, "memory://folder/last.ckpt")
    assert io.load_checkpoint("memory://folder/last.ckpt") == {"number": 3}
    assert Trainer(plugins=[io], accelerator="cpu", logger=False).strategy.checkpoint_io is io
    import pytorch_lightning

    assert pytorch_lightning.Trainer(plugins=[io], accelerator="cpu", logger=False).strategy.checkpoint_io is io
