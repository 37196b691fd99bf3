"""The best fixed step size of sign descent, by trial runs: near the one its convergence bound asks for (SOS)."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Trial(NamedTuple):
    """A trial run.

    Attributes:
        step_size: what it stepped by.
        phi: the step size that it would have asked for; 0 where it diverged.
        fall: how far the loss had fallen at its end, < 0 where it rose; -inf where it diverged.
    """

    step_size: float
    phi: float
    fall: float


def asked_step_size(decrease: float, curvatures: Sequence[float]) -> float:
    r"""Return :math:`\phi = \sqrt{(f(x_0) - \min_t f(x_t)) / \sum_t \|g_{t+1} - g_t\|_1 / \|x_{t+1} - x_t\|_\infty}`.

    Args:
        decrease: how far the loss fell in the trial run; 0 where it did not.
        curvatures: the terms of the sum.
    """
    total = sum(curvatures)
    return math.sqrt(decrease / total) if decrease > 0 and total > 0 else 0.0


def search_step_size(run: Callable[[float], Trial], start: float, max_doublings: int = 32) -> list[Trial]:
    r"""Return trials around the crossing :math:`\phi(\gamma) = \gamma`, found by bisection of the logarithm.

    A step size is too small where :math:`\phi(\gamma) > \gamma`. From ``start``, exponents of 2 double until the
    crossing is between two trials, and then the gap is halved until they differ by a factor of 2.

    Args:
        run: a trial with a step size.
        start: the first step size, > 0.
        max_doublings: the crossing is looked for between start / 2**max_doublings and start * 2**max_doublings.

    Raises:
        RuntimeError: there is no crossing there.

    Example:
        >>> trials = search_step_size(lambda step_size: Trial(step_size, 0.1, 0.0), start=0.02)
        >>> [round(trial.step_size, 3) for trial in trials]
        [0.02, 0.04, 0.08, 0.32, 0.16]

    Source:
        arXiv 2506.03725, Algorithm 1.
    """
    trials: list[Trial] = []

    def too_small(exponent: int) -> bool:
        trials.append(run(start * 2.0**exponent))
        return trials[-1].phi > trials[-1].step_size

    upwards = too_small(0)
    inside, distance = 0, 1
    while too_small(distance if upwards else -distance) is upwards:
        inside = distance
        if distance >= max_doublings:
            raise RuntimeError(
                f"no step size between {start:g} and {trials[-1].step_size:g} is the one it asks for: does the loss "
                f"{'depend on the parameters' if upwards else 'fall at all'}?"
            )
        distance = min(2 * distance, max_doublings)
    outside = distance
    while outside - inside > 1:
        middle = (inside + outside) // 2
        if too_small(middle if upwards else -middle) is upwards:
            inside = middle
        else:
            outside = middle
    return trials


def crossing(trials: Sequence[Trial]) -> float:
    """Return the step size between the largest too small trial and the smallest other, where phi crosses it.

    Interpolates the logarithms. Where the larger of the two diverged it is the smaller one.
    """
    low = max((trial for trial in trials if trial.phi > trial.step_size), key=lambda trial: trial.step_size)
    high = min((trial for trial in trials if trial.phi <= trial.step_size), key=lambda trial: trial.step_size)
    if high.phi == 0:
        return low.step_size
    above, below = math.log(low.phi / low.step_size), math.log(high.step_size / high.phi)
    return low.step_size * (high.step_size / low.step_size) ** (above / (above + below))


def descend(run: Callable[[float], Trial], trials: Sequence[Trial], max_trials: int = 32) -> list[Trial]:
    """Return further trials, by factors of 2 away from the crossing until the best has a worse one on either side.

    Args:
        run: a trial with a step size.
        trials: those of :func:`search_step_size`.
        max_trials: further trials to run at most.

    Raises:
        RuntimeError: no best one in between after ``max_trials``.

    Example:
        >>> def run(step_size):
        ...     return Trial(step_size, 0.1, -abs(math.log2(step_size)))
        >>> [trial.step_size for trial in descend(run, search_step_size(run, start=0.0625))]
        [0.25, 0.5, 1.0, 2.0]
    """
    start, further = trials[0].step_size, list[Trial]()
    known = {_exponent(trial, start): trial for trial in trials}

    def fall(exponent: int) -> float:
        if exponent not in known:
            if len(further) == max_trials:
                tried = sorted(trial.step_size for trial in known.values())
                raise RuntimeError(f"the best step size is not between {tried[0]:g} and {tried[-1]:g}")
            further.append(run(start * 2.0**exponent))
            known[exponent] = further[-1]
        return known[exponent].fall

    best, before = round(math.log2(crossing(trials) / start)), None
    while best != before:
        best, before = max((best, best - 1, best + 1), key=fall), best
    return further


def lowest(trials: Sequence[Trial]) -> float:
    """Return the step size at the top of the parabola, in its logarithm, through the best trial and its neighbours.

    Args:
        trials: at powers of 2 times the first one's step size; with those at half and at twice the best one's.
    """
    falls = {_exponent(trial, trials[0].step_size): trial.fall for trial in trials}
    bracketed = [exponent for exponent in falls if {exponent - 1, exponent + 1} <= falls.keys()]
    best = max(bracketed, key=falls.__getitem__)
    below, at, above = (falls[best + k] for k in (-1, 0, 1))
    curvature = 2 * at - below - above
    shift = (above - below) / (2 * curvature) if 0 < curvature < math.inf else 0.0
    return trials[0].step_size * 2.0 ** (best + shift)


def _exponent(trial: Trial, start: float) -> int:
    return round(math.log2(trial.step_size / start))
