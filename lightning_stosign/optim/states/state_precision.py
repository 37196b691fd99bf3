"""How an optimizer state is stored: dtype, scaling and rounding, as a value with a name."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_stosign._plain import make_fields_plain
from lightning_stosign._user_code import warn_user

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
# The name of the format; before torch 2.8, which has none, what holds it everywhere: bytes.
FP4_DTYPE: torch.dtype = getattr(torch, "float4_e2m1fn_x2", torch.uint8)
_DTYPES = {
    str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, *FP8_DTYPES, FP4_DTYPE)
}


@dataclass(frozen=True)
class StatePrecision:
    """The storage format of optimizer states.

    A state is stored as ``value / scale`` rounded to ``dtype``. Scales are powers of two (as in the OCP microscaling
    formats), so that scaling and unscaling are exact and storing an unchanged state again changes nothing.

    In four bits (E2M1, NVFP4's way: :mod:`lightning_stosign.optim.numerics.fp4`) two values share a byte of a uint8 tensor, and
    the blocks' scales, rounded up to E4M3, a power of two a tensor: with 16 values a block 4.5 bits a value.

    Args:
        dtype: ``torch.float32``, ``bfloat16``, ``float16``, ``float8_e4m3fn``, ``float8_e5m2`` or (torch >= 2.8, with
            ``scaling="block"``) ``float4_e2m1fn_x2``, or the name of one.
        scaling: ``"none"``; ``"tensor"``: one float32 scale a tensor, the smallest power of two that brings the
            tensor's largest magnitude into the format's range; ``"block"``: the same for each ``block_size``
            consecutive values in row-major order. Scaling needs a dtype of limited range (float16, FP8 or FP4).
        block_size: values that share a scale under ``scaling="block"``; an even number in four bits.
        stochastic_rounding: round the momentum up or down at random, without bias, instead of to the nearest value.
            The envelope ``exp_inf`` is rounded up in any case; what a decay has left of it, at random.
        static_scale: with ``scaling="none"`` and a dtype of limited range, a fixed factor ``s``, a power of two: states
            linear in the gradient are stored times ``s``, second moments times ``s * s``: what a loss scale would do.
        min_numel: states of parameters with fewer values (norms, biases) stay in float32, as torchao's and
            bitsandbytes' low-bit optimizers keep them: they take next to no memory and matter much.

    Raises:
        TypeError: an argument is not of the type above.
        ValueError: an argument is out of range, or would have no effect.

    Example:
        >>> StatePrecision.parse("fp8")
        StatePrecision(dtype=torch.float8_e4m3fn, scaling='tensor', block_size=128, stochastic_rounding=False, static_scale=1.0, min_numel=4096)
        >>> str(StatePrecision(torch.float8_e4m3fn, static_scale=1024.0))
        'fp8-raw:static_scale=1024.0'
    """  # noqa: E501

    dtype: torch.dtype
    scaling: Literal["none", "tensor", "block"] = "none"
    block_size: int = 128
    stochastic_rounding: bool = False
    static_scale: float = 1.0
    min_numel: int = 4096

    def __post_init__(self) -> None:
        make_fields_plain(self)
        if isinstance(self.dtype, str) and self.dtype in _DTYPES:
            object.__setattr__(self, "dtype", _DTYPES[self.dtype])
        if self.dtype not in _DTYPES.values():
            raise ValueError(f"dtype={self.dtype!r} is not supported for optimizer states; accepted: {list(_DTYPES)}")
        if self.scaling not in ("none", "tensor", "block"):
            raise ValueError(f"scaling={self.scaling!r} is unknown; accepted: 'none', 'tensor', 'block'")
        for name, lowest in (("block_size", 1), ("min_numel", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r} must be an int")
            if value < lowest:
                raise ValueError(f"{name}={value} must be at least {lowest}")
        if not isinstance(self.stochastic_rounding, bool):
            raise TypeError(f"stochastic_rounding={self.stochastic_rounding!r} must be a bool")
        if isinstance(self.static_scale, bool) or not isinstance(self.static_scale, (int, float)):
            raise TypeError(f"static_scale={self.static_scale!r} must be a number")
        if not (math.isfinite(self.static_scale) and math.frexp(self.static_scale)[0] == 0.5):
            raise ValueError(f"static_scale={self.static_scale} must be a power of two, such as 1024, to scale exactly")
        if not 2.0**-63 <= self.static_scale <= 2.0**63:
            raise ValueError(
                f"static_scale={self.static_scale} must be between 2**-63 and 2**63: its square is used too"
            )
        object.__setattr__(self, "static_scale", float(self.static_scale))
        if self.is_fp4 and (self.scaling != "block" or self.block_size % 2 != 0):
            raise ValueError(
                f"scaling={self.scaling!r}, block_size={self.block_size} with dtype={self.dtype}: four bits need "
                "scaling='block' and an even block_size, such as 16"
            )
        limited = self.dtype is torch.float16 or self.is_fp8 or self.is_fp4
        if self.scaling != "none" and not limited:
            raise ValueError(f"scaling={self.scaling!r} has no use with dtype={self.dtype}, which has float32's range")
        if self.static_scale != 1.0 and (self.scaling != "none" or not limited):
            raise ValueError(
                f"static_scale={self.static_scale} applies to scaling='none' with a dtype of limited range (float16, "
                f"float8_e4m3fn, float8_e5m2), not to scaling={self.scaling!r} with dtype={self.dtype}"
            )
        if self.stochastic_rounding and self.dtype is torch.float32:
            raise ValueError("stochastic_rounding=True has no use with dtype=torch.float32: states are computed in it")

    @property
    def is_fp8(self) -> bool:
        """Whether the dtype is one of the two FP8 formats."""
        return self.dtype in FP8_DTYPES

    @property
    def is_fp4(self) -> bool:
        """Whether states are stored in four bits."""
        return self.dtype is FP4_DTYPE

    @property
    def has_tensor_scale(self) -> bool:
        """Whether there is a scale that depends on all of a tensor's values."""
        return self.scaling == "tensor" or self.is_fp4

    def applies_to(self, param: Tensor) -> bool:
        """Return whether a parameter's states are stored so, and not in float32 for being small."""
        return param.numel() >= self.min_numel

    @classmethod
    def parse(cls, spec: "str | StatePrecision") -> "StatePrecision":
        """Return the precision with this name.

        Args:
            spec: ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"fp8"`` (E4M3, one scale a tensor), ``"fp8-raw"``
                (E4M3, no scale), ``"fp8-block"`` (E4M3, one scale a block) or ``"fp4-block"`` (E2M1, an E4M3 scale for
                each 16 values and one a tensor), optionally with fields set after a colon:
                ``"fp8-raw:static_scale=1024"``, ``"fp8:dtype=float8_e5m2,stochastic_rounding=true"``.
                A :class:`StatePrecision` is returned as it is.

        Raises:
            TypeError: ``spec`` is neither.
            ValueError: the name, a field or a field's value is unknown.
        """
        if isinstance(spec, StatePrecision):
            return spec
        if not isinstance(spec, str):
            raise TypeError(f"state_precision={spec!r} must be a name or a StatePrecision")
        return _parse(spec)

    def __str__(self) -> str:
        """Return the shortest name that :meth:`parse` turns back into this value."""
        if self.is_fp8:
            name = {"none": "fp8-raw", "tensor": "fp8", "block": "fp8-block"}[self.scaling]
        elif self.is_fp4:
            name = "fp4-block"
        else:
            name = str(self.dtype).removeprefix("torch.")
        preset = _PRESETS[name]
        changed = [f.name for f in fields(self) if getattr(self, f.name) != getattr(preset, f.name)]
        options = ",".join(f"{field}={str(getattr(self, field)).removeprefix('torch.')}" for field in changed)
        return f"{name}:{options}" if options else name


FLOAT32 = StatePrecision(torch.float32)

OVERRIDE = "state_precision"
"""The entry of a parameter's state that holds its own precision, as :func:`override_of` gives it."""


def override_of(precision: StatePrecision) -> int:
    """Return a precision's name as one number, of its characters' bytes.

    Text would not survive torch's ``load_state_dict``; neither text nor bytes are taken by
    ``flatten_optimizer_state_dict`` of torch.distributed.checkpoint, and a tensor would look like a state.
    """
    return int.from_bytes(str(precision).encode(), "big")


def precision_of(state: Mapping[str, Any], group: Mapping[str, Any]) -> StatePrecision | None:
    """Return how one parameter's states are stored: as the parameter's own state says, else as its group does.

    Args:
        state: the parameter's entry in ``optimizer.state``.
        group: its param group.

    Returns:
        The precision; None where neither says, so states are stored as the step computes them.
    """
    override = state.get(OVERRIDE)
    if isinstance(override, int):
        override = override.to_bytes((override.bit_length() + 7) // 8, "big")
    spec = group.get("state_precision") if override is None else override.decode()  # bytes in older checkpoints
    return None if spec is None else StatePrecision.parse(spec)


def warn_if_too_small(optimizer: str, precision: StatePrecision, params: Sequence[Tensor]) -> None:
    """Warn where no parameter is large enough for a precision, which then has no effect.

    Args:
        optimizer: the optimizer's name.
        precision: how it is asked to store its states.
        params: its parameters.
    """
    largest = max((param.numel() for param in params), default=0)
    if largest > 0 and precision != FLOAT32 and not any(precision.applies_to(param) for param in params):
        warn_user(
            f"{optimizer}: state_precision={str(precision)!r} has no effect: the largest of {len(params)} parameters "
            f"has {largest} values, fewer than min_numel={precision.min_numel}. To store their states so all the same, "
            f"add min_numel=0 to it.",
            UserWarning,
        )


_PRESETS = {
    "float32": FLOAT32,
    "bfloat16": StatePrecision(torch.bfloat16),
    "float16": StatePrecision(torch.float16),
    "fp8": StatePrecision(torch.float8_e4m3fn, "tensor"),
    "fp8-raw": StatePrecision(torch.float8_e4m3fn),
    "fp8-block": StatePrecision(torch.float8_e4m3fn, "block"),
    "fp4-block": StatePrecision(FP4_DTYPE, "block", block_size=16),
}


@lru_cache(maxsize=256)
def _parse(spec: str) -> StatePrecision:
    name, _, options = spec.partition(":")
    if name not in _PRESETS:
        raise ValueError(f"state_precision={spec!r} is unknown; accepted: {', '.join(_PRESETS)}, or a StatePrecision")
    values: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        field, _, text = (part.strip() for part in option.partition("="))
        try:
            values[field] = _READ[field](text)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"state_precision={spec!r}: cannot read {option!r}; accepted after the colon: "
                f"{', '.join(f'{f}=...' for f in _READ)}, separated by commas"
            ) from error
    return replace(_PRESETS[name], **values)


_READ: dict[str, Any] = {
    "dtype": str,
    "scaling": str,
    "block_size": int,
    "min_numel": int,
    "stochastic_rounding": lambda text: {"true": True, "false": False}[text.lower()],
    "static_scale": float,
}
