"""Forecasts are exact for one cast: they equal what really storing the values does."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lightning_stosign import emulate_state_precision
from lightning_stosign.health import check_format, nominal_change, stalled_fraction, stored_values, underflow_fraction
from lightning_stosign.health.forecast import forecast_rounds, forecasts_rounds, run_rounds
from lightning_stosign.health.sharding import Layout
from lightning_stosign.health.statistics import PART_SIZE
from lightning_stosign.optim.states.state_precision import StatePrecision
from lightning_stosign.optim.states.storage import init_state, read_state, write_state

FORMATS = [
    *("float32", "bfloat16", "float16", "fp8", "fp8-raw", "fp8-block", "fp8-block:block_size=32"),
    *("fp8:dtype=float8_e5m2", "fp8-raw:dtype=float8_e5m2", "fp8-block:dtype=float8_e5m2,block_size=7"),
    *("fp8-raw:static_scale=1024", "fp4-block"),
]


def tensor(array):
    return torch.from_numpy(np.array(array))


def small(name):
    """The format for states of any size."""
    return f"{name}{',' if ':' in name else ':'}min_numel=0"


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


# ---- underflow -------------------------------------------------------------------------------------------------------

THRESHOLDS = {
    "fp8-raw": lambda x: 2.0**-10,  # half of E4M3's smallest number, 2**-9, is a tie and goes to the even 0
    "fp8-raw:dtype=float8_e5m2": lambda x: 2.0**-17,
    "float16": lambda x: 2.0**-25,
    "fp8-raw:static_scale=1024": lambda x: 2.0**-20,
    # scale: the smallest power of two s with amax / s <= 448
    "fp8": lambda x: 2.0**-10 * 2.0 ** np.ceil(np.log2(np.abs(x).max() / 448)),
}


@pytest.mark.parametrize("name", THRESHOLDS)
@given(hnp.arrays(np.float32, 20, elements=st.floats(-(2.0**8), 2.0**8, width=32)))
@settings(max_examples=50)
def test_underflow_counts_the_nonzero_entries_at_most_half_the_smallest_number(name, values):
    # By size, so that hypothesis' values, mostly around 1, meet every format's smallest number.
    values = (values * np.float32(10.0) ** np.arange(-12, 8).clip(max=0)).astype(np.float32)
    values[0] = 256.0
    threshold = THRESHOLDS[name](values.astype(float))
    lost, nonzero = underflow_fraction(tensor(values), small(name))
    expected = np.count_nonzero((values != 0) & (np.abs(values.astype(float)) <= threshold))
    assert (lost.item(), nonzero.item()) == (expected, np.count_nonzero(values))


@pytest.mark.parametrize("size", [1000, PART_SIZE + 1000])
@pytest.mark.parametrize("name", FORMATS)
def test_underflow_equals_what_a_real_state_loses(name, size):
    values = states_like_adam_s(size)
    gone = (really_stored(values, small(name)) == 0) & (values != 0)
    share = underflow_fraction(values, small(name))
    assert (share.part.item(), share.whole.item()) == (gone.sum().item(), (values != 0).sum().item())


@pytest.mark.parametrize(("degree", "lost"), [(0, 3), (1, 2), (2, 1)])
def test_underflow_applies_the_static_scale_by_the_degree_of_the_state(degree, lost):
    values = torch.tensor([1.0, 2.0**-10, 2.0**-15, 2.0**-21])
    assert underflow_fraction(values, small("fp8-raw:static_scale=32"), degree)[0].item() == lost


@pytest.mark.parametrize("name", ["fp8-raw", "fp8", "fp8-block", "fp4-block"])
def test_underflow_equals_the_zeros_that_emulation_makes_of_adamw_s_states(name):
    torch.manual_seed(0)
    x, y = (torch.nn.Parameter(torch.zeros(96, 64)) for _ in range(2))
    plain, emulated = torch.optim.AdamW([x]), torch.optim.AdamW([y])
    emulate_state_precision(emulated, name)
    x.grad = torch.randn(96, 64) * torch.logspace(-6, 0, 64)
    y.grad = x.grad.clone()
    plain.step()
    emulated.step()
    for state in ("exp_avg", "exp_avg_sq"):
        values = plain.state[x][state]
        zeros = (emulated.state[y][state] == 0).sum() - (values == 0).sum()
        degree = 2 if state == "exp_avg_sq" else 1
        assert underflow_fraction(values, name, degree).part == zeros


def test_underflow_changes_no_state():
    values = torch.tensor([1.0, 1e-6])
    underflow_fraction(values, small("fp8-raw"))
    assert torch.equal(values, torch.tensor([1.0, 1e-6]))


@pytest.mark.parametrize("name", ["fp8-raw", "fp4-block"])
@pytest.mark.parametrize(("size", "lost"), [(4095, 0), (4096, 4095)])
def test_states_too_small_to_be_stored_so_lose_nothing(name, size, lost):
    values = torch.full((size,), 1e-12)
    values[0] = 1.0
    assert underflow_fraction(values, name).part.item() == lost


def test_nothing_loses_nothing():
    share = underflow_fraction(torch.zeros(0), small("fp8"))
    assert (share.part.item(), share.whole.item(), share.fraction.item()) == (0, 0, 0)


# ---- stalls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1000, PART_SIZE + 1000])
@pytest.mark.parametrize("name", FORMATS)
def test_stalls_equal_what_a_real_state_does_not_take_up(name, size):
    values = states_like_adam_s(size)
    change = 0.1 * values.roll(1) - 0.03 * values
    before = really_stored(values, small(name))
    after = really_stored(before + change, small(name))
    stuck = (before == after) & (change != 0)
    share = stalled_fraction(values, change, small(name))
    assert (share.part.item(), share.whole.item()) == (stuck.sum().item(), (change != 0).sum().item())


def test_stalls_use_the_scale_of_the_changed_state():
    # The change of the last value doubles the scale, with which the first two are even.
    values, change = torch.tensor([0.25, 0.5, 448.0]), torch.tensor([0.01, 0.01, 448.0])
    stored = really_stored(really_stored(values, small("fp8")) + change, small("fp8"))
    assert stored.tolist() == [0.25, 0.5, 896.0]
    assert stalled_fraction(values, change, small("fp8")).part.item() == 2


def test_a_second_moment_with_beta2_0_999_stalls_in_fp8_and_one_with_0_9_does_not():
    values = torch.rand(5000) + 0.5
    grad = values.sqrt() * 1.5  # the square is 2.25 times the average
    shares = [
        stalled_fraction(values, nominal_change("exp_avg_sq", values, {"betas": (0.9, beta)}, grad), "fp8").fraction
        for beta in (0.999, 0.9)
    ]
    assert shares[0] == 1.0
    assert shares[1] < 0.1


@pytest.mark.parametrize("with_change", [False, True])
def test_formats_looked_at_together_are_forecast_as_each_alone(with_change):
    values = states_like_adam_s(PART_SIZE + 1000)
    change = (lambda part: 0.1 * values.roll(1)[part]) if with_change else None
    names, layout = [small(name) for name in FORMATS], Layout(values.numel())
    together = run_rounds([forecasts_rounds(values, layout, names, 1, change)])[0]
    assert together == run_rounds([forecast_rounds(values, layout, name, 1, change) for name in names])


def test_nan_stalls_nothing_and_what_does_not_change_does_not_stall():
    values, change = torch.tensor([float("nan"), 1.0, 1.0]), torch.tensor([0.0, 0.0, 1e-4])
    for name in FORMATS[:5]:
        lost, changing = stalled_fraction(values[1:], change[1:], small(name))
        assert (lost.item(), changing.item()) == (float(name != "float32"), 1)
        assert stalled_fraction(values[:1], change[:1], small(name)).part.item() == 0


def test_states_that_ask_for_gradients_are_forecast():
    values = torch.tensor([1.0, 1e-6]).requires_grad_()
    assert underflow_fraction(values, small("fp8-raw")).part.item() == 1


# ---- shards ----------------------------------------------------------------------------------------------------------


def over_ranks(values, change, name, cuts):
    """The sum of what each of several ranks finds, whose values end at the cuts."""
    bounds = [0, *cuts, values.numel()]
    ranks = []
    for start, end in itertools.pairwise(bounds):
        own, own_change = values[start:end], change[start:end]
        layout = Layout(values.numel(), start, tuple(cuts))
        ranks.append(forecast_rounds(own, layout, name, 1, lambda part, own_change=own_change: own_change[part]))
    results, answer = [], None
    while not results:
        asked = []
        for rank in ranks:
            try:
                asked.append(rank.send(answer))
            except StopIteration as stop:
                results.append(stop.value)
        answer = torch.stack(asked).amax(dim=0) if asked else None
    assert len(results) == len(ranks)
    return [sum(r.underflow.part for r in results), sum(r.stalled.part for r in results)]


@pytest.mark.parametrize("name", [small(name) for name in FORMATS])
@pytest.mark.parametrize("size", [5000, PART_SIZE + 1000])
def test_ranks_with_shards_find_together_what_one_rank_finds(name, size):
    # Cuts within blocks, at a block's end, two within one block, and a rank without values.
    cuts = (1003, 1005, 1280, 1280, size - 3)
    values = states_like_adam_s(size)
    change = 0.1 * values.roll(1) - 0.03 * values
    expected = [underflow_fraction(values, name).part, stalled_fraction(values, change, name).part]
    assert over_ranks(values, change, name, cuts) == expected


def test_shapes_are_kept():
    for name in FORMATS:
        assert stored_values(torch.rand(30, 5, 70), name).shape == (30, 5, 70)


@pytest.mark.parametrize(
    ("format_name", "message"),
    [
        ("fp9", r"'fp9' is unknown; accepted: .*fp4-block"),
        ("fp8:stochastic_rounding=true", r"stochastic rounding is not forecast; accepted: rounding to nearest"),
    ],
)
def test_formats_that_cannot_be_forecast_are_refused(format_name, message):
    with pytest.raises(ValueError, match=message):
        check_format(format_name)
