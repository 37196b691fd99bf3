"""Statistics of optimizer states: pure functions of tensors, without a host synchronisation.

Each returns 0-dimensional or small tensors on the input's device. Sums and counts are returned rather than means, so
that a caller can add them over parameters: a global fraction is a sum of counts over a sum of sizes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Edges of the log10 histograms: a quarter of a decade each, over what float32 can hold.
LOG10_MIN, LOG10_MAX, LOG10_BINS = -45.0, 39.0, 336

_COUNTED_EXACTLY = 1 << 24  # how far float32 counts


def _sum_dtype(value: Tensor) -> torch.dtype:
    """Sums and counts are float64, so that they are exact; MPS has no float64."""
    return torch.float32 if value.device.type == "mps" else torch.float64


def count(mask: Tensor) -> Tensor:
    """Return the number of True entries, exactly."""
    return torch.count_nonzero(mask).to(_sum_dtype(mask))  # several times faster than mask.sum()


class StateStatistics(NamedTuple):
    """Sums over one state: 0-dimensional tensors."""

    zeros: Tensor
    abs_max: Tensor
    square_sum: Tensor


def state_statistics(value: Tensor) -> StateStatistics:
    """Return the number of zeros, the largest magnitude and the sum of squares of a state.

    Args:
        value: float32 or wider, any shape, not empty.

    Example:
        >>> [float(x) for x in state_statistics(torch.tensor([0.0, 3.0, -4.0]))]
        [1.0, 4.0, 25.0]
    """
    return StateStatistics(zeros=count(value == 0), abs_max=abs_max(value), square_sum=square_sum(value))


def abs_max(value: Tensor) -> Tensor:
    """Return the largest magnitude; NaN if there is one."""
    low, high = value.detach().aminmax()  # an infinity norm is ten times slower on the CPU
    return torch.maximum(low.abs(), high.abs()).to(_sum_dtype(value))


def square_sum(value: Tensor) -> Tensor:
    """Return the sum of squares, which for second moments below 1e-19 would underflow in float32."""
    return torch.linalg.vector_norm(value, dtype=_sum_dtype(value)).square()


class CoordinateHealth(NamedTuple):
    """Counts of sick coordinates: 0-dimensional tensors."""

    dead: Tensor
    exploding: Tensor


def coordinate_health(numerator: Tensor, denominator: Tensor) -> CoordinateHealth:
    """Count the coordinates that cannot move and those whose quotient explodes.

    Args:
        numerator: the update's numerator, e.g. Adam's ``exp_avg``.
        denominator: what divides it, e.g. ``exp_avg_sq``; same shape.

    Returns:
        ``dead``: numerator 0 and denominator 0; ``exploding``: denominator 0, numerator not.

    Example:
        >>> dead, exploding = coordinate_health(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 1.0]))
        >>> int(dead), int(exploding)
        (1, 1)
    """
    no_denominator = denominator == 0
    no_numerator = numerator == 0
    return CoordinateHealth(
        dead=count(no_denominator & no_numerator),
        exploding=count(no_denominator & ~no_numerator),
    )


class NoiseIntensity(NamedTuple):
    """Sums over the coordinates that move, and their number: 0-dimensional tensors."""

    variance: Tensor
    agreement: Tensor
    moving: Tensor


def noise_intensity(numerator: Tensor, envelope: Tensor) -> NoiseIntensity:
    """Sum the variance of the stochastic sign and its probability of following the momentum's sign.

    With ``u = numerator / envelope``, the variance is ``1 - u**2`` and the probability ``(1 + |u|) / 2``; coordinates
    with envelope 0 do not move and do not count.

    Source:
        arXiv 2604.15416, Proposition 1 and Figure 4.

    Example:
        >>> [float(x) for x in noise_intensity(torch.tensor([0.5, 0.0]), torch.tensor([1.0, 0.0]))]
        [0.75, 0.75, 1.0]
    """
    moves = envelope > 0
    u = torch.where(moves, numerator / envelope, 0.0)
    moving = count(moves)
    return NoiseIntensity(
        variance=moving - square_sum(u),
        agreement=(moving + u.abs().sum(dtype=_sum_dtype(u))) / 2,
        moving=moving,
    )


def log10_histogram(value: Tensor) -> Tensor:
    """Count the nonzero magnitudes by their log10.

    Args:
        value: float32, any shape.

    Returns:
        Counts of shape ``[LOG10_BINS]``: bin i holds the magnitudes with log10 in
        ``LOG10_MIN + [i, i + 1) * (LOG10_MAX - LOG10_MIN) / LOG10_BINS``. NaN and inf are left out.

    Source:
        arXiv 2604.15416, Figure 3.

    Example:
        >>> counts = log10_histogram(torch.tensor([0.0, 1.1, -1.1, 1e-3]))
        >>> int(counts.sum()), int(counts.max())
        (3, 2)
    """
    counts = torch.zeros(LOG10_BINS, dtype=_sum_dtype(value), device=value.device)
    # torch.histc counts in float32, so a large state is counted in parts. Zeros have log10 -inf, outside the range.
    for part in value.flatten().float().split(_COUNTED_EXACTLY):
        counts += torch.histc(part.abs().log10_(), bins=LOG10_BINS, min=LOG10_MIN, max=LOG10_MAX)
    return counts


def log10_bin_edges() -> Tensor:
    """Return the ``LOG10_BINS + 1`` edges of :func:`log10_histogram`'s bins, float64."""
    return torch.linspace(LOG10_MIN, LOG10_MAX, LOG10_BINS + 1, dtype=torch.float64)
