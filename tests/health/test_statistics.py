import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lightning_stosign.health import (
    coordinate_health,
    noise_intensity,
    state_statistics,
)
from lightning_stosign.health.statistics import abs_max, square_sum

NAN, INF = float("nan"), float("inf")
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)

# Zeros and subnormal numbers among the rest, as in a state that is dying.
finite = st.one_of(
    st.just(0.0),
    st.just(-0.0),
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.floats(-(2.0**-126), 2.0**-126, width=32, allow_subnormal=True),
)
shapes = hnp.array_shapes(min_dims=0, max_dims=3, max_side=6)
states = hnp.arrays(np.float32, shapes, elements=finite)


def tensor(array):
    return torch.from_numpy(np.array(array))


def pair_of_states():
    return shapes.flatmap(
        lambda shape: st.tuples(
            hnp.arrays(np.float32, shape, elements=finite), hnp.arrays(np.float32, shape, elements=finite)
        )
    )


@given(states)
def test_zeros_are_counted_whatever_their_sign_and_subnormals_are_none(values):
    assert state_statistics(tensor(values)).zeros.item() == np.count_nonzero(values == 0)


@given(states)
def test_abs_max_is_the_largest_magnitude(values):
    assert state_statistics(tensor(values)).abs_max.item() == np.abs(values.astype(float)).max()


@given(states)
def test_square_sum_is_the_float64_sum_of_squares(values):
    expected = np.square(values.astype(float)).sum()
    np.testing.assert_allclose(state_statistics(tensor(values)).square_sum.item(), expected, rtol=1e-12)


def test_square_sum_of_tiny_second_moments_does_not_underflow():
    assert square_sum(torch.full((1000,), 1e-30)).item() == pytest.approx(1e-57, rel=1e-6)


def test_square_sum_of_large_values_does_not_overflow():
    assert square_sum(torch.full((4,), 1e30)).item() == pytest.approx(4e60, rel=1e-6)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_abs_max_is_nan_wherever_the_nan_is(position):
    values = torch.tensor([1.0, INF, 3.0])
    values[position] = NAN
    assert abs_max(values).isnan()


def test_statistics_are_scalars_in_float64():
    for number in state_statistics(torch.ones(3, 2)):
        assert (number.dtype, number.shape) == (torch.float64, ())


@given(pair_of_states())
def test_dead_and_exploding_are_counted_by_zero_denominators(pair):
    numerator, denominator = pair
    health = coordinate_health(tensor(numerator), tensor(denominator))
    dead = np.count_nonzero((denominator == 0) & (numerator == 0))
    exploding = np.count_nonzero((denominator == 0) & (numerator != 0))
    assert (health.dead.item(), health.exploding.item()) == (dead, exploding)


def test_a_nan_numerator_over_zero_is_exploding_not_dead():
    health = coordinate_health(torch.tensor([NAN]), torch.zeros(1))
    assert (health.dead.item(), health.exploding.item()) == (0, 1)


@given(hnp.arrays(np.float32, (2, 7), elements=st.floats(0, 2.0**40, width=32, allow_subnormal=False)))
def test_noise_intensity_sums_variance_and_agreement_over_the_moving(magnitudes):
    numerator, envelope = magnitudes.min(axis=0), magnitudes.max(axis=0)
    numerator[::2] *= -1
    noise = noise_intensity(tensor(numerator), tensor(envelope))
    moves = envelope > 0
    u = numerator[moves].astype(float) / envelope[moves].astype(float)
    # The quotient is a float32, rounded to 2**-24 of its value.
    np.testing.assert_allclose(
        [x.item() for x in noise], [(1 - u**2).sum(), ((1 + np.abs(u)) / 2).sum(), moves.sum()], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_states_of_any_dtype_are_counted_exactly(dtype):
    # bfloat16 has neither 1,001 nor 3,003, and float16 not the latter.
    values = torch.cat([torch.ones(3003), torch.zeros(1001)]).to(dtype)
    found, health = state_statistics(values), coordinate_health(values.roll(1), values)
    assert (found.zeros.item(), found.square_sum.item()) == (1001, 3003)
    assert (health.dead.item(), health.exploding.item()) == (1000, 1)


def test_statistics_of_parameters_ask_for_no_gradients():
    found = state_statistics(torch.nn.Parameter(torch.tensor([0.0, 2.0])))
    assert (found.square_sum.item(), found.square_sum.requires_grad) == (4, False)


@pytest.mark.slow
def test_zeros_are_counted_beyond_what_float32_counts():
    assert state_statistics(torch.zeros((1 << 24) + 5)).zeros.item() == (1 << 24) + 5
