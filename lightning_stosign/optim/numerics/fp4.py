"""Four-bit storage: E2M1 values, two a byte, with an E4M3 scale a block and a float32 scale a tensor, as in NVFP4.

E2M1 has 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. A value is stored as ``value / (block scale * tensor scale)``.
The tensor's scale is a power of two. A block's is rounded up, so that its largest magnitude is stored as 6 and nothing
saturates; and it is a normal number of E4M3, whose neighbours are close enough for that. Hence storing what was read
gives the same bytes again, and an envelope that is rounded up at every step does not creep.
"""

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from lightning_stosign.optim.numerics.rounding import power_of_two_scale, round_up

E2M1_MAX = 6.0
E2M1_EPS = 0.5
SCALE_DTYPE = torch.float8_e4m3fn

_E4M3 = torch.finfo(SCALE_DTYPE)
FP4_LARGEST = _E4M3.max * E2M1_MAX  # under a tensor scale of 1


def round_e2m1(value: Tensor) -> Tensor:
    """Round to the nearest E2M1 value, ties to even, saturating.

    Args:
        value: float32, any shape.

    Returns:
        The rounded values, float32, same shape; NaN stays NaN.

    Example:
        >>> round_e2m1(torch.tensor([0.25, -0.3, 1.75, 5.0, 100.0]))
        tensor([ 0.0000, -0.5000,  2.0000,  4.0000,  6.0000])
    """
    magnitude = value.abs().clamp_(max=E2M1_MAX)
    spacing = _spacing(magnitude)
    return magnitude.div_(spacing).round_().mul_(spacing).copysign_(value)  # round() takes ties to the even multiple


def round_e2m1_up(value: Tensor) -> Tensor:
    """Round values >= 0 to the smallest E2M1 value that is not below, saturating; else as :func:`round_e2m1`.

    Example:
        >>> round_e2m1_up(torch.tensor([0.0, 1e-9, 1.5, 3.1]))
        tensor([0.0000, 0.5000, 1.5000, 4.0000])
    """
    magnitude = value.clamp(max=E2M1_MAX)
    spacing = _spacing(magnitude)
    return magnitude.div_(spacing).ceil_().mul_(spacing)


def round_e2m1_stochastically(value: Tensor, fraction: Tensor) -> Tensor:
    """Round to one of the two nearest E2M1 values, so that the mean over ``fraction ~ Unif[0, 1)`` is the value.

    Args:
        value: float32; beyond 6 in magnitude it saturates.
        fraction: float32, the same shape, in [0, 1).

    Example:
        >>> round_e2m1_stochastically(torch.tensor([2.25, 2.25]), torch.tensor([0.7, 0.8]))
        tensor([2., 3.])
    """
    magnitude = value.abs().clamp_(max=E2M1_MAX)
    spacing = _spacing(magnitude)
    return magnitude.div_(spacing).add_(fraction).floor_().mul_(spacing).clamp_(max=E2M1_MAX).copysign_(value)


def fp4_tensor_scale(largest: Tensor) -> Tensor:
    """Return the smallest power of two with which no block scale of a tensor with this largest magnitude exceeds 448.

    Example:
        >>> fp4_tensor_scale(torch.tensor(2688.0)), fp4_tensor_scale(torch.tensor(6.0))
        (tensor(1.), tensor(0.0039))
    """
    return power_of_two_scale(largest, FP4_LARGEST)


def fp4_block_scales(largest: Tensor, tensor_scale: Tensor) -> Tensor:
    """Return the scales of blocks by their largest magnitudes: the smallest with which these are stored as at most 6.

    Args:
        largest: float32, ``[blocks]``.
        tensor_scale: of :func:`fp4_tensor_scale`.

    Returns:
        :data:`SCALE_DTYPE`, ``[blocks]``, at least 2**-6.

    Example:
        >>> fp4_block_scales(torch.tensor([6.0, 6.1, 0.0]), torch.tensor(1.0)).float()
        tensor([1.0000, 1.1250, 0.0156])
    """
    # Here and below a quotient by a number of few digits is, once rounded to float32, on the right side of each number
    # of the format, or on it only if it is one. (Not so a product with a reciprocal, unless of a power of two.)
    wanted = (largest * (1 / tensor_scale) / E2M1_MAX).clamp_(min=_E4M3.smallest_normal)
    return round_up(wanted, SCALE_DTYPE).to(SCALE_DTYPE)


def store_fp4(
    blocks: Tensor,
    tensor_scale: Tensor,
    rounding: Literal["nearest", "up"] = "nearest",
    fraction: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Store blocks of values.

    Args:
        blocks: float32, ``[blocks, block size]``, none larger than the tensor scale was made for.
        tensor_scale: of :func:`fp4_tensor_scale`.
        rounding: ``"nearest"``, or ``"up"``: never below, of values >= 0.
        fraction: in [0, 1), the shape of ``blocks``: round to nearest stochastically instead.

    Returns:
        uint8, ``[blocks, block size / 2]``, the even ones of the values in the lower four bits, and the block scales.
    """
    scales = fp4_block_scales(blocks.abs().amax(dim=1), tensor_scale)
    scaled = blocks / (scales.float() * tensor_scale).unsqueeze(1)
    if rounding == "up":
        # What is too small for float32 beside the largest is not 0 either.
        rounded = round_e2m1_up(scaled.clamp_(min=_TINY * (blocks > 0).to(blocks.dtype)))
    elif fraction is not None:
        rounded = round_e2m1_stochastically(scaled, fraction)
    else:
        rounded = round_e2m1(scaled)
    return _pack(rounded), scales


def read_fp4(stored: Tensor, scales: Tensor, tensor_scale: Tensor) -> Tensor:
    """Return the values of what :func:`store_fp4` stored: float32, ``[blocks, block size]``."""
    return _unpack(stored) * (scales.float() * tensor_scale).unsqueeze(1)


_TINY = torch.finfo(torch.float32).tiny


def _spacing(magnitude: Tensor) -> Tensor:
    """Return how far apart the numbers are: 1/2, 1 and 2 from 0, 2 and 4 on."""
    return 0.5 + 0.5 * (magnitude >= 2).to(magnitude.dtype) + (magnitude >= 4)


def _pack(values: Tensor) -> Tensor:
    """Return the bytes of E2M1 values: bit 3 is the sign, the others count the magnitudes."""
    magnitude = values.abs()
    count = torch.where(magnitude < 2, 2 * magnitude, torch.where(magnitude < 4, magnitude + 2, magnitude / 2 + 4))
    codes = (count + 8 * values.signbit()).to(torch.uint8)
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def _unpack(stored: Tensor) -> Tensor:
    return _pairs(stored.device).index_select(0, stored.flatten().int()).view(len(stored), -1)


@lru_cache(maxsize=8)
def _pairs(device: torch.device) -> Tensor:
    """Return the two values of each byte, ``[256, 2]``."""
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float32, device=device)
    values = torch.cat([magnitudes, -magnitudes])
    byte = torch.arange(256, device=device)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=1)
