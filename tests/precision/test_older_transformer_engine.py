"""All tests of Transformer Engine's classes on an older version, installed into a folder of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import te_cpu


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version", ["2.14.0"])
def test_an_older_version_passes_the_same_tests(version: str, tmp_path: Path) -> None:
    wheel = f"transformer-engine=={version}"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), wheel]
    if (installed := subprocess.run(install, capture_output=True, text=True)).returncode != 0:
        pytest.skip(f"pip cannot install {wheel} here: {installed.stderr.strip()[-200:]}")
    here = Path(__file__).parent
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    options = ["-q", "-rs", "-p", "no:cacheprovider", "-m", "not slow"]
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *map(str, sorted(here.glob("test_te_*.py")))],
        env={**os.environ, "PYTHONPATH": path, te_cpu.VARIABLE: "1", "OMP_NUM_THREADS": "1"},
        cwd=here.parents[1],
        capture_output=True,
        text=True,
    )
    assert tests.returncode == 0, tests.stdout[-4000:]
    assert int(tests.stdout.split(" passed")[0].split()[-1].removeprefix(", ")) > 400
