"""The notebook's cells, run one after another with few steps."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "collapse.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def commands(steps):
    lines = [line[1:] for source in CODE for line in source.splitlines() if line.startswith("!")]
    return [line.replace("{STEPS}", str(steps)) for line in lines]


def test_each_cell_is_a_command_a_magic_or_python():
    assert not any(cell["outputs"] for cell in CELLS if cell["cell_type"] == "code")
    for source in CODE:
        compile(re.sub(r"^[!%].*$", "pass", source, flags=re.MULTILINE), "cell", "exec")
    assert sum(line.startswith("%") for source in CODE for line in source.splitlines()) == 3  # pip, two of TensorBoard


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_commands_run(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    printed = []
    for command in commands(steps=100):
        ran = subprocess.run(
            command, shell=True, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        printed.append(ran.stdout)
    assert "validation loss" in printed[0] and (tmp_path / "runs/demo/demo.png").exists()
    assert "exp_avg_sq" in printed[1]
    assert len(printed[2].splitlines()) == 4  # a line of each run
