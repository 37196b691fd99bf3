"""Four-bit rounding: E2M1 values that share an E4M3 scale a block and a float32 scale a tensor, as in NVFP4."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_stosign.optim.storage import power_of_two_scale, round_to_nearest

E2M1_MAX = 6.0
FP4_BLOCK_SIZE = 16

_E4M3_SMALLEST = 2.0**-9


def round_e2m1(value: Tensor) -> Tensor:
    """Round to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, ties to even, saturating.

    Args:
        value: float32, any shape.

    Returns:
        The rounded values, float32, same shape; NaN stays NaN.

    Example:
        >>> round_e2m1(torch.tensor([0.25, -0.3, 1.75, 5.0, 100.0]))
        tensor([ 0.0000, -0.5000,  2.0000,  4.0000,  6.0000])
    """
    magnitude = value.abs().clamp_(max=E2M1_MAX)
    # The numbers lie 1/2, 1 and 2 apart from 0, 2 and 4 on; round() takes ties to the even multiple.
    spacing = 0.5 + 0.5 * (magnitude >= 2) + (magnitude >= 4)
    return magnitude.div_(spacing).round_().mul_(spacing).copysign_(value)


def fp4_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales of blocks of values.

    The tensor's scale is the smallest power of two with which the largest block scale is at most E4M3's largest number,
    so that it is exact. A block's scale brings its largest magnitude to 6, rounded to E4M3, but is never 0: a block far
    below the tensor's largest keeps what its smallest scale can hold.

    Args:
        blocks: float32, ``[number of blocks, block size]``.

    Returns:
        Block scales, ``torch.float8_e4m3fn``, ``[number of blocks]``, and the tensor's scale, float32, ``[]``. A value
        is stored as ``value / (block scale * tensor scale)``.

    Example:
        >>> fp4_scales(torch.tensor([[6.0, 0.0], [0.1, 0.0]]))
        (tensor([256.0000,   4.5000], dtype=torch.float8_e4m3fn), tensor(0.0039))
    """
    amax = blocks.abs().amax(dim=1)
    largest = torch.finfo(torch.float8_e4m3fn).max
    tensor_scale = power_of_two_scale(amax.amax(), largest * E2M1_MAX)
    block_scales = (amax / (tensor_scale * E2M1_MAX)).clamp_(min=_E4M3_SMALLEST)
    return round_to_nearest(block_scales, torch.float8_e4m3fn), tensor_scale


def round_fp4_block(value: Tensor, block_size: int = FP4_BLOCK_SIZE) -> Tensor:
    """Return what is left of values after storing them in four bits each: the values that would be read back.

    Args:
        value: float32, any shape, not empty; blocks are ``block_size`` consecutive values in row-major order.
        block_size: values that share a scale.

    Returns:
        float32, same shape.

    Example:
        >>> round_fp4_block(torch.tensor([6.0, -1.1, 0.24]))
        tensor([ 6., -1.,  0.])

    Source:
        NVIDIA's NVFP4 (E2M1, blocks of 16, E4M3 scales), with a power of two as the tensor's scale.
    """
    flat = value.reshape(-1).float()
    blocks = pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    block_scales, tensor_scale = fp4_scales(blocks)
    scale = (block_scales.float() * tensor_scale).unsqueeze(1)
    return (round_e2m1(blocks / scale) * scale).view(-1)[: flat.numel()].view(value.shape)
