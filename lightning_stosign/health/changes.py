"""The next change of a state: what the optimizer's own formula adds to it if the next gradient is like the last."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def nominal_change(
    name: str, value: Tensor, group: Mapping[str, Any], grad: Tensor | None = None, *, decay: float | None = None
) -> Tensor | None:
    """Return what the next step adds to a state if its gradient is like the last one.

    Args:
        name: the state's name in ``optimizer.state``: averages of the gradient (``exp_avg``, ``momentum_buffer``), of
            its square (``exp_avg_sq``, ``square_avg``), and sums and maxima of it (``sum``, ``exp_inf``) are known.
        value: the state, float32.
        group: the param group, whose options give the average's decay.
        grad: the last gradient, same shape. None (a checkpoint has none): the gradient is 0, so that averages decay.
        decay: the decay where the optimizer uses an option of another name for it.

    Returns:
        The change, same shape, or None for a state of another name.

    Example:
        >>> import torch
        >>> nominal_change("exp_avg_sq", torch.tensor([2.0]), {"betas": (0.9, 0.75)}, torch.tensor([1.0]))
        tensor([-0.2500])
    """
    if decay is None:
        decay = decay_of(name, group)
    if decay is None or name not in _NEXT:
        return None
    _, change = _NEXT[name]
    if grad is None:
        grad = value.new_zeros(())
    elif group.get("maximize", False):
        grad = -grad
    return change(value, grad.to(value.dtype), decay, group)


def decay_of(name: str, group: Mapping[str, Any]) -> float | None:
    """Return the decay of a state's average by its usual option; None where :func:`nominal_change` knows no such state.

    Args:
        name: the state's name in ``optimizer.state``.
        group: the param group.
    """
    return _NEXT[name][0](group) if name in _NEXT else None


def is_known(name: str) -> bool:
    """Whether :func:`nominal_change` knows a state of this name."""
    return name in _NEXT


def _beta(index: int) -> Callable[[Mapping[str, Any]], float | None]:
    def read(group: Mapping[str, Any]) -> float | None:
        betas = group.get("betas")
        return None if betas is None else float(betas[index])

    return read


def _first_beta(group: Mapping[str, Any]) -> float | None:
    return float(group["momentum"]) if "momentum" in group else _beta(0)(group)


def _option(*names: str) -> Callable[[Mapping[str, Any]], float | None]:
    def read(group: Mapping[str, Any]) -> float | None:
        return next((float(group[name]) for name in names if name in group), None)

    return read


def _average(value: Tensor, grad: Tensor, decay: float, group: Mapping[str, Any]) -> Tensor:
    return (grad - value) * (1 - decay)


def _average_of_squares(value: Tensor, grad: Tensor, decay: float, group: Mapping[str, Any]) -> Tensor:
    return (grad.square() - value) * (1 - decay)


def _momentum(value: Tensor, grad: Tensor, decay: float, group: Mapping[str, Any]) -> Tensor:
    if "dampening" not in group:  # Muon's momentum is an average
        return _average(value, grad, decay, group)
    return grad * (1 - group["dampening"]) - value * (1 - decay)


def _sum_of_squares(value: Tensor, grad: Tensor, decay: float, group: Mapping[str, Any]) -> Tensor:
    return grad.square().expand_as(value)


def _maximum(value: Tensor, grad: Tensor, decay: float, group: Mapping[str, Any]) -> Tensor:
    # StoSignSGD's envelope is of the momentum, which is at most the largest gradient.
    return (value * decay).maximum(grad.abs()) - value


_Change = Callable[[Tensor, Tensor, float, Mapping[str, Any]], Tensor]
_NEXT: dict[str, tuple[Callable[[Mapping[str, Any]], float | None], _Change]] = {
    "exp_avg": (_first_beta, _average),
    "exp_avg_sq": (_beta(1), _average_of_squares),
    "exp_inf": (_beta(1), _maximum),
    "momentum_buffer": (_option("momentum"), _momentum),
    "square_avg": (_option("alpha", "rho"), _average_of_squares),
    "sum": (lambda group: 1.0, _sum_of_squares),
}
