"""Storing optimizer states: rounding to low precision, with or without a scale, and back."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_stosign.optim.numerics.fp4 import (
    E2M1_EPS,
    E2M1_MAX,
    FP4_LARGEST,
    SCALE_DTYPE,
    fp4_block_scales,
    fp4_tensor_scale,
    read_fp4,
    store_fp4,
)
from lightning_stosign.optim.numerics.fp8 import widen
from lightning_stosign.optim.numerics.noise import uniform_fraction
from lightning_stosign.optim.numerics.rounding import (
    below_overflow,
    power_of_two_scale,
    round_stochastically,
    round_to_nearest,
    round_up,
)
from lightning_stosign.optim.sharding import local
from lightning_stosign.optim.states.state_precision import StatePrecision

SCALE_SUFFIX = "_scale"
TENSOR_SCALE_SUFFIX = "_scale_scale"  # of four-bit states, whose block scales have a scale themselves
SHAPE_SUFFIX = "_shape"  # likewise: bytes do not tell


def quantize(
    value: Tensor,
    precision: StatePrecision,
    *,
    rounding: Literal["nearest", "up"] = "nearest",
    static_scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Round a state to its storage format, if that is not one of four bits.

    Values beyond the format's range become its largest value; NaN stays NaN.

    Args:
        value: float32 or float64, any shape.
        precision: the storage format.
        rounding: ``"nearest"`` (ties to even), or ``"up"``: never below ``value``, which must not be negative.
        static_scale: factor applied before rounding under ``scaling="none"``.

    Returns:
        The stored tensor (``precision.dtype``, shape and memory format of ``value``) and its float32 scale: None
        under ``scaling="none"``, shape ``[]`` under ``"tensor"``, ``[ceil(numel / block_size)]`` under ``"block"``.
    """
    scale = None
    scaled = value.float() * static_scale if static_scale != 1.0 else value.float()
    if precision.scaling != "none":
        scaled = below_overflow(scaled, torch.finfo(precision.dtype).eps)
        scale = power_of_two_scale(_block_amax(scaled, precision), torch.finfo(precision.dtype).max)
        scaled = _by_block(torch.div, scaled, scale, precision)
    if rounding == "up":
        return round_up(scaled, precision.dtype).to(precision.dtype), scale
    return round_to_nearest(scaled, precision.dtype), scale


def round_by_noise(value: Tensor, dtype: torch.dtype, key: int) -> Tensor:
    """Round float32 values stochastically to ``dtype``, by the noise of ``key`` at each element's row-major index."""
    fraction = uniform_fraction(key, value.numel(), device=value.device).view(value.shape)
    return round_stochastically(value, dtype, fraction).to(dtype)


def dequantize(stored: Tensor, scale: Tensor | None, precision: StatePrecision, *, static_scale: float = 1.0) -> Tensor:
    """Return the float32 values of what :func:`quantize` stored: a new tensor of the same shape."""
    value = widen(stored)
    if scale is not None:
        return _by_block(torch.mul, value, scale, precision)
    return value.div_(static_scale) if static_scale != 1.0 else value


class Packed(NamedTuple):
    """A state in four bits.

    Attributes:
        stored: uint8, ``[ceil(numel / block_size) * block_size / 2]``: padded with zeros to whole blocks.
        scale: :data:`SCALE_DTYPE`, ``[ceil(numel / block_size)]``.
        tensor_scale: float32, ``[]``.
    """

    stored: Tensor
    scale: Tensor
    tensor_scale: Tensor


def pack(
    value: Tensor,
    precision: StatePrecision,
    *,
    rounding: Literal["nearest", "up"] = "nearest",
) -> Packed:
    """Round a state to four bits a value; as :func:`quantize`, but that a NaN takes its block with it."""
    value = below_overflow(value.float(), E2M1_EPS)
    tensor_scale = fp4_tensor_scale(value.abs().amax())
    stored, scale = store_fp4(_blocks(value, precision.block_size), tensor_scale, rounding)
    return Packed(stored.flatten(), scale, tensor_scale)


def unpack(packed: Packed, shape: Sequence[int]) -> Tensor:
    """Return the float32 values of what :func:`pack` made of a state of this shape: a new tensor."""
    values = read_fp4(packed.stored.view(len(packed.scale), -1), packed.scale, packed.tensor_scale)
    return values.view(-1)[: math.prod(shape)].view(tuple(shape))


def round_trip(value: Tensor, precision: StatePrecision, *, static_scale: float = 1.0) -> Tensor:
    """Return what is left of values after storing them, rounded to nearest; float32, same shape."""
    if precision.is_fp4:
        return unpack(pack(value, precision), value.shape)
    stored, scale = quantize(value, precision, static_scale=static_scale)
    return dequantize(stored, scale, precision, static_scale=static_scale)


def is_packed(state: Mapping[str, Any], name: str) -> bool:
    """Return whether ``state[name]`` holds four-bit values."""
    return name + TENSOR_SCALE_SUFFIX in state


def companions(state: Mapping[str, Any], name: str) -> list[str]:
    """Return the names of the entries that belong to the state of this name: its scales, its shape."""
    return [name + suffix for suffix in (SCALE_SUFFIX, TENSOR_SCALE_SUFFIX, SHAPE_SUFFIX) if name + suffix in state]


def read_state(state: Mapping[str, Any], name: str, precision: StatePrecision) -> Tensor:
    """Return the values of ``state[name]`` in float32; the state tensor itself if it is float32 or float64."""
    stored = state[name]
    if stored.dtype in (torch.float32, torch.float64):
        return stored
    if is_packed(state, name):
        packed = Packed(stored, state[name + SCALE_SUFFIX], state[name + TENSOR_SCALE_SUFFIX])
        return unpack(packed, state[name + SHAPE_SUFFIX].tolist())
    return dequantize(stored, state.get(name + SCALE_SUFFIX), precision, static_scale=precision.static_scale)


def write_state(
    state: dict[str, Any],
    name: str,
    value: Tensor,
    precision: StatePrecision,
    *,
    rounding: Literal["nearest", "up"] = "nearest",
) -> Tensor:
    """Store ``value`` as ``state[name]`` in place and return the values as stored, in float32.

    Arguments as in :func:`quantize`. Returns ``value`` itself, unrounded, if the state is float32 or float64.
    """
    stored = state[name]
    if stored.dtype in (torch.float32, torch.float64):
        return value if value is stored else stored.copy_(value)
    if precision.is_fp4:
        packed = pack(value, precision, rounding=rounding)
        for suffix, tensor in zip(("", SCALE_SUFFIX, TENSOR_SCALE_SUFFIX), packed, strict=True):
            state[name + suffix].copy_(tensor)
        return unpack(packed, value.shape)
    rounded, scale = quantize(value, precision, rounding=rounding, static_scale=precision.static_scale)
    stored.copy_(rounded)
    if scale is not None:
        state[name + SCALE_SUFFIX].copy_(scale)
    return dequantize(stored, scale, precision, static_scale=precision.static_scale)


def init_state(state: dict[str, Any], name: str, param: Tensor, precision: StatePrecision | None) -> None:
    """Create a zero state for ``param``; without a precision in float32, or float64 for a float64 parameter."""
    if precision is not None and precision.is_fp4:
        _init_packed(state, name, param, precision.block_size)
        return
    dtype = torch.promote_types(param.dtype, torch.float32) if precision is None else precision.dtype
    state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    if precision is not None and precision.scaling != "none":
        shape = () if precision.scaling == "tensor" else (-(-param.numel() // precision.block_size),)
        state[name + SCALE_SUFFIX] = torch.ones(shape, dtype=torch.float32, device=param.device)


def _init_packed(state: dict[str, Any], name: str, param: Tensor, block_size: int) -> None:
    blocks, device = -(-param.numel() // block_size), param.device
    one = torch.ones((), dtype=torch.float32, device=device)
    state[name] = torch.zeros(blocks * block_size // 2, dtype=torch.uint8, device=device)
    state[name + SCALE_SUFFIX] = fp4_block_scales(torch.zeros(blocks, dtype=torch.float32, device=device), one)
    state[name + TENSOR_SCALE_SUFFIX] = one
    # On the CPU, where reading it costs no synchronisation.
    state[name + SHAPE_SUFFIX] = torch.tensor(tuple(param.shape), dtype=torch.int64, device="cpu")


def largest_number(precision: StatePrecision) -> float:
    """Return the largest magnitude that can be stored under a tensor scale of 1."""
    return FP4_LARGEST if precision.is_fp4 else torch.finfo(precision.dtype).max


def largest_as_stored(largest: Tensor, precision: StatePrecision) -> Tensor:
    """Return what the largest magnitude of a state is at most after it is stored under a tensor scale of 1; float32."""
    if precision.is_fp4:
        return round_up(largest / E2M1_MAX, SCALE_DTYPE) * E2M1_MAX
    rounded = round_up if precision.stochastic_rounding else round_to_nearest
    return rounded(largest, precision.dtype).to(torch.float32)


def state_bytes(optimizer: Optimizer) -> int:
    """Return the memory that an optimizer's states take, in bytes: all tensors, scales included, but the step counts.

    Of sharded states it counts what this process holds; of tensor subclasses such as torchao's what they are made of.

    Args:
        optimizer: any torch optimizer; states exist from its first step on.

    Example:
        >>> x = torch.nn.Parameter(torch.ones(1024))
        >>> optimizer = torch.optim.AdamW([x])
        >>> x.grad = torch.ones(1024)
        >>> optimizer.step()
        >>> state_bytes(optimizer)
        8192
    """
    return sum(
        _bytes(value)
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, Tensor) and name != "step"
    )


def _bytes(value: Tensor) -> int:
    value = local(value)
    if is_traceable_wrapper_subclass(value):
        names, _ = value.__tensor_flatten__()
        return sum(_bytes(getattr(value, name)) for name in names)
    return value.numel() * value.element_size()


def _block_amax(value: Tensor, precision: StatePrecision) -> Tensor:
    if precision.scaling == "tensor":
        return value.abs().amax()
    return _blocks(value, precision.block_size).abs().amax(dim=1)


def _by_block(function: Any, value: Tensor, scale: Tensor, precision: StatePrecision) -> Tensor:
    """Combine each value with its block's scale; keeps shape and memory format."""
    if precision.scaling == "tensor":
        return function(value, scale)
    combined = function(_blocks(value, precision.block_size), scale.unsqueeze(1))
    return torch.empty_like(value).copy_(combined.view(-1)[: value.numel()].view(value.shape))


def _blocks(value: Tensor, block_size: int) -> Tensor:
    """View or copy as rows of ``block_size`` in row-major order, the last one padded with zeros."""
    flat = value.reshape(-1)
    missing = -flat.numel() % block_size
    return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, block_size)
