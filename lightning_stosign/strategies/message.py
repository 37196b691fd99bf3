"""What goes to a worker in one piece: the uncompressed values of its part of a bucket, and signs or counts.

Each collective costs a message, its headers and its acknowledgement for every pair of workers. With 8 workers and small
buckets those of an all_reduce of its own for the uncompressed values are a twentieth of all traffic.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Message:
    """The parts of a message, in bytes one after the other.

    Args:
        exact: number of uncompressed values.
        dtype: their type.
        packed: bytes of packed signs or counts.
    """

    exact: int
    dtype: torch.dtype
    packed: int

    @property
    def length(self) -> int:
        """Bytes of a message: a multiple of 8, so that the next one's values lie where values may lie."""
        return -(-(self.exact * self.dtype.itemsize + self.packed) // 8) * 8

    def empty(self, rows: int, device: torch.device) -> Tensor:
        """Return room for messages: uint8, shape ``[rows, length]``."""
        return torch.empty((rows, self.length), dtype=torch.uint8, device=device)

    def exact_of(self, messages: Tensor) -> Tensor:
        """Return a view of the uncompressed values: shape ``[rows, exact]``."""
        return messages[:, : self.exact * self.dtype.itemsize].view(self.dtype)

    def packed_of(self, messages: Tensor) -> Tensor:
        """Return a view of the packed signs or counts: uint8, shape ``[rows, packed]``."""
        start = self.exact * self.dtype.itemsize
        return messages[:, start : start + self.packed]
