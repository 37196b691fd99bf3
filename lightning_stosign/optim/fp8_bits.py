"""FP8 numbers from and to their bits, by float32 and int32 operations alone: exact, for torch.compile to vectorise.

Its own conversions take several times as long. Both directions go by a number that has the same bits but a leading one,
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
