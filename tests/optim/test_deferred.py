"""Gradients that the host does not wait for, as on an accelerator; here on the CPU, where the answer is as late."""

import pytest
import torch
from torch import nn

from lightning_stosign import SignSGD, StatePrecision, StoSignSGD
from lightning_stosign.optim import low_precision
from lightning_stosign.optim.states.storage import read_state

# Together in a batch, alone in chunks, and with a scale.
SHAPES = [(5,), (300,), (130, 129)]


@pytest.fixture(autouse=True)
def deferred(monkeypatch):
    monkeypatch.setattr(low_precision, "defers", lambda jobs: True)


def set_up(cls=StoSignSGD, **options):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    return params, cls(params, lr=0.1, weight_decay=0.1, **options)


def step(params, optimizer, seed, bad=None):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    if bad is not None:
        params[1].grad[7] = bad
    optimizer.step()


def snapshot(params, optimizer):
    """Copies of the values of parameters and states: a block's scale may shrink when the same values are stored."""
    spec = optimizer.param_groups[0]["state_precision"] or "float32"
    values = [
        (name, read_state(state, name, StatePrecision.parse(spec)).clone())
        for state in optimizer.state.values()
        for name in ("exp_avg", "exp_inf")
        if name in state
    ]
    return [p.detach().clone() for p in params], values


def assert_same(one, other):
    assert all(torch.equal(p, q) for p, q in zip(one[0], other[0], strict=True))
    for (name, value), (_, expected) in zip(one[1], other[1], strict=True):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stochastic": False, "betas": (0.9, 0.9)},
        {"state_precision": "fp8:stochastic_rounding=true"},
        {"state_precision": "fp8-block"},
        {"cls": SignSGD},
        {"fused": True},
    ],
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_step_with_a_bad_value_changes_nothing_and_the_next_one_raises(options, bad):
    params, optimizer = set_up(**options)
    step(params, optimizer, 1)
    before = snapshot(params, optimizer)
    step(params, optimizer, 2, bad)
    assert_same(snapshot(params, optimizer), before)
    with pytest.raises(RuntimeError, match=r"the gradient of params\[1\] of group 0 \[300\] is not finite"):
        step(params, optimizer, 3)
    assert_same(snapshot(params, optimizer), before)
    step(params, optimizer, 3)  # told once
    assert not torch.equal(params[0], before[0][0])


def test_skipped_step_warns_at_the_next_one_which_is_taken():
    params, optimizer = set_up(on_nonfinite="skip")
    step(params, optimizer, 1, float("inf"))
    with pytest.warns(RuntimeWarning, match="this step was skipped"):
        step(params, optimizer, 2)
    assert optimizer.state[params[0]]["exp_inf"].count_nonzero() == 5


@pytest.mark.parametrize("options", [{}, {"state_precision": "fp8"}, {"cls": SignSGD, "fused": True}])
def test_finite_steps_are_those_that_were_waited_for(options, monkeypatch):
    params, optimizer = set_up(**options)
    step(params, optimizer, 1)
    step(params, optimizer, 2)
    monkeypatch.setattr(low_precision, "defers", lambda jobs: False)
    others, waiting = set_up(**options)
    step(others, waiting, 1)
    step(others, waiting, 2)
    assert_same(snapshot(params, optimizer), snapshot(others, waiting))
