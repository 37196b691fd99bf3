"""Optimizers that wrap others are looked through; quantised states are not emulated."""

import pytest
import pytorch_optimizer
import torch
from torch import nn

from lightning_stosign import ALIAS, SignConverted, StoSignSGD, emulate_state_precision
from lightning_stosign.health import read_moments
from lightning_stosign.health.snapshot import Snapshot, parameters_of
from lightning_stosign.optim.emulation import state_degree


class Wrapper(torch.optim.Optimizer):
    """A user's own, which keeps its inner optimizer in a list."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = [inner]

    def step(self, closure=None):
        return self.inner[0].step(closure)


WRAPPERS = {
    "Lookahead": pytorch_optimizer.Lookahead,
    "TRAC": pytorch_optimizer.TRAC,
    "OrthoGrad": pytorch_optimizer.OrthoGrad,
    "a user's": Wrapper,
    "two of them": lambda inner: Wrapper(pytorch_optimizer.Lookahead(inner)),
}

each_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def train(model, optimizer, steps=3):
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 4)


@each_wrapper
@pytest.mark.parametrize("inner", [torch.optim.AdamW, lambda p: StoSignSGD(p, state_precision="fp8:min_numel=0")])
def test_moments_of_the_inner_optimizer_are_read(wrap, inner):
    model = linear()
    inner = inner(model.parameters())
    optimizer = wrap(inner)
    train(model, optimizer)
    moments = read_moments(optimizer, model.weight, optimizer.param_groups[0])
    expected = read_moments(inner, model.weight, inner.param_groups[0])
    assert moments.states.keys() == expected.states.keys() >= {"exp_avg"}
    assert moments.decisive_names == expected.decisive_names
    assert moments.stochastic_sign == expected.stochastic_sign
    assert all(torch.equal(value, expected.states[name]) for name, value in moments.states.items())


@each_wrapper
def test_states_of_the_inner_optimizer_are_emulated(wrap):
    model = linear()
    optimizer = wrap(torch.optim.AdamW(model.parameters()))
    emulate_state_precision(optimizer, "fp8-raw:min_numel=0")
    train(model, optimizer)
    stored = read_moments(optimizer, model.weight, optimizer.param_groups[0]).states["exp_avg"]
    assert torch.equal(stored, stored.to(torch.float8_e4m3fn).float()) and bool(stored.any())


def test_zero_redundancy_optimizer_is_looked_through(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        model = linear()
        optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW)
        train(model, optimizer)
        moments = read_moments(optimizer, model.weight, optimizer.param_groups[0])
        assert set(moments.states) == {"exp_avg", "exp_avg_sq"} and moments.decisive_names == {"exp_avg_sq"}
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "decisive"),
    [
        ("AdaBelief", {"exp_avg_var"}),
        ("ScheduleFreeAdamW", {"exp_avg_sq"}),
        ("CAME", {"exp_avg_sq_row", "exp_avg_sq_col"}),
        ("AdaFactor", {"exp_avg_sq_row", "exp_avg_sq_col"}),
    ],
)
def test_second_moments_are_known_by_all_their_names(name, decisive):
    model = linear()
    optimizer = getattr(pytorch_optimizer, name)(model.parameters())
    train(model, optimizer)
    moments = read_moments(optimizer, model.weight, optimizer.param_groups[0])
    assert moments.decisive_names == decisive
    assert {state for state in moments.states if state_degree(state) == 2} == decisive


class FakeAdam8bit(torch.optim.Adam):
    """By its name."""


def uint8_state(params):
    optimizer = torch.optim.AdamW(params)
    for param in optimizer.param_groups[0]["params"]:
        optimizer.state[param]["state1"] = torch.zeros(4, dtype=torch.uint8)
    return optimizer


def torchao(name):
    return lambda params: getattr(pytest.importorskip("torchao.optim"), name)(params)


@pytest.mark.parametrize(
    "make",
    [
        torchao("AdamW8bit"),
        torchao("AdamWFp8"),
        torchao("AdamW4bit"),
        FakeAdam8bit,
        uint8_state,
        lambda params: Wrapper(torchao("AdamW8bit")(params)),
        lambda params: SignConverted(params, torchao("AdamW8bit")),
    ],
)
def test_what_is_quantised_already_is_refused_by_name(make):
    # torchao's steps compile themselves: what is tested here does not.
    with torch.compiler.set_stance("force_eager"):
        optimizer = make(list(nn.Linear(64, 64).parameters()))
    with pytest.raises(ValueError, match=r"optimizer: \w+ keeps quantised states itself"):
        emulate_state_precision(optimizer, "fp8")


@pytest.mark.parametrize("emulated", [False, True])
def test_a_precision_that_no_parameter_is_large_enough_for_says_so_once(emulated):
    params = [nn.Parameter(torch.ones(8, 64)), nn.Parameter(torch.ones(64, 8))]
    with pytest.warns(
        UserWarning, match=r"state_precision='fp8' has no effect: the largest of 2 .* 512 values"
    ) as said:
        if emulated:
            emulate_state_precision(torch.optim.AdamW(params), "fp8")
        else:
            StoSignSGD(params, state_precision="fp8")
    assert len(said) == 1


def test_the_step_size_that_alias_finds_is_recorded():
    x = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = ALIAS([x])

    def closure():
        optimizer.zero_grad()
        loss = x.square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    snapshot = Snapshot()
    for index, (param, group) in enumerate(parameters_of(optimizer)):
        snapshot.add_states(str(index), read_moments(optimizer, param, group))
    assert snapshot.records(per_layer=False)[0]["step_size"] == pytest.approx(
        float(optimizer.param_groups[0]["step_size"])
    )
