"""Under FSDP2 and DDP with two processes the numbers are those of one process."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sharded_script

SCRIPT = Path(sharded_script.__file__)


def records(folder):
    """Return {(step, tag): value} of a CSVLogger."""
    with (folder / "metrics.csv").open() as file:
        return {
            (row["step"], tag): float(value)
            for row in csv.DictReader(file)
            for tag, value in row.items()
            if value and tag.startswith(("optimizer_state/", "per_layer_"))
        }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    sharded_script.run(folder, "single")
    return folder


@pytest.fixture(scope="module", params=["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def together(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, str(SCRIPT), str(folder), request.param]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    return folder


def test_the_monitor_logs_what_it_logs_in_one_process(alone, together):
    expected, found = records(alone), records(together)
    assert found.keys() == expected.keys()
    different = {key: (found[key], value) for key, value in expected.items() if not same(found[key], value)}
    assert not different


def test_these_numbers_were_not_trivial(alone):
    last = {tag: value for (step, tag), value in records(alone).items() if step == "2"}
    prefix = "optimizer_state/"
    assert 0.01 < last[prefix + "zero_fraction/exp_avg_sq"] < 0.9
    for kind in ("underflow_fraction", "stalled_fraction"):
        shares = [last[f"{prefix}{kind}/exp_avg_sq/{name}"] for name in ("fp8", "fp8-raw", "fp8-block", "fp4-block")]
        assert len(set(shares)) == 4 and min(shares) > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_computes_the_torchmetrics_of_one_process(alone, together, rank):
    expected = json.loads((alone / "rank0.json").read_text())
    found = json.loads((together / f"rank{rank}.json").read_text())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


def same(a, b):
    return (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)
