"""What would this precision do to the states of an optimizer that cannot store them so?"""

import re
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_stosign.optim.low_precision import LowPrecisionOptimizer
from lightning_stosign.optim.nested import optimizers_within
from lightning_stosign.optim.states.state_precision import StatePrecision, precision_of, warn_if_too_small
from lightning_stosign.optim.states.storage import round_trip

# How a state scales when all gradients are multiplied by s: by s ** degree. Second moments go by many names:
# exp_avg_sq, exp_avg_sq_row, square_avg, exp_avg_var, variance_ma, row_var ... Of the others, 1 where none is listed.
_SECOND_MOMENT = re.compile(r"(^|_)(sq|square|var|variance)(_|$)")
_COPIES_OF_PARAMETERS = ("slow_params", "z", "x0", "p0", "shadow", "backup_params", "prev_param")
_DEGREES = {
    "sum": 2,
    **dict.fromkeys(
        ("acc_delta", "step_size", "ax", "eta", "mu", "mu_product", "exp_avg_res_row", "exp_avg_res_col"), 0
    ),
    **dict.fromkeys(_COPIES_OF_PARAMETERS, 0),
}

_COUNTERS = ("eta", "mu", "mu_product")


def state_degree(name: str) -> int:
    """Return the power of the gradient's scale that a state is proportional to.

    Example:
        >>> [state_degree(name) for name in ("exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_var", "step_size")]
        [1, 2, 2, 2, 0]
    """
    return _DEGREES.get(name, 2 if _SECOND_MOMENT.search(name) else 1)


def is_moment(name: str, value: Any, param: Tensor) -> bool:
    """Return whether an entry of ``optimizer.state[param]`` is a state that has a value per coordinate or row."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or name == "step":
        return False
    # Of a 0-dimensional parameter the moments are 0-dimensional too, like the counters that every parameter has.
    return value.dim() > 0 or (param.dim() == 0 and name not in _COUNTERS)


def emulate_state_precision(optimizer: Optimizer, precision: StatePrecision | str) -> RemovableHandle:
    """Round an optimizer's states after each step to what they would be if they were stored in ``precision``.

    The optimizer keeps float32 tensors, so nothing is saved; what it reads at its next step is what a low-precision
    optimizer would read. As in the low-bit optimizers of torchao and Transformer Engine, the step itself uses the
    states just computed, before they are stored. Values beyond the range become the largest one.

    Args:
        optimizer: any ``torch.optim.Optimizer`` other than this package's, which store states themselves.
        precision: a :class:`StatePrecision` or its name, without stochastic rounding. States of parameters with less
            than its ``min_numel`` values stay as they are. With ``static_scale`` s, states
            linear in the gradient are rounded times s, second moments (``exp_avg_sq``, ``square_avg``, ``sum`` ...)
            times s * s, and states that do not scale with the gradient (``step_size`` ...) as they are.

    Returns:
        A handle; its ``remove()`` ends the emulation. Not part of the optimizer's state_dict: call this again after
        building the optimizer for a resumed run. What :func:`promote_state` has changed for a parameter is part of it.

    Raises:
        TypeError: ``optimizer`` is not a torch optimizer.
        ValueError: ``optimizer`` is one of this package's, under an emulation already, or keeps quantised states
            itself; ``precision`` is unknown or rounds stochastically.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = torch.optim.AdamW([x])
        >>> handle = emulate_state_precision(optimizer, "fp8-raw:min_numel=0")
        >>> x.grad = torch.tensor([1.0, 1e-1, 1e-2])
        >>> optimizer.step()
        >>> optimizer.state[x]["exp_avg_sq"]  # 0.001 * grad**2: below half of E4M3's smallest number, 2**-9
        tensor([0.0020, 0.0000, 0.0000])
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer={optimizer!r} must be a torch.optim.Optimizer")
    if isinstance(optimizer, LowPrecisionOptimizer):
        raise ValueError(f"optimizer: {type(optimizer).__name__} stores its states itself; pass it state_precision=...")
    if emulated_precision(optimizer) is not None:
        raise ValueError(
            f"optimizer: {type(optimizer).__name__}'s states are emulated in {emulated_precision(optimizer)} already; "
            "end that by its handle's remove() first"
        )
    for each in optimizers_within(optimizer):
        if reason := _quantised(each):
            raise ValueError(
                f"optimizer: {type(each).__name__} keeps quantised states itself ({reason}), which are no values to "
                "round; accepted: optimizers with floating-point states"
            )
    precision = StatePrecision.parse(precision)
    if precision.stochastic_rounding:
        raise ValueError("precision: stochastic_rounding=True is not emulated; accepted: rounding to nearest")

    params = [param for group in optimizer.param_groups for param in group["params"]]
    warn_if_too_small(type(optimizer).__name__, precision, params)
    return optimizer.register_step_post_hook(_Emulation(precision))


class _Emulation:
    """The hook after a step; an object, so that an emulated optimizer can be recognised by it."""

    def __init__(self, precision: StatePrecision) -> None:
        self.precision = precision

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        states = {id(state): (p, state) for each in optimizers_within(optimizer) for p, state in _states(each)}
        for param, state in states.values():
            precision = precision_of(state, {}) or self.precision
            if not precision.applies_to(param):
                continue
            for name, value in state.items():
                if is_moment(name, value, param) and value.numel() > 0:
                    _round(value, precision, state_degree(name))


def _states(optimizer: Optimizer) -> list[tuple[Tensor, dict[str, Any]]]:
    """Return the parameters with states, and these; of a shadow, which is empty between steps, its owner's count."""
    return [(p, s) for p, s in optimizer.state.items() if isinstance(p, Tensor) and isinstance(s, dict) and p.numel()]


_QUANTISED_CLASS = re.compile(r"8bit|4bit|fp8", re.IGNORECASE)


def _quantised(optimizer: Optimizer) -> str | None:
    """Return how it is known that an optimizer keeps codes or low-bit tensors, or None."""
    if _QUANTISED_CLASS.search(type(optimizer).__name__):
        return "by its name"
    if getattr(getattr(optimizer, "args", None), "optim_bits", 32) == 8:
        return "optim_bits=8"  # bitsandbytes
    dtypes = getattr(optimizer, "name_to_dtype_map", {})  # Transformer Engine's FusedAdam
    narrow = [name for name in ("exp_avg", "exp_avg_sq") if dtypes.get(name) in (torch.uint8, torch.float16)]
    if narrow:
        return f"{narrow[0]} in {dtypes[narrow[0]]}"
    for _, state in _states(optimizer):
        for name, value in state.items():
            if isinstance(value, Tensor) and (
                value.dtype == torch.uint8 or type(value).dequantize is not Tensor.dequantize
            ):
                return f"its state {name}"
    return None


def _round(value: Tensor, precision: StatePrecision, degree: int) -> None:
    """Round a state in place; one that is sharded (DTensor) as the whole would be, for which it is gathered."""
    if not isinstance(value, DTensor):
        value.copy_(as_stored(value, precision, degree))
        return
    rounded = as_stored(value.full_tensor(), precision, degree)
    value.copy_(distribute_tensor(rounded, value.device_mesh, value.placements, src_data_rank=None))


def emulated_precision(optimizer: Optimizer) -> StatePrecision | None:
    """Return the precision that an optimizer's states are emulated in, unless a parameter's own state says otherwise.

    Returns:
        The precision given to :func:`emulate_state_precision`; None for an optimizer that is not under it.
    """
    for each in optimizers_within(optimizer):
        for hook in each._optimizer_step_post_hooks.values():
            if isinstance(hook, _Emulation):
                return hook.precision
    return None


def as_stored(value: Tensor, precision: StatePrecision, degree: int = 1) -> Tensor:
    """Return what is left of a state's values after storing them, rounded to nearest; float32, same shape.

    Args:
        value: the state.
        precision: the storage format.
        degree: the state's :func:`state_degree`, for ``precision.static_scale``.
    """
    return round_trip(value, precision, static_scale=precision.static_scale**degree)
