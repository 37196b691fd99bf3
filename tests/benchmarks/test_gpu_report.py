"""The GPU report: it says that there is no GPU, and its table can be made on any device."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_machine_without_a_gpu_gets_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "gpu_report.py", "--out", tmp_path / "report.md"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1] == "no CUDA or ROCm GPU: nothing to report" and not ran.stdout
    assert not (tmp_path / "report.md").exists()


def test_table_has_a_row_for_each_optimizer():
    from gpu_report import compared, machine, rows, table

    makes = {name: make for name, make in compared().items() if name.startswith(("AdamW", "StoSignSGD, f"))}
    found = rows(makes, [(64, 96), (96,)], rounds=2, device="cpu")
    text = table(found)
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == list(makes)
    by_name = {row[0]: row for row in found}
    assert by_name["StoSignSGD, fp8-raw"][4] < by_name["StoSignSGD, float32"][4] == 8
    assert torch.__version__ in machine("cpu")
