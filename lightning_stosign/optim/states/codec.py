"""A state during a step: decoded before the formulas, encoded after them."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_stosign.optim.numerics.fp4 import read_fp4, store_fp4
from lightning_stosign.optim.numerics.fp8 import widen
from lightning_stosign.optim.numerics.rounding import (
    LARGEST_GRADIENT,
    power_of_two_scale,
    round_stochastically,
    round_to_nearest,
    round_up,
)
from lightning_stosign.optim.states.state_precision import FP8_DTYPES, StatePrecision


class Codec:
    """Some values of a state, unless it is one of four bits.

    Every method that encodes returns the values as stored, for the formulas to go on with.

    Args:
        stored: in the storage's dtype; a row per block under ``scaling="block"``, else of any shape. Changed in place.
        precision: how the values are stored.
        scale: float32: ``[]`` under ``scaling="tensor"``, ``[rows]`` under ``"block"`` (changed in place), else None.
        new_scale: the scale to store with under ``scaling="tensor"``; None to only decode.
        compute_dtype: float32, or float64 for a float64 parameter.
    """

    def __init__(
        self,
        stored: Tensor,
        precision: StatePrecision,
        scale: Tensor | None,
        new_scale: Tensor | None,
        compute_dtype: torch.dtype,
    ) -> None:
        self._stored, self._precision, self._scale, self._new_scale = stored, precision, scale, new_scale
        self._dtype, self._compute_dtype = stored.dtype, compute_dtype
        self._is_exact = stored.dtype == compute_dtype

    @property
    def largest_gradient(self) -> float:
        """The magnitude up to which a gradient may count, for the state to stay finite."""
        return 2.0**1022 if self._stored.dtype == torch.float64 else LARGEST_GRADIENT

    def decode(self) -> Tensor:
        """Return the values, to be changed in place and then handed to a method that encodes."""
        if self._is_exact:
            return self._stored
        value = self._widened(self._stored)
        if self._precision.scaling == "none":
            static_scale = self._precision.static_scale
            return value.mul_(1 / static_scale) if static_scale != 1 else value
        assert self._scale is not None
        return value.mul_(self._per_value(self._scale))

    def encode(self, value: Tensor, fraction: Tensor | None = None) -> Tensor:
        """Store values rounded to nearest, or stochastically by a fraction in [0, 1) per value."""
        if self._is_exact:
            return value
        scaled, scale = self._scaled(value)
        if fraction is None or self._dtype.itemsize >= 4:
            rounded = round_to_nearest(scaled, self._dtype)
        else:
            rounded = round_stochastically(scaled, self._dtype, fraction)
        self._stored.copy_(rounded)
        return self._unscaled(self._widened(rounded), scale)

    def encode_up(self, value: Tensor) -> Tensor:
        """Store values >= 0 rounded up."""
        if self._is_exact:
            return value
        scaled, scale = self._scaled(value)
        rounded = round_up(scaled, self._dtype) if self._dtype.itemsize < 4 else scaled
        self._stored.copy_(rounded)
        return self._unscaled(rounded.to(self._compute_dtype), scale)

    def encode_decayed(self, value: Tensor, at_least: Tensor, fraction: Tensor) -> Tensor:
        """Store values >= 0 rounded stochastically, or ``at_least`` rounded up where that is more.

        Rounding up would undo a decay that does not reach the next lower number, at every step again.
        """
        scale = self._next_scale(torch.maximum(value, at_least))
        random = round_stochastically(self._divided(value, scale), self._dtype, fraction)
        rounded = torch.maximum(random, round_up(self._divided(at_least, scale), self._dtype))
        self._stored.copy_(rounded)
        return self._unscaled(rounded.to(self._compute_dtype), scale)

    def _widened(self, value: Tensor) -> Tensor:
        return (widen(value) if value.dtype in FP8_DTYPES else value).to(self._compute_dtype)

    def _scaled(self, value: Tensor) -> tuple[Tensor, Tensor | None]:
        scale = self._next_scale(value)
        return self._divided(value, scale), scale

    def _next_scale(self, value: Tensor) -> Tensor | None:
        """Return the scale to store values with; the scales of blocks are stored themselves."""
        if self._precision.scaling != "block":
            return self._new_scale
        assert self._scale is not None
        amax = value.to(torch.float32).abs().amax(dim=1)
        scale = power_of_two_scale(amax, torch.finfo(self._dtype).max)
        self._scale.copy_(scale)
        return scale

    def _divided(self, value: Tensor, scale: Tensor | None) -> Tensor:
        value = value.to(torch.float32)
        if scale is not None:
            return value * self._per_value(1 / scale)
        static_scale = self._precision.static_scale
        return value * static_scale if static_scale != 1 else value

    def _unscaled(self, rounded: Tensor, scale: Tensor | None) -> Tensor:
        if scale is not None:
            return rounded * self._per_value(scale)
        static_scale = self._precision.static_scale
        return rounded * (1 / static_scale) if static_scale != 1 else rounded

    def _per_value(self, scale: Tensor) -> Tensor:
        return scale.view(-1, 1) if self._precision.scaling == "block" else scale


class Fp4Codec(Codec):
    """Some blocks of a four-bit state: whole ones, or the last one of a parameter, which may have fewer values.

    Args:
        stored: uint8, ``[rows, block size / 2]``; changed in place.
        precision: how the values are stored.
        scale: E4M3, ``[rows]``; changed in place.
        tensor_scale: the scale they were stored with, float32, ``[]``.
        new_tensor_scale: the scale to store with; None to only decode.
        compute_dtype: as in :class:`Codec`.
        row: the number of values in a row.
    """

    def __init__(
        self,
        stored: Tensor,
        precision: StatePrecision,
        scale: Tensor,
        tensor_scale: Tensor,
        new_tensor_scale: Tensor | None,
        compute_dtype: torch.dtype,
        row: int,
    ) -> None:
        super().__init__(stored, precision, scale, new_tensor_scale, compute_dtype)
        self._block_scale, self._tensor_scale, self._row = scale, tensor_scale, row

    def decode(self) -> Tensor:
        """Return the values, to be changed in place and then handed to a method that encodes."""
        return self._values(self._tensor_scale)

    def encode(self, value: Tensor, fraction: Tensor | None = None) -> Tensor:
        """Store values rounded to nearest, or stochastically by a fraction in [0, 1) per value."""
        return self._encode(value, "nearest", fraction)

    def encode_up(self, value: Tensor) -> Tensor:
        """Store values >= 0 rounded up."""
        return self._encode(value, "up", None)

    def _encode(self, value: Tensor, rounding: Literal["nearest", "up"], fraction: Tensor | None) -> Tensor:
        assert self._new_scale is not None
        stored, scale = store_fp4(
            self._padded(value.to(torch.float32)),
            self._new_scale,
            rounding,
            None if fraction is None else self._padded(fraction),
        )
        self._stored.copy_(stored)
        self._block_scale.copy_(scale)
        return self._values(self._new_scale)

    def _values(self, tensor_scale: Tensor) -> Tensor:
        blocks = read_fp4(self._stored, self._block_scale, tensor_scale)
        return blocks[:, : self._row].to(self._compute_dtype)

    def _padded(self, value: Tensor) -> Tensor:
        return pad(value, (0, 2 * self._stored.shape[1] - self._row))
