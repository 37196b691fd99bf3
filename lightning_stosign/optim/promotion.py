"""Moving one parameter's states to wider storage in the middle of a run."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_stosign.optim.emulation import emulated_precision, is_moment
from lightning_stosign.optim.low_precision import LowPrecisionOptimizer
from lightning_stosign.optim.states.conversion import store_anew
from lightning_stosign.optim.states.state_precision import FLOAT32, OVERRIDE, StatePrecision, override_of, precision_of
from lightning_stosign.optim.states.storage import SCALE_SUFFIX, is_packed


def next_wider(precision: StatePrecision) -> StatePrecision | None:
    """Return the next wider storage: fp8-raw, fp8, fp8-block, bfloat16, float32; after it None.

    fp4-block goes to fp8-block, each FP8 dtype climbs through its own scalings, and float16 goes straight to float32,
    since bfloat16 has fewer digits.

    Example:
        >>> str(next_wider(StatePrecision.parse("fp8")))
        'fp8-block'
    """
    if precision.dtype is torch.float32:
        return None
    if precision.is_fp4:
        return StatePrecision(
            torch.float8_e4m3fn,
            "block",
            stochastic_rounding=precision.stochastic_rounding,
            min_numel=precision.min_numel,
        )
    if not precision.is_fp8:
        return replace(FLOAT32, min_numel=precision.min_numel)
    if precision.scaling == "none":
        return replace(precision, scaling="tensor", static_scale=1.0)
    if precision.scaling == "tensor":
        return replace(precision, scaling="block")
    return StatePrecision(
        torch.bfloat16, stochastic_rounding=precision.stochastic_rounding, min_numel=precision.min_numel
    )


def state_precision_of(optimizer: Optimizer, param: Tensor) -> StatePrecision | None:
    """Return the precision that a parameter's states are stored, or emulated, in.

    Args:
        optimizer: any torch optimizer.
        param: one of its parameters.

    Returns:
        The precision, float32 for a parameter with less than ``min_numel`` values; None where the optimizer keeps its
        states in a way of its own.

    Raises:
        ValueError: ``param`` is not one of the optimizer's.
    """
    group = _group_of(optimizer, param)
    state = optimizer.state.get(param, {})
    if isinstance(optimizer, LowPrecisionOptimizer):
        precision = precision_of(state, group)
    else:
        precision = emulated_precision(optimizer)
        precision = None if precision is None else precision_of(state, {}) or precision
    return FLOAT32 if precision is not None and not precision.applies_to(param) else precision


def promote_state(optimizer: Optimizer, param: Tensor) -> StatePrecision:
    """Move one parameter's states to the next wider storage (:func:`next_wider`) and return it.

    Values stay as they are, but that fp8-block rounds those of fp4-block, whose block scales have digits too.
    What has been rounded to zero stays zero until the next steps fill it. The new precision becomes part of the
    parameter's state, where it goes before the param group's: a state_dict keeps it, and a loaded one brings it back.
    torch.distributed.checkpoint fills in what an optimizer has: promote the same parameters before it loads into one.
    Every rank has to call this of a sharded parameter; its states skip fp8-block, whose blocks the shards would cut.

    Args:
        optimizer: :class:`StoSignSGD`, :class:`SignSGD`, :class:`MuonSign`, or an optimizer under
            :func:`emulate_state_precision`.
        param: one of its parameters, after its first step.

    Raises:
        ValueError: the optimizer does not have the parameter, or no state of it yet; its states are in float32 already
            or stored by the optimizer in a way of its own.

    Example:
        >>> from lightning_stosign import emulate_state_precision
        >>> x = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.AdamW([x])
        >>> handle = emulate_state_precision(optimizer, "fp8:min_numel=2")
        >>> x.grad = torch.ones(2)
        >>> optimizer.step()
        >>> str(promote_state(optimizer, x))
        'fp8-block:min_numel=2'
    """
    old = state_precision_of(optimizer, param)
    if old is None:
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} has no state_precision to promote; accepted: this package's "
            "optimizers with state_precision=..., or any under emulate_state_precision"
        )
    new = next_wider(old)
    if new is not None and new.scaling == "block" and isinstance(optimizer, LowPrecisionOptimizer) and _is_cut(param):
        new = next_wider(new)
    if new is None:
        raise ValueError(f"a parameter of shape {list(param.shape)} has its states in {old}: there is nothing wider")
    state = optimizer.state.get(param, {})
    if not state:
        raise ValueError(f"a parameter of shape {list(param.shape)} has no state yet: it has had no step")
    if isinstance(optimizer, LowPrecisionOptimizer):
        for name in [n for n, v in state.items() if is_moment(n, v, param) or is_packed(state, n)]:
            if not name.endswith(SCALE_SUFFIX):
                store_anew(state, name, param, old, new)
    state[OVERRIDE] = override_of(new)
    return new


def _is_cut(param: Tensor) -> bool:
    """Return whether a parameter is sharded, so that its blocks would be too."""
    return isinstance(param, DTensor) and not all(placement.is_replicate() for placement in param.placements)


def _group_of(optimizer: Optimizer, wanted: Tensor) -> dict[str, Any]:
    for group in optimizer.param_groups:
        if any(param is wanted for param in group["params"]):
            return group
    raise ValueError(
        f"param: a parameter of shape {list(wanted.shape)} is none of this {type(optimizer).__name__}'s parameters"
    )
