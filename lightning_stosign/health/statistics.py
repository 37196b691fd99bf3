"""Statistics of optimizer states: pure functions of tensors, without a host synchronisation.

Each returns 0-dimensional or small tensors on the input's device. Sums and counts are returned rather than means, so
that a caller can add them over parameters and over ranks: a global fraction is a sum of counts over a sum of sizes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Whole numbers up to it are exact in float32.
_EXACT_IN_FLOAT32 = 1 << 24

# Values of a part on the CPU: below the 2**15 from which on torch spreads an operation over threads, whose waiting for
# each other costs more than it gains here, a hundred times more where other processes want the cores too.
PART_SIZE = 30 << 10


def sum_dtype(value: Tensor) -> torch.dtype:
    """Sums and counts are float64, so that they are exact; MPS has no float64."""
    return torch.float32 if value.device.type == "mps" else torch.float64


def count(mask: Tensor) -> Tensor:
    """Return the number of entries that are True or not 0, exactly."""
    return torch.count_nonzero(mask).to(sum_dtype(mask))


def ones_where(compare: Callable[..., Tensor], value: Tensor, other: Tensor | float) -> Tensor:
    """Return 1 where a comparison holds and 0 elsewhere, in the dtype of ``value``.

    On the CPU torch vectorises this, and neither comparisons that give bools nor counting these.

    Args:
        compare: ``torch.eq``, ``torch.ne`` ...
        value: floating point.
        other: what to compare it with.
    """
    return compare(value, other, out=torch.empty_like(value))


def add_up(ones: Tensor) -> Tensor:
    """Add up zeros and ones, exactly: in float32, which is cheaper, where that is enough."""
    return ones.sum(dtype=torch.float32 if ones.numel() <= _EXACT_IN_FLOAT32 else sum_dtype(ones))


def in_parts(*values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the values flat, part by part on the CPU and as a whole elsewhere; nothing where they are empty.

    Args:
        values: tensors of the same shape.
    """
    flat = [value.detach().reshape(-1) for value in values]
    size = flat[0].numel()
    length = PART_SIZE if flat[0].device.type == "cpu" else max(size, 1)
    for start in range(0, size, length):
        yield tuple(value[start : start + length] for value in flat)


class StateStatistics(NamedTuple):
    """Sums over one state: 0-dimensional tensors."""

    zeros: Tensor
    abs_max: Tensor
    square_sum: Tensor


def state_statistics(value: Tensor) -> StateStatistics:
    """Return the number of zeros, the largest magnitude and the sum of squares of a state.

    Args:
        value: floating point, any shape. Of nothing the largest magnitude is 0.

    Example:
        >>> [float(x) for x in state_statistics(torch.tensor([0.0, 3.0, -4.0]))]
        [1.0, 4.0, 25.0]
    """
    parts = [
        (add_up(ones_where(torch.ne, part, 0)), part.abs().amax(), _square_sum(part)) for (part,) in in_parts(value)
    ]
    nonzero, largest, squares = _columns(parts, 3, value)
    return StateStatistics(zeros=value.numel() - nonzero.sum(), abs_max=largest.amax(), square_sum=squares.sum())


def abs_max(value: Tensor) -> Tensor:
    """Return the largest magnitude; NaN if there is one, 0 of nothing."""
    if value.numel() == 0:
        return value.new_zeros((), dtype=sum_dtype(value))
    low, high = torch.aminmax(value)
    return torch.maximum(-low, high).to(sum_dtype(value))


def square_sum(value: Tensor) -> Tensor:
    """Return the sum of squares, which for second moments below 1e-19 would underflow in float32."""
    zero = value.new_zeros((), dtype=sum_dtype(value))
    return torch.stack([zero, *(_square_sum(part) for (part,) in in_parts(value))]).sum()


def _square_sum(part: Tensor) -> Tensor:
    return torch.linalg.vector_norm(part, dtype=sum_dtype(part)).square()


def _columns(parts: Sequence[tuple[Tensor, ...]], width: int, value: Tensor) -> list[Tensor]:
    """Stack each of so many statistics of the parts of a value; without parts each is 0."""
    if not parts:
        return [value.new_zeros(1, dtype=sum_dtype(value))] * width
    return [torch.stack(column).to(sum_dtype(value)) for column in zip(*parts, strict=True)]


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
    parts = []
    for top, bottom in in_parts(numerator, denominator):
        no_denominator = ones_where(torch.eq, bottom, 0)
        parts.append((add_up(no_denominator), add_up(ones_where(torch.ne, top, 0).mul_(no_denominator))))
    without, exploding = (column.sum() for column in _columns(parts, 2, numerator))
    return CoordinateHealth(dead=without - exploding, exploding=exploding)


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
    parts = []
    for top, bottom in in_parts(numerator, envelope):
        # The quotient where the envelope is above 0, and 0 elsewhere: a torch.where that torch vectorises on the CPU.
        u = torch.ops.aten.threshold_backward(top / bottom, bottom, 0)
        moves = add_up(ones_where(torch.gt, bottom, 0))
        parts.append((moves, _square_sum(u), u.abs().sum(dtype=sum_dtype(u))))
    moving, squares, magnitudes = (column.sum() for column in _columns(parts, 3, numerator))
    return NoiseIntensity(variance=moving - squares, agreement=(moving + magnitudes) / 2, moving=moving)
