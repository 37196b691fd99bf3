"""Folders that torch.distributed.checkpoint has written: tensors in shards, read where they lie."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_stosign.inspection.input_file import InputFile
from lightning_stosign.inspection.messages import CheckpointError
from lightning_stosign.inspection.pickle_reader import PickleError, PickleReader, Unread
from lightning_stosign.inspection.stored_tensor import FileTensor, JoinedTensor, Shape, StoredTensor, numel
from lightning_stosign.inspection.torch_archive import call, dtype_of, read_torch_archive

METADATA = ".metadata"
_MOST_STRIDED = 1 << 26  # values of a shard in another memory format, which is read whole
_MODULE = "torch.distributed.checkpoint"

Path_ = tuple[str | int, ...]


class DcpFolder:
    """What a folder's ``.metadata`` says of its shards.

    Args:
        folder: the folder.

    Attributes:
        size: bytes of all its files.
        tensors: tensors by their path in the state_dict that was saved.
        objects: of everything else the place, by path; read by :meth:`read_object`.
        globals: the full names of classes and functions that its pickles refer to, as far as they were read.

    Raises:
        CheckpointError: the metadata are damaged, or refer to files that are not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = InputFile(folder / METADATA)
        reader = PickleReader(
            file.read(0, file.size), call, lambda _: Unread("torch.storage"), (100 << 20) + 3 * file.size
        )
        try:
            metadata = reader.load()
            entries = _fields(metadata, "metadata.Metadata")
            described, places = entries["state_dict_metadata"], entries["storage_data"]
            paths = entries.get("planner_data")
            self._files: dict[str, InputFile] = {}
            self._places = self._by_name(places)
            self.size = file.size + sum(each.size for each in self._files.values())
            self.tensors: dict[Path_, FileTensor] = {}
            self.objects: dict[Path_, _Place] = {}
            for name, entry in described.items():
                path = _path(paths, name)
                if isinstance(entry, Unread) and entry.name.endswith(".BytesStorageMetadata"):
                    self.objects[path] = self._places[name][()]
                else:
                    self.tensors[path] = self._tensor(name, _fields(entry, "metadata.TensorStorageMetadata"))
        except CheckpointError:
            raise
        except PickleError as error:
            raise CheckpointError(f"{folder / METADATA} cannot be read: {error}") from error
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{folder / METADATA} is damaged: its entries contradict each other") from error
        self.globals: set[str] = set()

    def read_object(self, path: Path_) -> Any:
        """Read an entry that is no tensor, as plain data."""
        place = self.objects[path]
        content = read_torch_archive(place.file, place.offset, place.offset + place.length)
        self.globals |= content.globals
        return content.value

    def _by_name(self, places: Mapping[Any, Any]) -> dict[str, dict[Shape, "_Place"]]:
        by_name: dict[str, dict[Shape, _Place]] = {}
        for index, info in places.items():
            key = _fields(index, "metadata.MetadataIndex")
            value = _fields(info, "filesystem._StorageInfo")
            if value.get("transform_descriptors"):
                raise CheckpointError(f"{self.folder} is compressed ({value['transform_descriptors']!r:.60}); not read")
            file_name = value["relative_path"]
            if Path(file_name).name != file_name:
                raise CheckpointError(f"{self.folder / METADATA} is damaged: it refers to files elsewhere")
            if file_name not in self._files:
                self._files[file_name] = InputFile(self.folder / file_name)
            file, offset, length = self._files[file_name], value["offset"], value["length"]
            if not (type(offset) is int and type(length) is int and 0 <= offset <= offset + length <= file.size):
                raise CheckpointError(f"{file.path} is truncated: {METADATA} refers to bytes beyond its end")
            place = _Place(file, offset, length)
            by_name.setdefault(key["fqn"], {})[tuple(key.get("offset") or ())] = place
        return by_name

    def _tensor(self, name: str, entry: Mapping[str, Any]) -> FileTensor:
        properties = entry["properties"]
        state = properties.state if isinstance(properties, Unread) else None
        dtype = dtype_of(state[0] if isinstance(state, tuple) else state["dtype"])  # type: ignore[index]
        if dtype is None:
            raise ValueError("a tensor without a dtype")
        shape = _whole_numbers(entry["size"])
        parts: list[tuple[Shape, FileTensor]] = []
        for chunk in entry["chunks"]:
            fields = _fields(chunk, "metadata.ChunkStorageMetadata")
            offsets, sizes = _whole_numbers(fields["offsets"]), _whole_numbers(fields["sizes"])
            places = self._places[name]
            place = places[offsets] if offsets in places else places[()]
            parts.append((offsets, _Chunk(place, dtype, sizes)))
        return JoinedTensor(dtype, shape, parts)


class _Place:
    __slots__ = ("file", "length", "offset")

    def __init__(self, file: InputFile, offset: int, length: int) -> None:
        self.file, self.offset, self.length = file, offset, length


class _Chunk:
    """A shard of a tensor: a file of torch.save's within a file."""

    __slots__ = ("_place", "_tensor", "dtype", "shape")

    def __init__(self, place: _Place, dtype: torch.dtype, shape: Shape) -> None:
        self._place, self.dtype, self.shape = place, dtype, shape
        self._tensor: StoredTensor | None = None

    def read_run(self, start: int, stop: int) -> Tensor:
        if self._tensor is None:
            place = self._place
            tensor = read_torch_archive(place.file, place.offset, place.offset + place.length).value
            if not isinstance(tensor, StoredTensor) or (tensor.dtype, tensor.shape) != (self.dtype, self.shape):
                raise CheckpointError(f"{place.file.path} is damaged: a shard is not what {METADATA} says")
            if not tensor.is_contiguous and numel(tensor) > _MOST_STRIDED:
                raise CheckpointError(f"{place.file.path} holds a shard that is neither contiguous nor small: not read")
            self._tensor = tensor
        return self._tensor.read_run(start, stop)


def _fields(value: Any, kind: str) -> dict[str, Any]:
    """Return the fields of an object of a class of DCP's."""
    if not isinstance(value, Unread) or value.name != f"{_MODULE}.{kind}":
        raise ValueError(f"no {kind}")
    if value.state is None:
        return {}
    if not isinstance(value.state, dict):
        raise ValueError(f"no {kind}")
    return value.state


def _whole_numbers(values: Any) -> Shape:
    if not isinstance(values, tuple) or not all(type(n) is int and 0 <= n < 1 << 60 for n in values):
        raise ValueError("not whole numbers")
    return values


def _path(paths: Any, name: str) -> Path_:
    path = paths.get(name) if isinstance(paths, dict) else None
    if isinstance(path, tuple) and path and all(isinstance(part, (str, int)) for part in path):
        return path
    if not isinstance(name, str):
        raise ValueError("a name that is none")
    return (name,)
