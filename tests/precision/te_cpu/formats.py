"""The number formats of Transformer Engine's kernels: from float32 matrices to bytes and scales, and back."""

import enum

import torch
from torch import Tensor
from torch.nn.functional import pad

LARGEST = torch.finfo(torch.float32).max


class DType(enum.Enum):
    """As pybind11 shows an enum of C++: not an int, but one can be made of it."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10

    def __int__(self) -> int:
        return self.value

    __index__ = __int__

    def __eq__(self, other: object) -> bool:
        return int(self) == int(other) if isinstance(other, DType | int) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.value)


_TORCH = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}


def torch_dtype(dtype: "DType | int | torch.dtype") -> torch.dtype:
    """The torch type of one of TE's types."""
    return dtype if isinstance(dtype, torch.dtype) else _TORCH[DType(int(dtype))]


def largest(dtype: "DType | int") -> float:
    """The largest finite value of an FP8 type."""
    return torch.finfo(torch_dtype(dtype)).max


def encode(values: Tensor, dtype: "DType | int") -> Tensor:
    """Float32 to the bytes of an FP8 type; what is too large becomes the largest value."""
    top = largest(dtype)
    return values.clamp(-top, top).to(torch_dtype(dtype)).view(torch.uint8)


def decode(data: Tensor, dtype: "DType | int") -> Tensor:
    """The bytes of an FP8 type to float32."""
    return data.view(torch.uint8).view(torch_dtype(dtype)).float()


def scale_for(
    amax: Tensor, top: float, epsilon: float = 0.0, power_of_2: bool = False, ceiling: float = LARGEST
) -> Tensor:
    """The factor that maps ``amax`` to ``top``; 1 where there is nothing to go by."""
    amax = amax.clamp(min=epsilon)
    scale = torch.full_like(amax, top) / amax  # `top / amax` would be `top * (1 / amax)`, which rounds twice
    scale = torch.where(torch.isinf(scale), ceiling, scale)
    if power_of_2:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.full_like(mantissa, 0.5), exponent)
    return torch.where((amax > 0) & torch.isfinite(amax), scale, torch.ones_like(scale))


# FP8 in blocks of 128 values of a row, or of 128 x 128


def encode_blocks(
    matrix: Tensor, dtype: DType, square: bool, epsilon: float, power_of_2: bool, ceiling: float
) -> tuple[Tensor, Tensor]:
    """The bytes, and the inverse scales as ``[rows of blocks, blocks in a row]``."""
    rows, columns = matrix.shape
    height = 128 if square else 1
    padded = pad(matrix, (0, -columns % 128, 0, -rows % height))
    tiles = padded.unflatten(0, (-1, height)).unflatten(2, (-1, 128))  # [i, height, j, 128]
    scale = scale_for(tiles.abs().amax((1, 3)), largest(dtype), epsilon, power_of_2, ceiling)
    scaled = (tiles * scale[:, None, :, None]).flatten(2).flatten(0, 1)
    return encode(scaled[:rows, :columns], dtype).contiguous(), scale.reciprocal()


def decode_blocks(data: Tensor, inverse_scales: Tensor, dtype: DType, square: bool) -> Tensor:
    """What :func:`encode_blocks` encoded."""
    rows, columns = data.shape
    factors = inverse_scales.repeat_interleave(128, 1)
    if square:
        factors = factors.repeat_interleave(128, 0)
    return decode(data, dtype) * factors[:rows, :columns]


# MXFP8: blocks of 32, scales that are powers of two


def encode_mx(matrix: Tensor, dtype: DType) -> tuple[Tensor, Tensor]:
    """The bytes, and the exponents (E8M0) of the scales of each row's blocks."""
    tiles = matrix.unflatten(1, (-1, 32))
    ratio = tiles.abs().amax(-1) * (torch.ones(()) / largest(dtype))
    mantissa, exponent = torch.frexp(ratio)  # ratio = mantissa * 2 ** exponent, 0.5 <= mantissa < 1
    exponent = exponent - (mantissa == 0.5).int()  # rounded up to a power of two
    biased = torch.where(ratio == 0, 0, (exponent + 127).clamp(0, 254))
    scaled = tiles.double() * torch.exp2(127.0 - biased.double())[..., None]
    return encode(scaled.float().flatten(1), dtype), biased.to(torch.uint8)


def decode_mx(data: Tensor, exponents: Tensor, dtype: DType) -> Tensor:
    """What :func:`encode_mx` encoded."""
    factors = torch.exp2(exponents.double() - 127).float().repeat_interleave(32, 1)
    return decode(data, dtype) * factors[: data.shape[0], : data.shape[1]]


# NVFP4: blocks of 16 with an E4M3 scale, and one float32 scale per tensor

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_NVFP4_TOP = 448.0 * 6.0


def encode_nvfp4(matrix: Tensor, amax: Tensor, square: bool, stochastic: bool) -> tuple[Tensor, Tensor]:
    """Two values per byte, and the scales of each row's blocks as bytes of E4M3."""
    rows, columns = matrix.shape
    per_tensor = scale_for(amax, _NVFP4_TOP)
    if square:
        tiles = matrix.unflatten(0, (-1, 16)).unflatten(2, (-1, 16))
        block_amax = tiles.abs().amax((1, 3)).repeat_interleave(16, 0)
    else:
        block_amax = matrix.unflatten(1, (-1, 16)).abs().amax(-1)
    inverse = (block_amax / 6.0 * per_tensor).clamp(max=448.0).to(torch.float8_e4m3fn)
    factor = torch.where(inverse.float() == 0, LARGEST, per_tensor / inverse.float()).clamp(max=LARGEST)
    codes = _nearest_e2m1((matrix.unflatten(1, (-1, 16)) * factor[..., None]).view(rows, columns), stochastic)
    return codes[:, ::2] | (codes[:, 1::2] << 4), inverse.view(torch.uint8)


def decode_nvfp4(data: Tensor, block_scales: Tensor, amax: Tensor) -> Tensor:
    """What :func:`encode_nvfp4` encoded."""
    codes = torch.stack((data & 15, data >> 4), -1).flatten(1).long()
    values = _E2M1[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    factors = block_scales.view(torch.float8_e4m3fn).float().repeat_interleave(16, 1)
    return values * factors[: values.shape[0], : values.shape[1]] * scale_for(amax, _NVFP4_TOP).reciprocal()


def _nearest_e2m1(values: Tensor, stochastic: bool) -> Tensor:
    """The codes of the nearest values, ties to the even code; or of one of the two neighbours, by chance."""
    size = values.abs().clamp(max=6.0).contiguous()
    above = torch.searchsorted(_E2M1, size).clamp(max=7)
    below = (above - 1).clamp(min=0)
    low, high = _E2M1[below], _E2M1[above]
    if stochastic:
        up = torch.rand_like(size) * (high - low) < size - low
    else:
        middle = (low + high) / 2
        up = (size > middle) | ((size == middle) & (above % 2 == 0))
    return (torch.where(up, above, below) + 8 * torch.signbit(values)).to(torch.uint8)
