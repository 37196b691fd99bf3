import collections
import io

import pytest
import torch
from callbacks.fits import Regression
from inspection.checkpoints import lightning_file, save

from lightning_stosign.inspection import inspect_checkpoint
from lightning_stosign.inspection.rows import share_cell
from lightning_stosign.inspection.table import print_series, print_table


def _printed(path):
    file = io.StringIO()
    print_table(inspect_checkpoint(path), file)
    return file.getvalue()


def test_a_file_gets_the_whole_table_without_colours(tmp_path):
    save(tmp_path / "x.ckpt", Regression("adamw"))
    text = _printed(tmp_path / "x.ckpt")
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0].startswith("x.ckpt: Lightning checkpoint, ") and "step 3, epoch 1, Lightning" in lines[0]
    assert lines[1].startswith("AdamW at lr 0.01: 4 parameters, 82 values of state (exp_avg: float32, ")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert [row[0] for row in rows[::2]] == ["first.weight", "first.bias", "head.weight", "head.bias", "all layers"]
    assert rows[0][:4] == ["first.weight", "exp_avg", "24", "33.3%"]
    assert rows[-2][-2:] == ["19.5%", "0%"]  # dead, exploding
    assert rows[-1][:4] == ["", "exp_avg_sq", "41", "19.5%"]


def test_what_was_not_read_is_said(tmp_path):
    assert "Left unread: objects of collections.Counter" in _printed(
        lightning_file(tmp_path / "x.ckpt", hyper_parameters={"layer": collections.Counter("ab")})
    )


def test_a_name_is_not_read_as_markup(tmp_path):
    weights = {"[red]weight[/]\x1b[2J": torch.ones(2)}
    text = _printed(lightning_file(tmp_path / "x.ckpt", state_dict=weights))
    assert "[red]weight[/]\\x1b[2J" in text
    assert "\x1b" not in text


def test_an_optimizer_without_states_is_a_line(tmp_path):
    save(tmp_path / "x.ckpt", Regression("plain-sgd"))
    assert _printed(tmp_path / "x.ckpt").splitlines()[1:] == ["SGD at lr 0.01: 4 parameters; it has no states"]


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0%"), (1e-6, "<0.1%"), (0.001, "0.1%"), (0.5, "50.0%"), (0.9999, ">99.9%"), (1, "100%")],
)
def test_a_share_is_never_rounded_to_none_or_all(share, text):
    assert share_cell(share).text == text
    assert share_cell(share).share == share


def _many(path, number):
    """Write a checkpoint of many parameters, of which the last has the most zeros."""
    params = [torch.nn.Parameter(torch.ones(100)) for _ in range(number)]
    optimizer = torch.optim.AdamW(params)
    for zeros, param in enumerate(params):
        param.grad = torch.ones(100)
        param.grad[:zeros] = 0
    optimizer.step()
    weights = {f"layer.{i}": param for i, param in enumerate(params)}
    return lightning_file(path, state_dict=weights, optimizer_states=[optimizer.state_dict()])


def test_the_worst_twenty_layers_are_shown_first(tmp_path):
    text = _printed(_many(tmp_path / "x.ckpt", 30))
    rows = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert [row for row in rows if row.startswith("layer")] == [f"layer.{i}" for i in range(29, 9, -1)]
    assert "The worst 20 layers; 10 more with --all, or --top N" in text


def test_all_layers_are_shown_in_the_optimizer_s_order(tmp_path):
    file = io.StringIO()
    print_table(inspect_checkpoint(_many(tmp_path / "x.ckpt", 30)), file, top=None)
    rows = [line.split("│")[1].strip() for line in file.getvalue().splitlines() if line.startswith("│")]
    assert [row for row in rows if row.startswith("layer")] == [f"layer.{i}" for i in range(30)]


def test_several_checkpoints_are_a_table_over_steps(tmp_path):
    for step in (20, 3):
        lightning_file(tmp_path / f"{step}.ckpt", global_step=step)
    file = io.StringIO()
    print_series([inspect_checkpoint(tmp_path / f"{step}.ckpt") for step in (20, 3)], file)
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in file.getvalue().splitlines() if line[:1] == "│"
    ]
    assert [row[:3] for row in rows] == [
        ["3", "3.ckpt", "exp_avg"],
        ["3", "3.ckpt", "exp_avg_sq"],
        ["20", "20.ckpt", "exp_avg"],
        ["20", "20.ckpt", "exp_avg_sq"],
    ]
