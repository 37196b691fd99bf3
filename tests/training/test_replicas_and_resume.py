"""Whole runs in processes of their own: replicas stay identical, and a killed run resumes bit for bit."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("train_script.py")


def start(folder, *options):
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *options], capture_output=True, text=True, timeout=240
    )


def finished(folder, *options, rank=0):
    result = start(folder, *options)
    assert result.returncode == 0, result.stderr
    return torch.load(folder / f"rank{rank}.pt", weights_only=True)


def assert_same_weights(a, b):
    assert a["weights"].keys() == b["weights"].keys()
    for name, weight in a["weights"].items():
        assert torch.equal(weight, b["weights"][name]), name


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [
        ("stosign", "fp8:stochastic_rounding=true,min_numel=0"),
        pytest.param("sign-adamw", "bfloat16:min_numel=0", marks=pytest.mark.slow),
        pytest.param("muon-sign", "fp8:stochastic_rounding=true,min_numel=0", marks=pytest.mark.slow),
        *(
            pytest.param(name, "float32", marks=pytest.mark.slow)
            for name in ("signsgd", "sign-adamax", "muon", "alias", "online-to-nonconvex")
        ),
    ],
)
def test_replicas_stay_identical_with_dropout_and_different_data(tmp_path, optimizer, precision):
    first = finished(tmp_path, "--devices=2", f"--optimizer={optimizer}", f"--precision={precision}")
    second = torch.load(tmp_path / "rank1.pt", weights_only=True)
    assert len(first["losses"]) == 50
    assert not any(a == b for a, b in zip(first["losses"], second["losses"], strict=True))
    assert_same_weights(first, second)


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [
        ("stosign", "fp8:stochastic_rounding=true,min_numel=0"),
        pytest.param("stosign", "fp8-raw:static_scale=1024,min_numel=0", marks=pytest.mark.slow),
        pytest.param("signsgd", "fp8-block:min_numel=0", marks=pytest.mark.slow),
        pytest.param("sign-adamw", "bfloat16:min_numel=0", marks=pytest.mark.slow),
        pytest.param("adamw", "fp8:min_numel=0", marks=pytest.mark.slow),  # through the emulation
        pytest.param("muon", "bfloat16:min_numel=0", marks=pytest.mark.slow),
        pytest.param("muon-sign", "fp8:stochastic_rounding=true,min_numel=0", marks=pytest.mark.slow),
    ],
)
def test_run_killed_at_step_30_resumes_from_step_20_bit_for_bit(tmp_path, optimizer, precision):
    options = f"--optimizer={optimizer}", f"--precision={precision}"
    uninterrupted = finished(tmp_path / "whole", *options)
    killed = start(tmp_path / "killed", *options, "--die_after=30")
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["step=20.ckpt"]
    resumed = finished(tmp_path / "killed", *options, f"--resume={tmp_path / 'killed' / 'step=20.ckpt'}")
    assert resumed["losses"] == uninterrupted["losses"][20:]
    assert_same_weights(resumed, uninterrupted)
