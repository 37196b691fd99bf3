"""examples/parameter_free.py with few steps: its tables and figures. Its claim at full length is a test of ALIAS."""

import re

import parameter_free
import pytest

GPT = {"steps": 12, "seeds": 1, "grid": [1e-3], "context": 16, "batch_size": 2}


@pytest.mark.parametrize(
    ("example", "options", "figure"),
    [
        (parameter_free.logistic, {"steps": 40, "seeds": 1, "points": 3}, "logistic.png"),
        pytest.param(parameter_free.gpt, GPT, "gpt.png", marks=pytest.mark.slow),
    ],
    ids=["logistic", "gpt"],
)
def test_each_method_is_compared_with_the_grid_and_the_finder(example, options, figure, tmp_path, capsys):
    example(**options, out=str(tmp_path))
    printed = capsys.readouterr().out
    for name in parameter_free.METHODS:
        (row, *_) = re.findall(rf"^{re.escape(name)} +([\d.]+) +[-\d.]+% +(\d+) +([\d.]+) +[-\d.]+%$", printed, re.M)
        assert options["steps"] < int(row[1]) <= 2 * options["steps"]
    assert "SignStepSizeFinder suggests" in printed
    assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")
