"""Delayed scaling over two processes: both have the histories of all that either saw."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.mark.usefixtures("te")
def test_replicas_with_other_data_have_equal_histories_of_the_larger_values(tmp_path: Any) -> None:
    script = Path(__file__).with_name("te_ddp_script.py")
    result = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    seen = torch.stack([first.pop("seen"), second.pop("seen")])
    assert (seen[1] > 10 * seen[0]).all()
    assert first.keys() == second.keys()
    assert len(first) == 8
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    # Row 0 gathers the current step; the newest of the others is the last.
    inputs = first["body.0.scaling_fwd.history"][:, 0]
    torch.testing.assert_close(inputs[-4:], seen.amax(0))
    assert inputs[0] == 0
