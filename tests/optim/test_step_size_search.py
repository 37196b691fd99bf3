import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_stosign.optim.step_size_search import Trial, asked_step_size, crossing, search_step_size


@given(
    optimum=st.floats(-12, 12).map(lambda e: 10.0**e),
    start=st.floats(-4, 2).map(lambda e: 10.0**e),
    slope=st.floats(0, 0.9),
)
def test_crossing_of_a_power_law_is_found_exactly(optimum, start, slope):
    trials = search_step_size(lambda step_size: optimum * (step_size / optimum) ** slope, start, max_doublings=64)
    assert crossing(trials) == pytest.approx(optimum, rel=1e-6)


@given(optimum=st.floats(-6, 2).map(lambda e: 10.0**e))
def test_trials_grow_with_the_logarithm_of_the_distance(optimum):
    distance = abs(math.log2(optimum / 1e-4))
    trials = search_step_size(lambda step_size: optimum, 1e-4)
    assert len(trials) <= 3 + 2 * math.log2(distance + 1)
    step_sizes = [trial.step_size for trial in trials]
    assert len(set(step_sizes)) == len(step_sizes)


def test_trials_that_diverge_are_too_large():
    trials = search_step_size(lambda step_size: 0.0 if step_size > 0.01 else 1.0, 1e-4)
    assert 0.005 < crossing(trials) <= 0.01


@pytest.mark.parametrize("phi", [math.inf, 0.0])
def test_search_without_a_crossing_ends(phi):
    with pytest.raises(RuntimeError, match=r"no step size between 0.0001 and .* is the one it asks for"):
        search_step_size(lambda step_size: phi, 1e-4)


def test_asked_step_size_is_the_formula():
    assert asked_step_size(2.0, [1.0, 3.0, 4.0]) == 0.5
    assert asked_step_size(-1.0, [1.0]) == asked_step_size(1.0, [0.0]) == 0.0


def test_crossing_interpolates_between_its_neighbours():
    trials = [Trial(1.0, 8.0), Trial(2.0, 4.0), Trial(8.0, 4.0), Trial(16.0, 1.0)]
    # log2(phi / step size): 1 at 2, -1 at 8
    assert crossing(trials) == pytest.approx(4.0)
