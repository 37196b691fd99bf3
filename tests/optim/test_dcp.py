"""torch.distributed.checkpoint keeps a promotion, flattened or not, in one process and in two."""

import subprocess
import sys

import dcp_runs
import pytest

from lightning_stosign.optim.states.state_precision import StatePrecision, override_of, precision_of


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flatten", [True, False], ids=["flattened", "nested"])
@pytest.mark.parametrize("make", dcp_runs.MAKES.values(), ids=dcp_runs.MAKES.keys())
def test_a_promoted_optimizer_is_saved_and_continues_bit_for_bit(make, flatten, tmp_path):
    dcp_runs.through_dcp(make, None, tmp_path, flatten)


def test_a_promoted_optimizer_of_two_processes_is_saved_and_continues_bit_for_bit(tmp_path):
    command = [sys.executable, dcp_runs.__file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path), "2"], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors


@pytest.mark.parametrize("name", ["fp8", "fp8-block:block_size=64,min_numel=0", "fp8-raw:static_scale=1024.0"])
def test_a_precision_in_a_state_is_one_number_or_as_in_older_checkpoints_bytes(name):
    precision = StatePrecision.parse(name)
    for held in (override_of(precision), str(precision).encode()):
        assert precision_of({"state_precision": held}, {}) == precision
