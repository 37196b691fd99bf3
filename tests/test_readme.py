"""What the README shows is what the package does."""

import re
from pathlib import Path

import pytest
import torch
from torch.optim import Optimizer

import lightning_stosign

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_example_runs_and_its_model_configures_its_optimizer():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope = {}
    exec(compile(code.replace("...", "self.layer = __import__('torch').nn.Linear(4, 2)"), "README.md", "exec"), scope)
    model = scope["Model"]()
    model.trainer = scope["trainer"]
    scope["trainer"].fit_loop.setup_data = lambda: None  # the steps are given by max_steps, there are no data
    scope["trainer"].fit_loop.max_epochs = -1
    optimizer = model.configure_optimizers()["optimizer"]
    assert isinstance(optimizer, Optimizer)
    assert scope["trainer"].precision_plugin.exclude == ("*head*",)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert isinstance(optimizer, lightning_stosign.StoSignSGD) and torch.is_tensor(model.layer.weight)


@pytest.mark.parametrize("name", [n for n in lightning_stosign.__all__ if not n.endswith("Error")])
def test_public_name_is_in_the_readme(name):
    assert f"`{name}" in README


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.M))))
def test_make_target_of_the_readme_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:examples|benchmarks)/[\w.]+\.\w+", README))))
def test_file_of_the_readme_exists(path):
    assert (ROOT / path).stat().st_size > 0


RESULTS = ROOT / "benchmarks" / "results" / "RESULTS.md"


def rows(text):
    """Each table row of a Markdown text as a list of cells."""
    return [
        [cell.strip() for cell in line.strip("| \n").split("|")] for line in text.splitlines() if line.startswith("|")
    ]


# Each figure that the README or a guide quotes, and the row of RESULTS.md that it must be in: the row's first cells.
QUOTED = {
    "0.814": ("AdamW", "0.008"),
    "-0.008 ± 0.011": ("StoSignSGD", "0.001"),
    "1.746 ± 0.010": ("Muon", "0.032"),
    "2.232 ± 0.002": ("AdamW", "0.002"),
}


@pytest.mark.parametrize(("figure", "row"), QUOTED.items())
def test_quoted_figure_is_in_the_row_that_it_names(figure, row):
    assert figure in README
    matching = [cells for cells in rows(RESULTS.read_text()) if tuple(cells[: len(row)]) == row]
    assert any(figure in cell for cells in matching for cell in cells), matching


def figures(text):
    """Losses, ratios and shares: numbers of two decimals or more, and percentages, that are not code or a paper's."""
    prose = re.sub(r"```.*?```|`[^`\n]*`|\d{4}\.\d{5}", "", text, flags=re.DOTALL)
    return set(re.findall(r"(?<![\w.])\d+\.\d{2,}(?![\d.])|(?<![\w.])\d+(?:\.\d+)?(?=%)", prose))


def test_every_measured_figure_is_in_the_results():
    measured = set(re.findall(r"\d+(?:\.\d+)?", RESULTS.read_text()))
    of_the_paper = {"1.44", "2.14"}
    settings = {"3.10"}  # Python
    assert figures(README) - measured - of_the_paper - settings == set()
