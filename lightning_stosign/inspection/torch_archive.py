"""What torch.save has written, as plain data with tensors that stay on disk."""

import struct
from collections.abc import Sequence
from typing import Any

import torch

from lightning_stosign.inspection.input_file import InputFile
from lightning_stosign.inspection.messages import CheckpointError
from lightning_stosign.inspection.pickle_reader import Global, PickleError, PickleReader, Unread
from lightning_stosign.inspection.stored_tensor import Storage, StoredTensor, WrappedTensor, is_file_tensor

_DTYPES = {f"torch.{name}": dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
_STORAGE_DTYPES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
    }.items()
}
_UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage")

_BUDGET = 100 << 20  # bytes that what a pickle describes may take, besides a multiple of the file
LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of torch before 1.6
_MOST_LEGACY = 64 << 20  # bytes of pickles at the beginning of such a file
_MOST_RECORDS = 100_000  # of an archive, besides one for each 100 bytes


class Content:
    """What a file holds.

    Attributes:
        value: the object that was saved, as plain data.
        globals: the full names of all classes and functions that it refers to.
    """

    def __init__(self, value: Any, globals: set[str]) -> None:
        self.value = value
        self.globals = globals


def read_torch_archive(file: InputFile, start: int = 0, end: int | None = None) -> Content:
    """Read an archive that ``torch.save`` has written since torch 1.6.

    Args:
        file: the file.
        start: where the archive begins in it.
        end: where it ends; None: where the file does.

    Raises:
        CheckpointError: it is damaged, compressed or no archive of torch's.
    """
    records = _records(file, start, file.size if end is None else end)
    pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError(f"{file.path} is not a PyTorch checkpoint: {_other_archive(records)}")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in records:
        raise CheckpointError(f"{file.path} is a TorchScript model, without optimizer states")
    if f"{prefix}byteorder" in records and _record(file, records[f"{prefix}byteorder"], 16) != b"little":
        raise CheckpointError(f"{file.path} was saved on a big-endian machine; only little-endian files are read")

    def persistent(key: Any) -> Any:
        return _storage(key, lambda name, _: Storage(file, *records[f"{prefix}data/{name}"]))

    data = _record(file, records[pickles[0]])
    reader = PickleReader(data, call, persistent, _BUDGET + 3 * file.size)
    try:
        return Content(reader.load(), reader.globals)
    except PickleError as error:
        raise CheckpointError(f"{file.path} cannot be read: {error}") from error


def read_legacy_archive(file: InputFile) -> Content:
    """Read a file that ``torch.save`` has written before torch 1.6, or without zip since.

    Raises:
        CheckpointError: it is damaged.
    """
    data = file.read(0, min(file.size, _MOST_LEGACY))
    # The storages follow the pickles in the order of the last one; until then their places are not known.
    keys: dict[str, tuple[_LateStorage, int]] = {}

    def late(name: str, size: int) -> Any:
        storage, known = keys.setdefault(name, (_LateStorage(file), size))
        if known != size:
            raise KeyError(name)
        return storage

    reader = PickleReader(data, call, lambda key: _storage(key, late), _BUDGET + 3 * file.size)
    try:
        reader.load()  # the magic number
        protocol = reader.load()
        reader.load()  # about the machine
        if protocol != 1001:
            raise PickleError(f"its protocol {protocol!r:.20} is unknown")
        value = reader.load()
        order = reader.load()
    except PickleError as error:
        raise CheckpointError(f"{file.path} cannot be read: {error}") from error
    position = reader.position
    for name in order if isinstance(order, list) else ():
        (count,) = struct.unpack("<q", file.read(position, 8))
        storage, size = keys.get(name, (None, 0)) if isinstance(name, str) else (None, 0)
        if storage is None or count < 0:
            raise CheckpointError(f"{file.path} is damaged: it has values of no tensor")
        storage.offset, storage.nbytes = position + 8, size
        position += 8 + size
        if position > file.size:
            raise CheckpointError(f"{file.path} is truncated: it refers to bytes beyond its end")
    return Content(value, reader.globals)


class _LateStorage:
    """A :class:`Storage` whose place is found after its tensors."""

    def __init__(self, file: InputFile) -> None:
        self.file, self.offset, self.nbytes = file, 0, file.size


# ---- the pickle's calls ----


def _storage(key: Any, find: Any) -> Any:
    """Return (a storage, its dtype), or Unread."""
    if (
        isinstance(key, tuple)
        and len(key) >= 5
        and key[0] == "storage"
        and isinstance(key[1], Global)
        and isinstance(key[2], str)
        and isinstance(key[4], int)
    ):
        dtype = torch.uint8 if key[1].name in _UNTYPED else _STORAGE_DTYPES.get(key[1].name)
        if dtype is not None and 0 <= key[4] < 1 << 60:
            try:
                return _TypedStorage(find(key[2], key[4] * dtype.itemsize), dtype)
            except KeyError:
                return Unread("torch.storage")
    return Unread("torch.storage")


class _TypedStorage:
    __slots__ = ("dtype", "storage")

    def __init__(self, storage: Storage, dtype: torch.dtype) -> None:
        self.storage, self.dtype = storage, dtype


def call(name: str, args: Sequence[Any]) -> Any:
    """Return what a call of a few well-known functions makes; NotImplemented for all others, and for wrong arguments.

    Args:
        name: the function's full name.
        args: its arguments.
    """
    maker = _CALLS.get(name)
    if maker is None:
        return NotImplemented
    try:
        return maker(*args)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, struct.error):
        return NotImplemented


def _ordered_dict(items: Sequence[Any] = ()) -> Any:
    return {} if not items else NotImplemented


def _size(items: Sequence[int]) -> tuple[int, ...]:
    return _integers(items)


def _device(kind: str, index: int | None = None) -> Any:
    if not isinstance(kind, str) or not isinstance(index, (int, type(None))):
        return NotImplemented
    return kind if index is None else f"{kind}:{index}"


def _encode(text: str, encoding: str) -> Any:
    return text.encode("latin-1") if isinstance(text, str) and encoding in ("latin1", "latin-1") else NotImplemented


def _a_set(items: Sequence[Any] = ()) -> list[Any]:
    return list(items) if isinstance(items, (list, tuple)) else NotImplemented


_NUMPY_FORMATS = {"f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "b1": "?"}
_NUMPY_FORMATS.update({f"u{size}": code for size, code in zip("1248", "BHIQ", strict=True)})


def _numpy_scalar(dtype: Unread, data: bytes) -> Any:
    if dtype.name != "numpy.dtype" or not isinstance(data, bytes):
        return NotImplemented
    order = dtype.state[1] if isinstance(dtype.state, tuple) else "<"
    (value,) = struct.unpack((">" if order == ">" else "<") + _NUMPY_FORMATS[dtype.args[0]], data)
    return value


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or not all(type(value) is int for value in values):
        raise ValueError("not whole numbers")
    return tuple(values)


def _tensor(storage: _TypedStorage, offset: int, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    (offset,) = _integers((offset,))
    return StoredTensor(storage.storage, storage.dtype, _integers(shape), _integers(stride), offset)


def _tensor_v3(storage: _TypedStorage, offset: int, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any) -> Any:
    (offset,) = _integers((offset,))
    return StoredTensor(storage.storage, _DTYPES[dtype.name], _integers(shape), _integers(stride), offset)


def _parameter(data: Any, *_: Any) -> Any:
    return data if isinstance(data, (StoredTensor, WrappedTensor)) else NotImplemented


def _wrapper_subclass(cls: Global, dtype: Global, shape: Any, *_: Any) -> WrappedTensor:
    return WrappedTensor(cls.name, _DTYPES[dtype.name], _integers(shape), {})


def _from_type(function: Global, cls: Global, args: Any, state: Any, *_: Any) -> Any:
    """Make a tensor of a subclass: its description, with its attributes."""
    made = call(function.name, args)
    if isinstance(made, StoredTensor):
        return made
    if not isinstance(made, WrappedTensor):
        return NotImplemented
    fields = state[0] if isinstance(state, tuple) and state else state
    fields = {key: value for key, value in fields.items() if isinstance(key, str)} if isinstance(fields, dict) else {}
    local = fields.get("_local_tensor")
    if is_file_tensor(local):  # a DTensor that was saved without DCP: the part of one rank
        return local
    return WrappedTensor(cls.name, made.dtype, made.shape, fields)


def _unreadable_tensor(kind: str) -> Any:
    return lambda *_: Unread(f"torch.Tensor ({kind})")


_CALLS: dict[str, Any] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": lambda *_: {},
    "builtins.set": _a_set,
    "builtins.frozenset": _a_set,
    "torch.Size": _size,
    "torch.device": _device,
    "_codecs.encode": _encode,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_wrapper_subclass": _wrapper_subclass,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch._utils._rebuild_meta_tensor_no_storage": _unreadable_tensor("meta"),
    "torch._utils._rebuild_sparse_tensor": _unreadable_tensor("sparse"),
    "torch._utils._rebuild_nested_tensor": _unreadable_tensor("nested"),
    "torch._utils._rebuild_qtensor": _unreadable_tensor("quantized"),
    **{f"numpy.{core}.multiarray.scalar": _numpy_scalar for core in ("core", "_core")},
}


def dtype_of(value: Any) -> torch.dtype | None:
    """Return the dtype that a pickle refers to, None for anything else."""
    return _DTYPES.get(value.name) if isinstance(value, Global) else None


# ---- the zip archive ----


def _records(file: InputFile, start: int, end: int) -> dict[str, tuple[int, int]]:
    """Return place and size of each record of a zip archive without compression."""
    size = end - start
    tail_start = max(end - 65_557, start)
    tail = file.read(tail_start, end - tail_start)
    found = tail.rfind(b"PK\5\6")
    if found < 0 or found + 22 > len(tail):
        raise CheckpointError(f"{file.path} is truncated, or not a PyTorch checkpoint: its zip archive has no end")
    count, directory_size, directory = struct.unpack_from("<HII", tail, found + 10)
    locator = found - 20
    if locator >= 0 and tail[locator : locator + 4] == b"PK\6\7":
        (place,) = struct.unpack_from("<Q", tail, locator + 8)
        if place + 56 <= size:
            record = file.read(start + place, 56)
            if record[:4] == b"PK\6\6":
                count, directory_size, directory = struct.unpack_from("<QQQ", record, 32)
    if directory + directory_size > size or count > _MOST_RECORDS + size // 100:
        raise CheckpointError(f"{file.path} is damaged: its zip archive contradicts itself")
    data = file.read(start + directory, directory_size)
    records: dict[str, tuple[int, int]] = {}
    position = 0
    for _ in range(count):
        if data[position : position + 4] != b"PK\1\2" or position + 46 > len(data):
            raise CheckpointError(f"{file.path} is damaged: its zip archive contradicts itself")
        method, stored, plain = struct.unpack_from("<H8xII", data, position + 10)
        name_size, extra_size, comment_size = struct.unpack_from("<HHH", data, position + 28)
        (place,) = struct.unpack_from("<I", data, position + 42)
        name = data[position + 46 : position + 46 + name_size].decode("utf-8", "replace")
        extra = data[position + 46 + name_size : position + 46 + name_size + extra_size]
        plain, stored, place = _zip64(extra, plain, stored, place)
        if method != 0:
            raise CheckpointError(
                f"{file.path} is not a PyTorch checkpoint: it is compressed ({_other_archive([name])})"
            )
        if plain != stored or place + 30 + plain > size or name in records:
            raise CheckpointError(f"{file.path} is damaged: its zip archive contradicts itself")
        records[name] = start + place, plain
        position += 46 + name_size + extra_size + comment_size
    # The local headers, whose lengths differ, are read with the records.
    return _WithoutHeaders(file, records)


class _WithoutHeaders(dict[str, tuple[int, int]]):
    """Places of records without their local headers, each looked up when it is asked for."""

    def __init__(self, file: InputFile, records: dict[str, tuple[int, int]]) -> None:
        super().__init__(records)
        self._file = file

    def __getitem__(self, name: str) -> tuple[int, int]:
        place, size = super().__getitem__(name)
        header = self._file.read(place, 30)
        if header[:4] != b"PK\3\4":
            raise CheckpointError(f"{self._file.path} is damaged: its zip archive contradicts itself")
        name_size, extra_size = struct.unpack_from("<HH", header, 26)
        place += 30 + name_size + extra_size
        if place + size > self._file.size:
            raise CheckpointError(f"{self._file.path} is truncated: it refers to bytes beyond its end")
        return place, size


def _zip64(extra: bytes, *numbers: int) -> list[int]:
    """Replace the numbers that did not fit by those in the extra field."""
    values = list(numbers)
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            field = extra[position + 4 : position + 4 + size]
            for index, value in enumerate(values):
                if value == 0xFFFFFFFF and len(field) >= 8:
                    (values[index],) = struct.unpack_from("<Q", field)
                    field = field[8:]
        position += 4 + size
    return values


def _record(file: InputFile, place: tuple[int, int], most: int | None = None) -> bytes:
    offset, size = place
    return file.read(offset, size if most is None else min(size, most))


def _other_archive(names: Any) -> str:
    names = list(names)[:1000]
    if any(name.endswith(".npy") for name in names):
        return "it is a NumPy archive"
    if any(name.endswith("model.weights.h5") for name in names):
        return "it is a Keras model"
    return "it is a zip archive without torch's records"
