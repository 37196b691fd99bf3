"""Files to inspect: regular files only, read in pieces where they are needed."""

import os
import stat
from pathlib import Path

import torch
from torch import Tensor

from lightning_stosign.inspection.messages import CheckpointError

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class InputFile:
    """A regular file, of which any part can be read.

    It is opened anew for each read, so that a checkpoint of a thousand shards needs one descriptor.

    Args:
        path: the file; links are followed.

    Attributes:
        size: its size in bytes.

    Raises:
        CheckpointError: there is no such file, or it is not a regular one: a pipe or a device is never opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            status = path.stat()
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            raise CheckpointError(f"{path} cannot be opened: {_reason(error)}") from error
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "not a regular file")
            raise CheckpointError(f"{path} is {kind}; only regular files and folders are inspected")
        self.size = status.st_size

    def read(self, offset: int, size: int) -> bytes:
        """Return a part of the file.

        Raises:
            CheckpointError: the file ends before the part does, or cannot be read.
        """
        self._check(offset, size)
        with _Descriptor(self.path) as descriptor:
            data = os.pread(descriptor, size, offset)
            while len(data) < size:  # a read returns at most 2 GB
                more = os.pread(descriptor, size - len(data), offset + len(data))
                if not more:
                    raise CheckpointError(f"{self.path} became shorter while it was read")
                data += more
        return data

    def read_tensor(self, offset: int, size: int) -> Tensor:
        """Return a part of the file as bytes in a tensor, uint8, ``[size]``."""
        self._check(offset, size)
        tensor = torch.empty(size, dtype=torch.uint8, device="cpu")
        view = memoryview(tensor.numpy())  # type: ignore[arg-type]
        done = 0
        with _Descriptor(self.path) as descriptor:
            while done < size:
                got = os.preadv(descriptor, [view[done:]], offset + done)
                if not got:
                    raise CheckpointError(f"{self.path} became shorter while it was read")
                done += got
        return tensor

    def _check(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise CheckpointError(f"{self.path} is truncated: it refers to bytes beyond its end")


class _Descriptor:
    """An open file, for a ``with`` block."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> int:
        try:
            # Without O_NONBLOCK a pipe that has taken the file's place would be waited for.
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be opened: {_reason(error)}") from error
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
