"""SOS: the one fixed step size of sign descent that its convergence bound asks for, found by trial runs."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Trial(NamedTuple):
    """A trial run with one step size: ``phi`` is the step size that it would have asked for."""

    step_size: float
    phi: float


def asked_step_size(decrease: float, curvatures: Sequence[float]) -> float:
    r"""Return :math:`\phi = \sqrt{(f(x_0) - \min_t f(x_t)) / \sum_t \|g_{t+1} - g_t\|_1 / \|x_{t+1} - x_t\|_\infty}`.

    Args:
        decrease: how far the loss fell in the trial run; 0 where it did not.
        curvatures: the terms of the sum.
    """
    total = sum(curvatures)
    return math.sqrt(decrease / total) if decrease > 0 and total > 0 else 0.0


def search_step_size(phi: Callable[[float], float], start: float, max_doublings: int = 32) -> list[Trial]:
    r"""Return trials around the crossing :math:`\phi(\gamma) = \gamma`, found by bisection of the logarithm.

    A step size is too small where :math:`\phi(\gamma) > \gamma`. From ``start``, exponents of 2 double until the
    crossing is between two trials, and then the gap is halved until they differ by a factor of 2.

    Args:
        phi: runs a trial with a step size.
        start: the first step size, > 0.
        max_doublings: the crossing is looked for between start / 2**max_doublings and start * 2**max_doublings.

    Raises:
        RuntimeError: there is no crossing there.

    Example:
        >>> [round(trial.step_size, 3) for trial in search_step_size(lambda step_size: 0.1, start=0.02)]
        [0.02, 0.04, 0.08, 0.32, 0.16]

    Source:
        arXiv 2506.03725, Algorithm 1.
    """
    trials: list[Trial] = []

    def too_small(exponent: int) -> bool:
        step_size = start * 2.0**exponent
        trials.append(Trial(step_size, phi(step_size)))
        return trials[-1].phi > step_size

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
