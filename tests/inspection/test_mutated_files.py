"""Thousands of damaged checkpoints: one line each, in bounded time and memory, and nothing in them runs."""

import os
import random
import resource
import time
import zipfile

import pytest
import torch
from inspection.checkpoints import touch_by
from inspection.written_by import FORMATS, trained

from lightning_stosign.cli import main

MUTATIONS = int(os.environ.get("MUTATIONS", "200"))  # of each file; 3,400 make the 20,000 of the promise
_WORDS = (b"\x00", b"\xff", b"\x7f\xff\xff\xff", b"\xff" * 8, b"{", b"]", b"R", b"b", b"PK\x03\x04", b"9" * 20, b"../")


def _written(folder, format, optimizer="AdamW"):
    net, live = trained(optimizer)
    folder.mkdir()
    return FORMATS[format][0](folder, net, live)


def _deflated(folder):
    """A file of torch, compressed: sizes that a zip only claims are another kind of lie."""
    path = _written(folder, "nanoGPT")
    packed = path.with_name("packed.pt")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return packed


def _calling(folder):
    """A pickle that would create the canary."""
    folder.mkdir()
    torch.save({"model": {}, "optimizer": touch_by("os.system", folder.parent / "canary")}, folder / "calls.pt")
    return folder / "calls.pt"


FILES = {
    "zip and pickle": lambda folder: _written(folder, "Lightning `.ckpt`"),
    "deflated": _deflated,
    "before zip": lambda folder: _written(folder, "torch before 1.6"),
    "safetensors": lambda folder: _written(folder, "safetensors of states"),
    "metadata of DCP": lambda folder: _written(folder, "DCP"),
    "calls": _calling,
}


def _mutated(data, rng):
    data = bytearray(data)
    # Heads, tails and pickles say what the rest is: they are hit more often than their size would have it.
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not data:
            break
        at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 2000))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            word = rng.choice(_WORDS)
            data[at : at + len(word)] = word
        elif kind == 3:
            del data[at : at + rng.choice((1, 4, 100))]
        elif kind == 4:
            data[at:at] = data[at : at + rng.choice((1, 16, 500))]
        else:
            del data[at + 1 :]
    return bytes(data)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FILES)
def test_a_mutated_file_gets_a_table_or_one_line(tmp_path, kind, capsys):
    original = FILES[kind](tmp_path / "original")
    target = original / ".metadata" if original.is_dir() else original
    data, rng = target.read_bytes(), random.Random(kind)
    canary = tmp_path / "canary"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    limit = 4 * len(data) + 200 * 2**20
    codes = []
    for _ in range(MUTATIONS):
        target.write_bytes(_mutated(data, rng))
        started = time.process_time()
        codes.append(main(["inspect", str(original), "--json"]))
        assert time.process_time() - started < 10
        error = capsys.readouterr().err
        assert codes[-1] in (0, 2) and (codes[-1] == 2) == (error.count("\n") == 1), error
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < limit
        assert not canary.exists()
    # The mutations do reach what matters, and not all of them. Compressed archives and calls are never shown.
    assert 2 in codes and (kind in ("calls", "deflated") or 0 in codes)
