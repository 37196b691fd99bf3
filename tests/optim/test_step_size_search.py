import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_stosign.optim.alias.step_size_search import (
    Trial,
    asked_step_size,
    crossing,
    descend,
    lowest,
    search_step_size,
)


def asking(phi):
    return lambda step_size: Trial(step_size, phi(step_size), 0.0)


@given(
    optimum=st.floats(-12, 12).map(lambda e: 10.0**e),
    start=st.floats(-4, 2).map(lambda e: 10.0**e),
    slope=st.floats(0, 0.9),
)
def test_crossing_of_a_power_law_is_found_exactly(optimum, start, slope):
    trials = search_step_size(asking(lambda gamma: optimum * (gamma / optimum) ** slope), start, max_doublings=64)
    assert crossing(trials) == pytest.approx(optimum, rel=1e-6)


@given(optimum=st.floats(-6, 2).map(lambda e: 10.0**e))
def test_trials_grow_with_the_logarithm_of_the_distance(optimum):
    distance = abs(math.log2(optimum / 1e-4))
    trials = search_step_size(asking(lambda step_size: optimum), 1e-4)
    assert len(trials) <= 3 + 2 * math.log2(distance + 1)
    step_sizes = [trial.step_size for trial in trials]
    assert len(set(step_sizes)) == len(step_sizes)


def test_trials_that_diverge_are_too_large():
    trials = search_step_size(asking(lambda step_size: 0.0 if step_size > 0.01 else 1.0), 1e-4)
    assert 0.005 < crossing(trials) <= 0.01


@pytest.mark.parametrize("phi", [math.inf, 0.0])
def test_search_without_a_crossing_ends(phi):
    with pytest.raises(RuntimeError, match=r"no step size between 0.0001 and .* is the one it asks for"):
        search_step_size(asking(lambda step_size: phi), 1e-4)


def test_asked_step_size_is_the_formula():
    assert asked_step_size(2.0, [1.0, 3.0, 4.0]) == 0.5
    assert asked_step_size(-1.0, [1.0]) == asked_step_size(1.0, [0.0]) == 0.0


def test_crossing_interpolates_between_its_neighbours():
    trials = [Trial(*pair, 0.0) for pair in ((1.0, 8.0), (2.0, 4.0), (8.0, 4.0), (16.0, 1.0))]
    # log2(phi / step size): 1 at 2, -1 at 8
    assert crossing(trials) == pytest.approx(4.0)


@given(
    optimum=st.floats(-8, 0).map(lambda e: 10.0**e),
    bound=st.floats(-8, 0).map(lambda e: 10.0**e),
    start=st.floats(-8, 0).map(lambda e: 10.0**e),
)
def test_top_of_a_parabola_is_found_exactly_from_any_crossing(optimum, bound, start):
    def run(step_size):
        return Trial(step_size, bound, 3.0 - math.log2(step_size / optimum) ** 2)

    trials = search_step_size(run, start)
    further = descend(run, trials)
    assert lowest(trials + further) == pytest.approx(optimum, rel=1e-6)
    assert len({trial.step_size for trial in trials + further}) == len(trials + further)
    assert len(further) <= abs(math.log2(optimum / bound)) + 4


@given(edge=st.floats(-6, 0).map(lambda e: 10.0**e))
def test_descent_stays_clear_of_what_diverges(edge):
    def run(step_size):
        return Trial(step_size, 1e-3, step_size) if step_size < edge else Trial(step_size, 0.0, -math.inf)

    trials = search_step_size(run, 1e-4)
    assert edge / 2 <= lowest(trials + descend(run, trials)) < edge


def test_descent_without_an_end_is_given_up():
    def run(step_size):
        return Trial(step_size, 1e-3, step_size)

    with pytest.raises(RuntimeError, match=r"the best step size is not between .* and"):
        descend(run, search_step_size(run, 1e-4), max_trials=5)
