"""FP8 numbers from and to their bits, faster than torch's own conversions on the CPU and as exact.

For torch.compile there are :func:`decode` and :func:`encode`, of float32 and int32 operations that it vectorises: they
go by a number that has the same bits but a leading one,
which subnormal numbers lack: ``smallest normal + x`` for a subnormal ``2 * x``.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class _Format(NamedTuple):
    mantissa_bits: int
    bias: int  # of the exponent
    largest: int  # the bits of the largest number; what is above is inf or NaN

    @property
    def dropped(self) -> int:
        """Of float32's mantissa bits."""
        return 23 - self.mantissa_bits

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)


_FORMATS = {torch.float8_e4m3fn: _Format(3, 7, 0x7E), torch.float8_e5m2: _Format(2, 15, 0x7B)}

_SIGN = -(1 << 31)

# Values that widen goes over at a time, so that its passes stay in the cache.
_CHUNK = 1 << 15


def widen(stored: Tensor) -> Tensor:
    """Return ``stored.to(torch.float32, copy=True)``; of FP8 on the CPU eagerly in a third of the time.

    Args:
        stored: any dtype, any shape.
    """
    if stored.dtype not in _FORMATS or stored.device.type != "cpu" or not stored.is_contiguous():
        return stored.to(torch.float32, copy=True)
    value = torch.empty_like(stored, dtype=torch.float32)
    for bits, part in zip(stored.view(torch.int8).view(-1).split(_CHUNK), value.view(-1).split(_CHUNK), strict=True):
        half = bits.to(torch.int16)
        if stored.dtype == torch.float8_e5m2:  # float16's upper byte
            part.copy_((half << 8).view(torch.float16))
            continue
        # E4M3 with four of float16's five bits of exponent, whose bias is larger by 8
        magnitude = (half << 7).bitwise_and_(0x3F80)
        magnitude.masked_fill_(magnitude == 0x3F80, 0x7E00)  # NaN
        part.copy_(magnitude.bitwise_or_(half.bitwise_and_(-(1 << 15))).view(torch.float16)).mul_(256.0)
    return value


def decode(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the float32 values of FP8 numbers: what ``.to(torch.float32)`` does.

    Args:
        bits: int8, any shape: ``stored.view(torch.int8)``.
        dtype: ``torch.float8_e4m3fn`` or ``torch.float8_e5m2``.
    """
    form = _FORMATS[dtype]
    word = bits.to(torch.int32)
    magnitude = word & 0x7F
    exponent = 127 - form.bias
    # inf and NaN have float32's largest exponent
    missing = 255 - exponent - ((form.largest + 1) >> form.mantissa_bits)
    beyond = (form.largest - magnitude) >> 31  # all ones there
    with_one = ((magnitude << form.dropped) + (exponent << 23) + (beyond & (missing << 23))).view(torch.float32)
    value = with_one - torch.relu(form.smallest_normal - with_one)
    return (value.view(torch.int32) | (word & _SIGN)).view(torch.float32)


def encode(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bits of FP8 numbers, int8: what ``.to(dtype).view(torch.int8)`` does where that is exact.

    Args:
        value: float32, any shape; each a finite number of ``dtype``, or NaN.
        dtype: as above.
    """
    form = _FORMATS[dtype]
    magnitude = value.abs()
    with_one = magnitude + 0.5 * torch.relu(form.smallest_normal - magnitude)
    bits = (with_one.view(torch.int32) >> form.dropped) - ((127 - form.bias) << form.mantissa_bits)
    sign = (value.view(torch.int32) >> 24) & 0x80
    return (bits.clamp(max=0x7F) | sign).to(torch.int8)  # NaN has all ones
