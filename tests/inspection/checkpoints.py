"""Checkpoints of tiny runs, and files that pretend to be one."""

import io
import os
import pickle
import subprocess
import zipfile

import torch
from callbacks.fits import Regression, trainer
from torch import nn


def save(path, module=None, **options):
    """Train for three steps and save; returns the module and the trainer."""
    module = module or Regression()
    torch.manual_seed(0)
    run = trainer(None, **{"max_steps": 3, **options})
    run.fit(module)
    run.save_checkpoint(path)
    return module, run


def lightning_file(path, **content):
    """Write what looks like a Lightning checkpoint, with this in it besides."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(2)
    optimizer.step()
    base = {"state_dict": {"weight": weight.detach()}, "optimizer_states": [optimizer.state_dict()], "global_step": 1}
    torch.save({**base, **content}, path)
    return path


class Calls:
    """Pickles as a call of anything with any arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touch_by(how, canary):
    """Return an object that creates the file `canary` when it is unpickled."""
    command = f"touch {canary}"
    python = f"open({str(canary)!r}, 'w').close()"
    return {
        "os.system": Calls(os.system, command),
        "eval": Calls(eval, python),
        "exec": Calls(exec, python),
        "subprocess": Calls(subprocess.call, ["touch", str(canary)]),
        "open": Calls(open, str(canary), "w"),
        "pickle.load": Calls(pickle.load, Calls(io.BytesIO, pickle.dumps(Calls(os.system, command)))),
    }[how]


def with_pickle(path, data):
    """Write a torch archive whose pickle is `data`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for number in range(4):
            archive.writestr(f"archive/data/{number}", b"\0" * 64)
    return path


def pickle_in(path):
    """Return the pickle of a torch archive."""
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
