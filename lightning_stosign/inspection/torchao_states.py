"""The quantised states of torchao's optimizers, as the values they stand for, without torchao."""

import math

import torch
from torch import Tensor

from lightning_stosign.inspection.stored_tensor import WrappedTensor, is_file_tensor, read_whole

_NEEDED = {
    "OptimState8bit": ("codes", "scale", "qmap"),
    "OptimState4bit": ("codes", "scale", "qmap"),
    "OptimStateFp8": ("codes", "scale"),
}


def is_torchao(value: WrappedTensor) -> bool:
    """Return whether this is a state of torchao's low-bit optimizers, with all its parts."""
    package, _, name = value.class_name.rpartition(".")
    parts = _NEEDED.get(name)
    if package.partition(".")[0] != "torchao" or parts is None:
        return False
    return all(is_file_tensor(value.fields.get(part)) for part in parts)


def dequantize(value: WrappedTensor) -> Tensor:
    """Return the values of a state of torchao's, float32: codes or FP8 values, times a scale per block.

    Raises:
        ValueError: its parts contradict each other.
    """
    name = value.class_name.rpartition(".")[2]
    parts = {part: read_whole(value.fields[part]) for part in _NEEDED[name]}
    codes, scale = parts["codes"].reshape(-1), parts["scale"].float().reshape(-1)
    if name == "OptimStateFp8":
        values = codes.float()
    else:
        if name == "OptimState4bit":  # two to a byte, the first in its upper half
            codes = torch.stack([codes >> 4, codes & 0xF], dim=-1).reshape(-1)
        book = parts["qmap"].float().reshape(-1)
        if codes.dtype != torch.uint8 or len(book) == 0 or int(codes.max()) >= len(book):
            raise ValueError("codes beyond the code book")
        values = book[codes.int()]
    size = math.prod(value.shape)
    if values.numel() != size or len(scale) == 0 or size % len(scale):
        raise ValueError("the number of codes does not fit the shape or the scales")
    return (values.view(len(scale), -1) * scale.unsqueeze(1)).view(value.shape)
