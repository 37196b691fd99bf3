import copy

import numpy as np
import pytest
import reference
import torch

from lightning_stosign import SignSGD, StatePrecision, StoSignSGD, emulate_state_precision
from lightning_stosign.optim.emulation import state_degree

E4M3 = reference.FORMATS["float8_e4m3fn"]


def step(optimizer, x, seed):
    x.grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) * 0.01
    optimizer.step()


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_states_are_what_the_format_holds_with_second_moments_scaled_twice(scale):
    x = torch.nn.Parameter(torch.zeros(50))
    y = torch.nn.Parameter(torch.zeros(50))
    plain, optimizer = torch.optim.AdamW([y]), torch.optim.AdamW([x])
    emulate_state_precision(optimizer, StatePrecision(torch.float8_e4m3fn, static_scale=scale, min_numel=0))
    step(optimizer, x, 0)
    step(plain, y, 0)
    for name, factor in (("exp_avg", scale), ("exp_avg_sq", scale * scale)):
        expected = reference.round_nearest(plain.state[y][name].double().numpy() * factor, E4M3) / factor
        np.testing.assert_array_equal(optimizer.state[x][name].double().numpy(), expected)


def test_next_step_reads_the_rounded_states():
    x, y = torch.nn.Parameter(torch.zeros(50)), torch.nn.Parameter(torch.zeros(50))
    emulated, by_hand = torch.optim.AdamW([x]), torch.optim.AdamW([y])
    emulate_state_precision(emulated, "fp8:min_numel=0")
    for seed in range(5):
        step(emulated, x, seed)
        step(by_hand, y, seed)
        for name in ("exp_avg", "exp_avg_sq"):
            by_hand.state[y][name].copy_(emulated.state[x][name])
        assert torch.equal(x, y)


def test_removed_handle_ends_the_emulation():
    x = torch.nn.Parameter(torch.zeros(50))
    optimizer = torch.optim.AdamW([x])
    handle = emulate_state_precision(optimizer, "fp8-raw:min_numel=0")
    step(optimizer, x, 0)
    assert bool((optimizer.state[x]["exp_avg_sq"] == 0).all())
    handle.remove()
    step(optimizer, x, 1)
    assert not bool((optimizer.state[x]["exp_avg_sq"] == 0).any())


@pytest.mark.parametrize(
    "cls",
    [
        *(torch.optim.ASGD, torch.optim.Adadelta, torch.optim.Adafactor, torch.optim.Adagrad, torch.optim.Adam),
        *(torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Rprop),
        lambda params: torch.optim.SGD(params, momentum=0.9),
    ],
)
def test_every_torch_optimizer_runs_with_states_of_the_format(cls):
    x = torch.nn.Parameter(torch.ones(6, 5))
    optimizer = cls([x])
    precision = StatePrecision.parse("fp8-raw:static_scale=16,min_numel=0")
    emulate_state_precision(optimizer, precision)
    for seed in range(3):
        step(optimizer, x, seed)
    assert bool(x.isfinite().all())
    for name, value in optimizer.state[x].items():
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            stored = value.double().numpy() * 16.0 ** state_degree(name)
            np.testing.assert_array_equal(reference.round_nearest(stored, E4M3), stored)


@pytest.mark.parametrize("cls", [StoSignSGD, SignSGD])
def test_own_optimizers_are_refused(cls):
    with pytest.raises(ValueError, match="stores its states itself; pass it state_precision"):
        emulate_state_precision(cls([torch.nn.Parameter(torch.zeros(2))]), "fp8:min_numel=0")


@pytest.mark.parametrize(
    ("optimizer", "precision", "error", "message"),
    [
        (torch.nn.Linear(1, 1), "fp8:min_numel=0", TypeError, "optimizer=Linear"),
        (None, "fp9", ValueError, "state_precision='fp9'"),
        (None, "fp8:stochastic_rounding=true,min_numel=0", ValueError, "precision: stochastic_rounding=True"),
    ],
)
def test_bad_argument_is_named(optimizer, precision, error, message):
    optimizer = optimizer or torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(error, match=message):
        emulate_state_precision(optimizer, precision)


def test_a_second_emulation_is_refused_until_the_first_is_removed():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    handle = emulate_state_precision(optimizer, "fp8")
    with pytest.raises(ValueError, match="AdamW's states are emulated in fp8 already; end that by its handle"):
        emulate_state_precision(optimizer, "bfloat16")
    handle.remove()
    emulate_state_precision(optimizer, "bfloat16")


def test_float32_changes_nothing():
    x, y = torch.nn.Parameter(torch.zeros(50)), torch.nn.Parameter(torch.zeros(50))
    plain, emulated = torch.optim.AdamW([x]), torch.optim.AdamW([y])
    emulate_state_precision(emulated, "float32")
    for seed in range(3):
        step(plain, x, seed)
        step(emulated, y, seed)
    assert torch.equal(x, y) and copy.deepcopy(emulated.state[y])["step"] == 3


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.ASGD])
def test_moments_of_a_scalar_parameter_are_rounded_and_its_counters_are_not(cls):
    results = []
    for precision in ("float32", "fp8-raw:min_numel=0"):
        x = torch.nn.Parameter(torch.tensor(1.0))
        optimizer = cls([x])
        emulate_state_precision(optimizer, precision)
        x.grad = torch.tensor(0.3)
        optimizer.step()
        results.append(optimizer.state[x])
    plain, rounded = results
    for name, value in plain.items():
        expected = value
        if name in ("exp_avg", "exp_avg_sq", "ax"):
            expected = torch.tensor(reference.round_nearest(value.double().numpy(), E4M3)).float()
        assert rounded[name] == expected, name


def test_states_of_small_parameters_are_left_alone():
    large, small = (torch.nn.Parameter(torch.ones(n)) for n in (4096, 4095))
    optimizer = torch.optim.AdamW([large, small])
    emulate_state_precision(optimizer, "fp8-raw")
    for x in (large, small):
        x.grad = torch.full_like(x, 0.01)
    optimizer.step()
    assert optimizer.state[large]["exp_avg_sq"].count_nonzero() == 0
    assert optimizer.state[small]["exp_avg_sq"].count_nonzero() == 4095
