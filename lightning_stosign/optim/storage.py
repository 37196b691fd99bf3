"""Storing optimizer states: rounding to low precision, with or without a scale, and back."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stosign.optim.noise import uniform_fraction
from lightning_stosign.optim.state_precision import StatePrecision

SCALE_SUFFIX = "_scale"

_INTEGER_VIEW = {1: torch.uint8, 2: torch.int16}


def quantize(
    value: Tensor,
    precision: StatePrecision,
    *,
    rounding: Literal["nearest", "up"] = "nearest",
    key: int | None = None,
    static_scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Round a state to its storage format.

    Values beyond the format's range become its largest value; NaN stays NaN.

    Args:
        value: float32 or float64, any shape.
        precision: the storage format.
        rounding: ``"nearest"`` (ties to even), or ``"up"``: never below ``value``, which must not be negative.
        key: with ``precision.stochastic_rounding``, the noise key for rounding at random instead of to the nearest.
        static_scale: factor applied before rounding under ``scaling="none"``.

    Returns:
        The stored tensor (``precision.dtype``, shape and memory format of ``value``) and its float32 scale: None
        under ``scaling="none"``, shape ``[]`` under ``"tensor"``, ``[ceil(numel / block_size)]`` under ``"block"``.
    """
    scale = None
    scaled = value.float() * static_scale if static_scale != 1.0 else value.float()
    if precision.scaling != "none":
        scale = power_of_two_scale(_block_amax(scaled, precision), torch.finfo(precision.dtype).max)
        scaled = _by_block(torch.div, scaled, scale, precision)
    if rounding == "up":
        return _round_up(scaled, precision.dtype), scale
    if key is not None and precision.stochastic_rounding:
        return round_stochastically(scaled, precision.dtype, key), scale
    return round_to_nearest(scaled, precision.dtype), scale


def dequantize(stored: Tensor, scale: Tensor | None, precision: StatePrecision, *, static_scale: float = 1.0) -> Tensor:
    """Return the float32 values of what :func:`quantize` stored: a new tensor of the same shape."""
    value = stored.to(torch.float32, copy=True)
    if scale is not None:
        return _by_block(torch.mul, value, scale, precision)
    return value.div_(static_scale) if static_scale != 1.0 else value


def read_state(state: dict[str, Any], name: str, precision: StatePrecision) -> Tensor:
    """Return the values of ``state[name]`` in float32; the state tensor itself if it is float32 or float64."""
    stored = state[name]
    if stored.dtype in (torch.float32, torch.float64):
        return stored
    return dequantize(stored, state.get(name + SCALE_SUFFIX), precision, static_scale=precision.static_scale)


def write_state(
    state: dict[str, Any],
    name: str,
    value: Tensor,
    precision: StatePrecision,
    *,
    rounding: Literal["nearest", "up"] = "nearest",
    key: int | None = None,
) -> Tensor:
    """Store ``value`` as ``state[name]`` in place and return the values as stored, in float32.

    Arguments as in :func:`quantize`. Returns ``value`` itself, unrounded, if the state is float32 or float64.
    """
    stored = state[name]
    if stored.dtype in (torch.float32, torch.float64):
        return value if value is stored else stored.copy_(value)
    rounded, scale = quantize(value, precision, rounding=rounding, key=key, static_scale=precision.static_scale)
    stored.copy_(rounded)
    if scale is not None:
        state[name + SCALE_SUFFIX].copy_(scale)
    return dequantize(stored, scale, precision, static_scale=precision.static_scale)


def init_state(state: dict[str, Any], name: str, param: Tensor, precision: StatePrecision | None) -> None:
    """Create a zero state for ``param``; without a precision in float32, or float64 for a float64 parameter."""
    dtype = torch.promote_types(param.dtype, torch.float32) if precision is None else precision.dtype
    state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    if precision is not None and precision.scaling != "none":
        shape = () if precision.scaling == "tensor" else (-(-param.numel() // precision.block_size),)
        state[name + SCALE_SUFFIX] = torch.ones(shape, dtype=torch.float32, device=param.device)


def state_bytes(optimizer: Optimizer) -> int:
    """Return the memory that an optimizer's states take, in bytes: all tensors, scales included, but the step counts.

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
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, Tensor) and name != "step"
    )


def power_of_two_scale(amax: Tensor, largest: float) -> Tensor:
    """Return the smallest power of two ``s`` with ``amax / s <= largest``, at least 2**-126; 1 where ``amax`` is 0."""
    mantissa, exponent = torch.frexp(amax / largest)
    # frexp's mantissa lies in [0.5, 1): amax / largest = 2**(exponent - 1) exactly where it is 0.5.
    return _power_of_two(exponent - (mantissa == 0.5).to(exponent.dtype))


def round_to_nearest(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to ``dtype``, ties to even, saturating: what lies beyond the range becomes the largest value."""
    # The clamp is for CUDA, where an FP8 cast beyond the range gives NaN or inf, and for float16.
    largest = torch.finfo(dtype).max
    return value.clamp(-largest, largest).to(dtype)


def round_stochastically(value: Tensor, dtype: torch.dtype, key: int) -> Tensor:
    """Round float32 values to one of the two neighbours in ``dtype``, without bias; saturating as above.

    The neighbour is chosen by the noise of ``key``, by each element's row-major index. Values below the smallest
    subnormal number are rounded to 0 or to it, so a small update is kept on average.
    """
    info = torch.finfo(dtype)
    magnitude = value.abs().clamp_(max=info.max)
    # The spacing of dtype's numbers at this magnitude, constant below the smallest normal number.
    exponent = torch.frexp(magnitude.clamp(min=info.smallest_normal)).exponent - 1
    spacing = _power_of_two(exponent).mul_(info.eps)
    units = magnitude.div_(spacing)
    lower = units.floor()
    fraction = uniform_fraction(key, value.numel(), device=value.device).view(value.shape)
    rounded = lower.add_(fraction < units.sub_(lower)).mul_(spacing).clamp_(max=info.max)
    return rounded.copysign_(value).to(dtype)


def _round_up(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round values >= 0 to the smallest number of ``dtype`` that is not below them, or to the largest of all."""
    value = value.clamp(max=torch.finfo(dtype).max)
    nearest = value.to(dtype)
    below = nearest.to(value.dtype) < value
    # The bit patterns of non-negative floating-point numbers are ordered as the numbers are.
    bits = nearest.view(_INTEGER_VIEW[nearest.element_size()])
    return bits.add_(below).view(dtype)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return 2**exponent in float32, exactly (torch.ldexp goes through pow), for exponents clamped to [-126, 127]."""
    return exponent.to(torch.int32).clamp(-126, 127).add_(127).bitwise_left_shift_(23).view(torch.float32)


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
