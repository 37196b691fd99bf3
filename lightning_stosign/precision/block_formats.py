"""What is left of a tensor after block-scaled FP8 or FP4: pure rounding functions, on any device."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_stosign.optim.numerics.fp4 import E2M1_MAX, round_e2m1, round_e2m1_stochastically
from lightning_stosign.optim.numerics.noise import hash_bits

_E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
_SMALLEST_SCALE = 2.0**-127  # of E8M0


class BlockFormat(NamedTuple):
    """Values of a few bits that share a scale a block.

    Attributes:
        bits: 8 for E4M3 values, 4 for E2M1 values.
        block_size: Values that share a scale.
        nv_scales: NVFP4's scales: E4M3, times one float32 a tensor. False: powers of two.
    """

    bits: int
    block_size: int
    nv_scales: bool = False

    @property
    def largest(self) -> float:
        """The largest value before it is scaled."""
        return _E4M3_MAX if self.bits == 8 else E2M1_MAX


FP8_BLOCK = BlockFormat(8, 128)
MXFP8 = BlockFormat(8, 32)
MXFP4 = BlockFormat(4, 32)
NVFP4 = BlockFormat(4, 16, nv_scales=True)


def round_blocks(values: Tensor, format: BlockFormat, *, square: bool = False, stochastic: bool = False) -> Tensor:
    """Round a matrix to a block format, and return the values that a matrix product would read.

    With ``amax`` the largest magnitude of a block and ``M`` the largest value of the format, a block's scale is the
    smallest power of two that is at least ``amax / M``, so that nothing saturates; or with ``nv_scales``
    ``s = amax_of_tensor / (448 M)`` a tensor and ``E4M3(amax / (M s)) s`` a block.

    Args:
        values: ``[rows, columns]``, float32; blocks run along the rows, and a last one may be shorter.
        format: The format.
        square: A block is ``block_size`` rows by ``block_size`` columns, so that the matrix and its transpose round
            alike.
        stochastic: Round up or down at random so that the mean is the value (4 bits only). The noise is a pure function
            of the values: no generator is read, and the same values round the same way everywhere.

    Returns:
        float32, the same shape.

    Example:
        >>> round_blocks(torch.tensor([[6.0, 1.1, 0.2]]), MXFP4)
        tensor([[6., 1., 0.]])

    Source:
        OCP Microscaling Formats (MX) Specification 1.0; arXiv 2506.08027 for the scale that is rounded up; arXiv
        2509.25149 for NVFP4.
    """
    rows, columns = values.shape
    if values.numel() == 0:
        return values
    blocks, scale = _blocks_and_scales(values, format, square)
    scaled = blocks / scale
    if format.bits == 8:
        rounded = scaled.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).float()
    elif stochastic:
        rounded = round_e2m1_stochastically(scaled, content_noise(blocks))
    else:
        rounded = round_e2m1(scaled)
    return (rounded * scale).view(-1, blocks.shape[2] * blocks.shape[3])[:rows, :columns]


def count_saturated(values: Tensor, format: BlockFormat, *, square: bool = False) -> Tensor:
    """Count the values beyond the format's largest number under their block's scale: NVFP4's scales are rounded, too.

    Args:
        values: ``[rows, columns]``, float32.
        format: The format.
        square: As for :func:`round_blocks`.

    Returns:
        int64, 0-dimensional.
    """
    if values.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=values.device)
    blocks, scale = _blocks_and_scales(values, format, square)
    return (blocks.abs() / scale > format.largest).sum()


def _blocks_and_scales(values: Tensor, format: BlockFormat, square: bool) -> tuple[Tensor, Tensor]:
    """Return ``[rows / height, height, columns / size, size]``, padded with zeros, and a scale per block."""
    rows, columns = values.shape
    size = format.block_size
    height = size if square else 1
    padded = pad(values, (0, -columns % size, 0, -rows % height))
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // size, size)
    amax = blocks.abs().amax(dim=(1, 3), keepdim=True)
    return blocks, _nv_scales(amax) if format.nv_scales else _power_of_two_scales(amax, format.largest)


def content_noise(values: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) that are a pure function of the values: any change of one gives other numbers for all.

    Args:
        values: float32, any shape.

    Returns:
        float32, the same shape: multiples of 2**-24.
    """
    bits = values.contiguous().view(torch.int32).flatten()
    index = torch.arange(bits.numel(), dtype=torch.int32, device=bits.device)
    # Two sums modulo 2**32 are the key; the second one knows the order of the values.
    key = bits.sum(dtype=torch.int32), hash_bits(index, bits, bits).sum(dtype=torch.int32)
    return ((hash_bits(index, *key) & ((1 << 24) - 1)) * 2.0**-24).view(values.shape)


def rotate_blocks(values: Tensor, size: int) -> Tensor:
    """Multiply every block of a row by the same random rotation: a Hadamard matrix with random signs.

    An outlier is spread over its block. The product of two matrices rotated along their common dimension is that of the
    matrices themselves.

    Args:
        values: ``[rows, columns]``, float32; ``columns`` is padded with zeros to a multiple of ``size``.
        size: A power of two.

    Returns:
        float32, ``[rows, columns rounded up]``.
    """
    padded = pad(values, (0, -values.shape[1] % size))
    return (padded.reshape(-1, size) @ _rotation(size, values.device)).view(padded.shape)


def _power_of_two_scales(amax: Tensor, largest: float) -> Tensor:
    mantissa, exponent = torch.frexp(amax / largest)
    # frexp's mantissa is in [0.5, 1): a power of two itself has 0.5.
    scale = torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int()).clamp(min=_SMALLEST_SCALE)
    return torch.where(amax.isfinite(), scale, amax)  # an infinity becomes NaN, not the largest value


def _nv_scales(amax: Tensor) -> Tensor:
    tensor_scale = (amax.amax() / (_E4M3_MAX * E2M1_MAX)).clamp(min=torch.finfo(torch.float32).tiny)
    in_e4m3 = (amax / (E2M1_MAX * tensor_scale)).clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn).float()
    scale = in_e4m3 * tensor_scale
    # A block whose scale rounds to 0 stores zeros: any large scale says so.
    return torch.where(scale == 0, amax.clamp(min=1.0) * _E4M3_MAX, scale)


def _rotation(size: int, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float32, device=device)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    index = torch.arange(size, dtype=torch.int32, device=device)
    signs = 1 - 2 * (hash_bits(index, torch.zeros_like(index), torch.ones_like(index)) & 1).to(torch.float32)
    return signs[:, None] * matrix / math.sqrt(size)
