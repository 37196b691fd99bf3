"""Rounding float32 values to narrower formats: to nearest, up, or stochastically."""

import math

import torch
from torch import Tensor

LARGEST_GRADIENT = 2.0**126
"""The magnitude as which every larger gradient counts, if states are stored in float32 or less.

A power of two is stored exactly under any scale, so that no state rounds to more, in whichever direction. And twice as
much is finite: so are ``g - m`` and ``m + G n``.
"""

_EXPONENT_BITS = 0x7F800000  # of float32
_BFLOAT16_BITS = -0x10000  # of float32, those that bfloat16 has


def round_to_nearest(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to ``dtype``, ties to even, saturating: what lies beyond the range becomes the largest value."""
    # The clamp is for CUDA, where an FP8 cast beyond the range gives NaN or inf, and for float16.
    largest = torch.finfo(dtype).max
    return value.clamp(-largest, largest).to(dtype)


def below_overflow(value: Tensor, eps: float) -> Tensor:
    """Limit float32 values so that they stay finite when they are rounded to a format of this ``eps``, at any scale."""
    largest = (2.0 - eps) * 2.0**127
    return value.clamp(-largest, largest)


def round_up(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 values >= 0 to the smallest number of ``dtype`` not below them, or to the largest of all.

    Returns:
        float32 tensor: ``.to(dtype)`` is exact.
    """
    value = value.clamp(max=torch.finfo(dtype).max)
    if dtype == torch.bfloat16:
        return _cut_to_bfloat16(value, ~_BFLOAT16_BITS)
    units, spacing = _in_units(value, dtype)
    return units.ceil() * spacing


def round_stochastically(value: Tensor, dtype: torch.dtype, fraction: Tensor) -> Tensor:
    """Round float32 values to one of the two neighbours in ``dtype``, without bias; saturating as above.

    Values below the smallest subnormal number are rounded to 0 or to it, so a small update is kept on average.

    Args:
        value: float32, any shape.
        dtype: a narrower one.
        fraction: float32 in [0, 1), same shape: the upper neighbour is taken where it is below the value's position
            between the two.

    Returns:
        float32 tensor: ``.to(dtype)`` is exact.
    """
    largest = torch.finfo(dtype).max
    value = value.clamp(-largest, largest)
    if dtype == torch.bfloat16:
        # A carry out of the dropped bits makes the upper neighbour: where they are above 2**16 times the fraction.
        return _cut_to_bfloat16(value, ~_BFLOAT16_BITS - (fraction * 2.0**16).to(torch.int32))
    units, spacing = _in_units(value.abs(), dtype)
    lower = units.floor()
    return ((lower + (fraction < units - lower)) * spacing).copysign_(value)


def _cut_to_bfloat16(value: Tensor, addend: Tensor | int) -> Tensor:
    """Add to the bits of float32 numbers that are not inf, then drop those that bfloat16 has not."""
    cut = ((value.view(torch.int32) + addend) & _BFLOAT16_BITS).view(torch.float32)
    return cut + (value - value)  # 0, but NaN for a NaN, whose bits may have overflown


def power_of_two_scale(amax: Tensor, largest: float) -> Tensor:
    """Return the smallest power of two ``s`` with ``amax / s <= largest``, at least 2**-126; 1 where ``amax`` is 0."""
    ratio = amax.float() / largest
    bits = ratio.view(torch.int32)
    exponent = (bits >> 23) + ((bits & ~_EXPONENT_BITS) != 0)
    power = (exponent.clamp(1, 254) << 23).view(torch.float32)
    return torch.where(ratio == 0, 1.0, power)


def _in_units(magnitude: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return magnitudes in units of the spacing of ``dtype``'s numbers around them, and that spacing; both exact.

    The spacing is constant below the smallest normal number. Not for bfloat16: 2**133 is not a float32 number.
    """
    info = torch.finfo(dtype)
    one, eps, smallest_normal = (_power_of_two_bits(power) for power in (1.0, info.eps, info.smallest_normal))
    binade = (magnitude.view(torch.int32) & _EXPONENT_BITS).clamp(min=smallest_normal)
    spacing = binade - (one - eps)
    return magnitude * (2 * one - spacing).view(torch.float32), spacing.view(torch.float32)


def _power_of_two_bits(power: float) -> int:
    """Return float32's bits of a power of two."""
    return (math.frexp(power)[1] + 126) << 23
