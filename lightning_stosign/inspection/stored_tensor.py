"""Tensors that stay in their file until they are read, whole or a run of their values at a time."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_stosign.inspection.input_file import InputFile
from lightning_stosign.inspection.messages import CheckpointError

Shape = tuple[int, ...]


@runtime_checkable
class FileTensor(Protocol):
    """A tensor in a file.

    Attributes:
        dtype: its dtype.
        shape: its shape.
    """

    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102

    @property
    def shape(self) -> Shape: ...  # noqa: D102

    def read_run(self, start: int, stop: int) -> Tensor:
        """Read the values from one row-major index up to another; flat."""
        ...


class Storage(NamedTuple):
    """Bytes of a file.

    Attributes:
        file: the file.
        offset: where they begin.
        nbytes: how many they are.
    """

    file: InputFile
    offset: int
    nbytes: int


class StoredTensor:
    """A strided tensor in a storage.

    Raises:
        ValueError: it does not fit into its storage.
    """

    __slots__ = ("dtype", "offset", "shape", "storage", "stride")

    def __init__(self, storage: Storage, dtype: torch.dtype, shape: Shape, stride: Shape, offset: int) -> None:
        if len(shape) != len(stride) or offset < 0 or any(n < 0 for n in shape) or any(n < 0 for n in stride):
            raise ValueError("a tensor of no possible shape")
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        size = math.prod(shape)
        if size and max(last + 1, size) * dtype.itemsize > storage.nbytes:
            raise ValueError("a tensor that exceeds its storage")
        self.storage, self.dtype, self.shape, self.stride, self.offset = storage, dtype, shape, stride, offset

    @property
    def is_contiguous(self) -> bool:
        """Whether its values lie in the file in row-major order."""
        expected = 1
        for n, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if n != 1 and step != expected:
                return False
            expected *= n
        return True

    def read_run(self, start: int, stop: int) -> Tensor:
        """Read the values from one row-major index up to another; flat."""
        size = self.dtype.itemsize
        if self.is_contiguous:
            begin = self.storage.offset + (self.offset + start) * size
            return self.storage.file.read_tensor(begin, (stop - start) * size).view(self.dtype)
        # Channels last, mostly. What fits into its storage fits into memory as the storage does.
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        begin = self.storage.offset + self.offset * size
        values = self.storage.file.read_tensor(begin, (last + 1) * size).view(self.dtype)
        return values.as_strided(self.shape, self.stride).reshape(-1)[start:stop]


class JoinedTensor:
    """A tensor whose parts lie in several places: shards of a distributed checkpoint.

    Args:
        dtype: of all parts.
        shape: of the whole.
        parts: for each part its offsets in the whole, and the part.

    Raises:
        ValueError: the parts do not make up the whole.
    """

    __slots__ = ("dtype", "parts", "shape")

    def __init__(self, dtype: torch.dtype, shape: Shape, parts: Sequence[tuple[Shape, FileTensor]]) -> None:
        for offsets, part in parts:
            inside = len(offsets) == len(part.shape) == len(shape) and all(
                o >= 0 and o + n <= whole for o, n, whole in zip(offsets, part.shape, shape, strict=True)
            )
            if not inside or part.dtype != dtype:
                raise ValueError("a shard that does not fit into its tensor")
        if sum(math.prod(part.shape) for _, part in parts) != math.prod(shape):
            raise ValueError("a tensor of which shards are missing")
        self.dtype, self.shape = dtype, shape
        self.parts = sorted(((o, p) for o, p in parts if math.prod(p.shape)), key=lambda part: part[0])

    def read_run(self, start: int, stop: int) -> Tensor:
        """Read the values from one row-major index up to another; flat."""
        if not self.shape or len(self.parts) == 1:
            return self.parts[0][1].read_run(start, stop)
        row = math.prod(self.shape[1:])
        first, end = start // row, -(-stop // row)
        band = torch.zeros((end - first, *self.shape[1:]), dtype=self.dtype, device="cpu")
        for offsets, part in self.parts:
            top, bottom = max(offsets[0], first), min(offsets[0] + part.shape[0], end)
            if top >= bottom:
                continue
            width = math.prod(part.shape[1:])
            values = part.read_run((top - offsets[0]) * width, (bottom - offsets[0]) * width)
            place = [slice(top - first, bottom - first)]
            place += [slice(o, o + n) for o, n in zip(offsets[1:], part.shape[1:], strict=True)]
            band[tuple(place)] = values.view(bottom - top, *part.shape[1:])
        return band.view(-1)[start - first * row : stop - first * row]


class FlatPart:
    """A run of the values of a flat tensor, which several parameters share.

    Args:
        whole: the flat tensor.
        start: where the run begins.
        shape: of the parameter.
    """

    __slots__ = ("shape", "start", "whole")

    def __init__(self, whole: FileTensor, start: int, shape: Shape) -> None:
        if start < 0 or start + math.prod(shape) > math.prod(whole.shape):
            raise ValueError("a parameter that exceeds its flat tensor")
        self.whole, self.start, self.shape = whole, start, shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the flat tensor."""
        return self.whole.dtype

    def read_run(self, start: int, stop: int) -> Tensor:
        """Read the values from one row-major index up to another; flat."""
        return self.whole.read_run(self.start + start, self.start + stop)


class WrappedTensor:
    """A tensor of a subclass, with the tensors that it is made of.

    Args:
        class_name: the full name of the subclass.
        dtype: what it says its dtype is.
        shape: its shape.
        fields: its attributes.
    """

    __slots__ = ("class_name", "dtype", "fields", "shape")

    def __init__(self, class_name: str, dtype: torch.dtype, shape: Shape, fields: Mapping[str, Any]) -> None:
        self.class_name, self.dtype, self.shape, self.fields = class_name, dtype, shape, fields

    @property
    def parts(self) -> list[FileTensor]:
        """The tensors that it is made of."""
        return [value for value in self.fields.values() if is_file_tensor(value)]


def is_file_tensor(value: Any) -> bool:
    """Return whether a value is a tensor whose values can be read from a file."""
    return isinstance(value, (StoredTensor, JoinedTensor, FlatPart))


def numel(tensor: FileTensor | WrappedTensor) -> int:
    """Return the number of values."""
    return math.prod(tensor.shape)


def nbytes(value: Any) -> int:
    """Return how many bytes are read for a value of a state."""
    if isinstance(value, WrappedTensor):
        return sum(map(nbytes, value.parts))
    return numel(value) * value.dtype.itemsize if is_file_tensor(value) else 0


def read_whole(tensor: FileTensor) -> Tensor:
    """Read a tensor, in its shape."""
    if numel(tensor) == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return tensor.read_run(0, numel(tensor)).view(tensor.shape)


def contiguous_stride(shape: Shape) -> Shape:
    """Return the strides of a tensor whose values lie in row-major order."""
    stride, step = [], 1
    for n in reversed(shape):
        stride.append(step)
        step *= max(n, 1)
    return tuple(reversed(stride))


def check_size(tensors: Sequence[Any], file_size: int, path: object) -> None:
    """Raise CheckpointError if tensors together would take many times their file to read, by sharing its bytes."""
    if sum(map(nbytes, tensors)) > 4 * file_size + (64 << 20):
        raise CheckpointError(f"{path} is damaged: its states are many times larger than the file")
