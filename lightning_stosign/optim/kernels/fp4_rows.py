"""Blocks of a four-bit state during its update."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_stosign.optim.kernels.eager import Noise, StoredRows
from lightning_stosign.optim.numerics.fp4 import read_fp4, store_fp4
from lightning_stosign.optim.numerics.noise import Stream
from lightning_stosign.optim.states.state_precision import StatePrecision


class Fp4Rows(StoredRows):
    """Rows of a four-bit state: whole blocks, or the last one of a parameter, which may have fewer values.

    Args:
        stored: uint8, ``[rows, block size / 2]``; changed in place.
        precision: how they are stored.
        scale: E4M3, ``[rows]``; changed in place.
        tensor_scale: the scale they were stored with, float32, ``[]``.
        new_tensor_scale: the scale to store with; None to only read.
        compute_dtype: as in :class:`StoredRows`.
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

    def read(self) -> Tensor:
        """Return the values, to be changed in place and then handed to a write method."""
        return self._values(self._tensor_scale)

    def write(self, value: Tensor, noise: Noise) -> Tensor:
        """Store values to nearest, or at random if the precision says so; return them as stored."""
        stochastic = self._precision.stochastic_rounding
        return self._write(value, "nearest", noise.fraction(Stream.ROUND_STATE) if stochastic else None)

    def write_up(self, value: Tensor) -> Tensor:
        """Store values >= 0 rounded up and return them as stored."""
        return self._write(value, "up", None)

    def write_decayed(self, value: Tensor, at_least: Tensor, noise: Noise) -> Tensor:
        """Store the larger of values >= 0 rounded up: in four bits a decay is not kept on average."""
        return self.write_up(torch.maximum(value, at_least))

    def _write(self, value: Tensor, rounding: Literal["nearest", "up"], fraction: Tensor | None) -> Tensor:
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
