"""Safetensors files: a header of JSON, and the tensors' bytes."""

import json
import math
from typing import Any

import torch

from lightning_stosign.inspection.input_file import InputFile
from lightning_stosign.inspection.messages import CheckpointError
from lightning_stosign.inspection.stored_tensor import Storage, StoredTensor, contiguous_stride

_MOST_HEADER = 100_000_000  # bytes, as in the format's own reader
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def is_safetensors(file: InputFile) -> bool:
    """Return whether a file begins as a safetensors file does."""
    if file.size < 10:
        return False
    head = file.read(0, 9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= min(file.size - 8, _MOST_HEADER)


def read_safetensors(file: InputFile) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name; those of a dtype that torch lacks are left out.

    Raises:
        CheckpointError: it is damaged.
    """
    length = int.from_bytes(file.read(0, 8), "little")
    try:
        header = json.loads(file.read(8, length).decode("utf-8"))
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        tensors = [(name, _tensor(file, 8 + length, entry)) for name, entry in entries]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file.path} is damaged: its safetensors header contradicts itself") from error
    return {name: tensor for name, tensor in tensors if tensor is not None}


def _tensor(file: InputFile, start: int, entry: dict[str, Any]) -> StoredTensor | None:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        return None
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(type(n) is int and 0 <= n < 1 << 60 for n in (*shape, begin, end)):
        raise ValueError("not whole numbers")
    if end - begin != math.prod(shape) * dtype.itemsize or start + end > file.size:
        raise ValueError("a tensor that exceeds the file")
    return StoredTensor(Storage(file, start + begin, end - begin), dtype, shape, contiguous_stride(shape), 0)
