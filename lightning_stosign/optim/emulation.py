"""What would this precision do to the states of an optimizer that cannot store them so?"""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_stosign.optim.low_precision import LowPrecisionOptimizer
from lightning_stosign.optim.states.state_precision import StatePrecision, precision_of
from lightning_stosign.optim.states.storage import round_trip

# How a state scales when all gradients are multiplied by s: by s ** degree; 1 where it is not listed.
_DEGREES = {
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "variance", "row_var", "col_var"), 2),
    **dict.fromkeys(("acc_delta", "step_size", "ax", "eta", "mu", "mu_product"), 0),
}

_COUNTERS = ("eta", "mu", "mu_product")


def state_degree(name: str) -> int:
    """Return the power of the gradient's scale that a state is proportional to.

    Example:
        >>> state_degree("exp_avg"), state_degree("exp_avg_sq"), state_degree("step_size")
        (1, 2, 0)
    """
    return _DEGREES.get(name, 1)


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
        ValueError: ``optimizer`` is one of this package's, or under an emulation already; ``precision`` is unknown or
            rounds stochastically.

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
    precision = StatePrecision.parse(precision)
    if precision.stochastic_rounding:
        raise ValueError("precision: stochastic_rounding=True is not emulated; accepted: rounding to nearest")

    return optimizer.register_step_post_hook(_Emulation(precision))


class _Emulation:
    """The hook after a step; an object, so that an emulated optimizer can be recognised by it."""

    def __init__(self, precision: StatePrecision) -> None:
        self.precision = precision

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for param, state in optimizer.state.items():
            precision = precision_of(state, {}) or self.precision
            if not precision.applies_to(param):
                continue
            for name, value in state.items():
                if is_moment(name, value, param) and value.numel() > 0:
                    _round(value, precision, state_degree(name))


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
    for hook in optimizer._optimizer_step_post_hooks.values():
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
