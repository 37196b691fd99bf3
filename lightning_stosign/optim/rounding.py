"""Rounding float32 values to narrower formats: to nearest, up, or at random. Elementwise, for torch.compile to fuse."""

import torch
from torch import Tensor

_EXPONENT_BITS = 0x7F800000  # of float32


def round_to_nearest(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to ``dtype``, ties to even, saturating: what lies beyond the range becomes the largest value."""
    # The clamp is for CUDA, where an FP8 cast beyond the range gives NaN or inf, and for float16.
    largest = torch.finfo(dtype).max
    return value.clamp(-largest, largest).to(dtype)


def round_up(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 values >= 0 to the smallest number of ``dtype`` not below them, or to the largest of all.

    Returns:
        float32 tensor: ``.to(dtype)`` is exact.
    """
    info = torch.finfo(dtype)
    value = value.clamp(max=info.max)
    dropped = round(2**23 * info.eps) - 1  # float32's mantissa bits beyond dtype's
    normal = ((value.view(torch.int32) + dropped) & ~dropped).view(torch.float32)
    if dtype == torch.bfloat16:  # has float32's subnormal numbers
        return normal
    smallest = info.smallest_normal * info.eps
    return torch.where(value < info.smallest_normal, torch.ceil(value * (1 / smallest)) * smallest, normal)


def round_stochastically(value: Tensor, dtype: torch.dtype, fraction: Tensor) -> Tensor:
    """Round float32 values to one of the two neighbours in ``dtype``, without bias; saturating as above.

    Values below the smallest subnormal number are rounded to 0 or to it, so a small update is kept on average.

    Args:
        value: float32, any shape.
        dtype: a narrower one.
        fraction: float32 in [0, 1), same shape: the upper neighbour is taken where it is below the value's position
            between the two.
    """
    info = torch.finfo(dtype)
    magnitude = value.abs().clamp(max=info.max)
    # The spacing of dtype's numbers at this magnitude, constant below the smallest normal number.
    binade = magnitude.clamp(min=info.smallest_normal).view(torch.int32) & _EXPONENT_BITS
    spacing = binade.view(torch.float32) * info.eps
    units = magnitude / spacing
    lower = units.floor()
    rounded = ((lower + (fraction < units - lower)) * spacing).clamp(max=info.max)
    return torch.where(value < 0, -rounded, rounded).to(dtype)


def power_of_two_scale(amax: Tensor, largest: float) -> Tensor:
    """Return the smallest power of two ``s`` with ``amax / s <= largest``, at least 2**-126; 1 where ``amax`` is 0."""
    ratio = amax.float() / largest
    bits = ratio.view(torch.int32)
    exponent = (bits >> 23) + ((bits & ~_EXPONENT_BITS) != 0)
    power = (exponent.clamp(1, 254) << 23).view(torch.float32)
    return torch.where(ratio == 0, 1.0, power)
