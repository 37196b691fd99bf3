"""Forecasts are exact for one cast: they equal what really storing the values does."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lightning_stosign.health import check_format, nominal_change, stalled_fraction, stored_values, underflow_fraction
from lightning_stosign.health.forecast import FP4_BLOCK
from lightning_stosign.optim.state_precision import StatePrecision
from lightning_stosign.optim.storage import init_state, read_state, write_state


def tensor(array):
    return torch.from_numpy(np.array(array))


FORECASTS = {
    "fp8-raw": lambda x: 2.0**-10,  # half of E4M3's smallest number, 2**-9, is a tie and goes to the even 0
    "fp8-raw:dtype=float8_e5m2": lambda x: 2.0**-17,
    "float16": lambda x: 2.0**-25,
    "fp8-raw:static_scale=1024": lambda x: 2.0**-20,
    # scale: the smallest power of two s with amax / s <= 448
    "fp8": lambda x: 2.0**-10 * 2.0 ** np.ceil(np.log2(np.abs(x).max() / 448)),
}


@pytest.mark.parametrize("name", FORECASTS)
@given(hnp.arrays(np.float32, 20, elements=st.floats(-(2.0**8), 2.0**8, width=32)))
def test_underflow_counts_the_nonzero_entries_at_most_half_the_smallest_number(name, values):
    # By size, so that hypothesis' values, mostly around 1, meet every format's smallest number.
    values = (values * np.float32(10.0) ** np.arange(-12, 8).clip(max=0)).astype(np.float32)
    values[0] = 256.0
    threshold = FORECASTS[name](values.astype(float))
    lost, nonzero = underflow_fraction(tensor(values), name)
    expected = np.count_nonzero((values != 0) & (np.abs(values.astype(float)) <= threshold))
    assert (lost.item(), nonzero.item()) == (expected, np.count_nonzero(values))


@pytest.mark.parametrize(("degree", "lost"), [(0, 3), (1, 2), (2, 1)])
def test_underflow_applies_the_static_scale_by_the_degree_of_the_state(degree, lost):
    values = torch.tensor([1.0, 2.0**-10, 2.0**-15, 2.0**-21])
    assert underflow_fraction(values, "fp8-raw:static_scale=32", degree)[0].item() == lost


def test_underflow_changes_no_state():
    values = torch.tensor([1.0, 1e-6])
    underflow_fraction(values, "fp8-raw")
    assert torch.equal(values, torch.tensor([1.0, 1e-6]))


FORMATS = [
    *("float32", "bfloat16", "float16", "fp8", "fp8-raw", "fp8-block", "fp8-block:block_size=32"),
    *("fp8:dtype=float8_e5m2", "fp8-raw:dtype=float8_e5m2", "fp8-block:dtype=float8_e5m2", "fp8-raw:static_scale=1024"),
]


def states_like_adam_s(size=1000, seed=0):
    """Magnitudes over twelve decades, with zeros, subnormal numbers and outliers."""
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(size) * 10.0 ** rng.uniform(-12, 0, size)).astype(np.float32)
    values[::17], values[5::101], values[7::211] = 0, 1e-41, 300.0
    return tensor(values)


def really_stored(values, name):
    """What a state of this precision reads back after values were written to it."""
    state, precision = {}, StatePrecision.parse(name)
    init_state(state, "m", values, precision)
    write_state(state, "m", values.clone(), precision)
    return read_state(state, "m", precision)


@pytest.mark.parametrize("name", FORMATS)
def test_underflow_equals_what_a_real_state_loses(name):
    values = states_like_adam_s()
    gone = (really_stored(values, name) == 0) & (values != 0)
    share = underflow_fraction(values, name)
    assert (share.part.item(), share.whole.item()) == (gone.sum().item(), (values != 0).sum().item())


@pytest.mark.parametrize("name", FORMATS)
def test_stalls_equal_what_a_real_state_does_not_take_up(name):
    values = states_like_adam_s()
    change = 0.1 * values.roll(1) - 0.03 * values
    before = really_stored(values, name)
    after = really_stored(before + change, name)
    stuck = (before == after) & (change != 0)
    share = stalled_fraction(values, change, name)
    assert (share.part.item(), share.whole.item()) == (stuck.sum().item(), (change != 0).sum().item())


def test_float32_loses_nothing():
    assert underflow_fraction(states_like_adam_s(), "float32").part == 0


def test_a_second_moment_with_beta2_0_999_stalls_in_fp8_and_one_with_0_9_does_not():
    values = torch.rand(1000) + 0.5
    grad = values.sqrt() * 1.5  # the square is 2.25 times the average
    shares = [
        stalled_fraction(values, nominal_change("exp_avg_sq", values, {"betas": (0.9, beta)}, grad), "fp8").fraction
        for beta in (0.999, 0.9)
    ]
    assert shares[0] == 1.0
    assert shares[1] < 0.1


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = reference.FORMATS["float8_e4m3fn"]


def fp4_by_hand(values, block=16):
    """The format as it is defined, in float64: power-of-two tensor scale, E4M3 block scales, E2M1 values."""
    values = values.astype(float)
    amax = np.abs(values).max()
    tensor_scale = 2.0 ** max(np.ceil(np.log2(amax / (448 * 6))), -126) if amax > 0 else 1.0
    out = np.empty_like(values)
    for start in range(0, values.size, block):
        part = values[start : start + block]
        wanted = max(np.abs(part).max() / 6 / tensor_scale, 2.0**-9)
        scale = reference.round_nearest(np.array([wanted]), E4M3)[0] * tensor_scale
        out[start : start + block] = reference.round_nearest(part / scale, E2M1) * scale
    return out


@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_fp4_is_what_its_definition_says(size, seed):
    values = states_like_adam_s(size, seed)
    values[0] = 7.3
    # Off by a float32 rounding of value / scale at most where that lies on a tie, which these do not.
    np.testing.assert_array_equal(stored_values(values, FP4_BLOCK).double().numpy(), fp4_by_hand(values.numpy()))


@given(hnp.arrays(np.float32, 16, elements=st.integers(-28, 28).map(lambda n: n / 4)))
def test_e2m1_takes_ties_to_even_and_saturates(values):
    values[0] = 6.0
    values = np.clip(values, -6, 6) * np.float32(2.0**-3)
    # amax 6 * 2**-3: the block scale is a power of two, so ties stay ties.
    expected = reference.round_nearest(values * 8.0, E2M1) / 8
    np.testing.assert_array_equal(stored_values(tensor(values), FP4_BLOCK).double().numpy(), expected)


def test_fp4_of_zeros_is_zero_and_of_nan_nan():
    assert stored_values(torch.zeros(20), FP4_BLOCK).tolist() == [0.0] * 20
    assert stored_values(torch.full((3, 3), float("nan")), FP4_BLOCK).isnan().all()


def test_shapes_are_kept():
    for name in (*FORMATS, FP4_BLOCK):
        assert stored_values(torch.rand(3, 5, 7), name).shape == (3, 5, 7)


GRAD = torch.tensor([1.0, -2.0])


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.AdamW, {"betas": (0.8, 0.9)}),
        (torch.optim.Adam, {"betas": (0.8, 0.9), "maximize": True}),
        (torch.optim.Adamax, {"betas": (0.8, 0.9), "eps": 0.0}),
        (torch.optim.SGD, {"momentum": 0.8}),
        (torch.optim.SGD, {"momentum": 0.8, "dampening": 0.5}),
        (torch.optim.SGD, {"momentum": 0.8, "maximize": True}),
        (torch.optim.RMSprop, {"alpha": 0.8, "momentum": 0.0}),
        (torch.optim.Adagrad, {}),
        (torch.optim.Adadelta, {"rho": 0.8}),
        (torch.optim.NAdam, {"betas": (0.8, 0.9)}),
    ],
)
def test_nominal_change_is_what_the_next_step_with_the_same_gradient_does(optimizer, options):
    x = torch.nn.Parameter(torch.ones(2))
    made = optimizer([x], **options)
    x.grad = GRAD.clone()
    made.step()
    x.grad = torch.tensor([0.5, 4.0])
    made.step()
    before = {name: value.clone() for name, value in made.state[x].items()}
    group = made.param_groups[0]
    changes = {name: nominal_change(name, value, group, x.grad) for name, value in before.items()}
    made.step()
    known = {name: change for name, change in changes.items() if change is not None}
    assert known
    for name, change in known.items():
        torch.testing.assert_close(before[name] + change, made.state[x][name])


def test_without_a_gradient_averages_decay():
    change = nominal_change("exp_avg", torch.tensor([2.0, -1.0]), {"betas": (0.75, 0.9)})
    assert change.tolist() == [-0.5, 0.25]


def test_a_state_of_another_name_or_group_has_no_nominal_change():
    assert nominal_change("trend", GRAD, {"betas": (0.9, 0.99)}) is None
    assert nominal_change("exp_avg", GRAD, {"lr": 0.1}) is None


@pytest.mark.parametrize(
    ("format_name", "message"),
    [
        ("fp9", r"'fp9' is unknown; accepted: .*'fp4-block'"),
        ("fp8:stochastic_rounding=true", r"stochastic rounding is not forecast; accepted: rounding to nearest"),
    ],
)
def test_formats_that_cannot_be_forecast_are_refused(format_name, message):
    with pytest.raises(ValueError, match=message):
        check_format(format_name)
