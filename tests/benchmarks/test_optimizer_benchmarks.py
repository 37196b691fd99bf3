"""The optimizer benchmarks on tiny parameters: the tables are printed, and each figure is what it says."""

import math
import re

import first_step
import optimizer_scaling
import optimizer_step
import optimizers
import pytest
import torch

TINY = {"layers": 1, "width": 16, "vocabulary": 50, "one": 4096, "rounds": 2, "compilation": False}
EAGER = ["AdamW*", "SGD*", "pytorch_optimizer*", "*eager*"]  # what compiles would take seconds


def test_gpt2_has_gpt2_s_parameters():
    assert len(optimizers.gpt2_shapes()) == 148
    assert sum(math.prod(shape) for shape in optimizers.gpt2_shapes()) == 124_439_808


@pytest.mark.filterwarnings("ignore")
def test_table_has_a_row_for_each_optimizer_and_the_bytes_of_its_states(capsys):
    optimizer_step.benchmark(optimizers=EAGER, **TINY)
    rows = re.findall(r"^(\S.*?) +[\d.]+ +[\d.]+ +\([\d. -]+\) +([\d.]+) +[\d.]+ +- +-$", capsys.readouterr().out, re.M)
    names = list(optimizers.choose(EAGER))
    assert [name for name, _ in rows] == 2 * names  # GPT-2, then one tensor
    of_one_tensor = dict(rows[len(names) :])
    assert of_one_tensor["AdamW, fused"] == "8.00"
    assert of_one_tensor["SGD momentum, fused"] == "4.00"
    assert of_one_tensor["StoSignSGD, eager, fp8"] == "2.00"


def test_time_is_taken_in_turn_and_the_first_rounds_do_not_count(monkeypatch):
    order = []

    def seconds(action, device):
        order.append(type(action.__self__).__name__)
        action()
        return float(len(order))

    monkeypatch.setattr(optimizer_step, "seconds", seconds)
    params = optimizers.parameters([(8,)])
    of_optimizer, of_baseline, states = optimizer_step.time_in_turn(torch.optim.Adagrad, params, 3, "cpu")
    assert order == ["AdamW", "Adagrad"] * 5
    assert (of_optimizer, of_baseline, states) == ([6.0, 8.0, 10.0], [5.0, 7.0, 9.0], 32)


def test_slope_is_the_exponent_of_the_growth():
    assert optimizer_scaling.slope([1e6, 4e6, 9e6], [2.0, 16.0, 54.0]) == pytest.approx(1.5)


def test_scaling_table_reports_time_extra_memory_and_growth(capsys):
    optimizer_scaling.benchmark(optimizers=["AdamW, fused"], sizes=[1], rounds=2, steps=20)
    assert re.search(r"^AdamW, fused +[\d.]+ +- +[\d.]+ +-?[\d.]+$", capsys.readouterr().out, re.MULTILINE)


def test_a_step_s_extra_memory_is_found():
    class Wasteful(torch.optim.SGD):
        def step(self, closure=None):
            torch.ones(64 << 18)  # 64 MiB

    _, _, extra = optimizer_scaling.measure(Wasteful, 1, 1)
    assert 60 < extra < 70


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optimizers.choose(["nothing"]), "optimizers=.'nothing'. match none; accepted: AdamW, fused, "),
        (lambda: optimizer_scaling.benchmark(sizes=[7]), r"sizes=\[7\] are not among"),
    ],
)
def test_unknown_choice_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_compilation_is_timed_in_fresh_processes():
    cold, warm = first_step.compile_seconds("StoSignSGD, fused", 1, 16, 50)
    assert cold > warm > 0
