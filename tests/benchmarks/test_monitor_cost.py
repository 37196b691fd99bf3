import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "monitor_cost.py"


@pytest.mark.slow
def test_the_cost_on_many_small_tensors_is_printed():
    command = [sys.executable, str(SCRIPT), "--model=forecaster", "--rounds=1"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True).stdout
    assert "in 136 tensors" in printed
    assert re.search(r"logging every 50th step adds -?[\d.]+% to training", printed)
