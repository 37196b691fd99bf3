"""Forecasts: what a storage format would do to a state's values, while they are still in float32."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lightning_stosign.health.statistics import count
from lightning_stosign.optim.emulation import as_stored
from lightning_stosign.optim.fp4 import round_fp4_block
from lightning_stosign.optim.state_precision import StatePrecision

Format = StatePrecision | str

FP4_BLOCK = "fp4-block"


class Share(NamedTuple):
    """Some out of many: 0-dimensional tensors that add up over layers.

    Attributes:
        part: how many.
        whole: out of how many.
    """

    part: Tensor
    whole: Tensor

    @property
    def fraction(self) -> Tensor:
        """``part / whole``; 0 of 0 is 0."""
        return self.part / self.whole.clamp(min=1)


def check_format(format: Format) -> None:
    """Raise ValueError or TypeError unless ``format`` is one that can be forecast.

    Args:
        format: a :class:`StatePrecision` or its name, e.g. ``"fp8"``, ``"fp8-raw:dtype=float8_e5m2"``,
            ``"fp8-block"``, ``"bfloat16"``; or ``"fp4-block"``: four bits in blocks of 16, NVFP4's way.
    """
    if format == FP4_BLOCK:
        return
    try:
        precision = StatePrecision.parse(format)
    except ValueError as error:
        raise ValueError(f"{error}; a forecast also takes {FP4_BLOCK!r}") from error
    if precision.stochastic_rounding:
        raise ValueError(f"{format!r}: stochastic rounding is not forecast; accepted: rounding to nearest")


def stored_values(value: Tensor, format: Format, degree: int = 1) -> Tensor:
    """Return what would be read back of values stored in a format, rounded to nearest.

    Args:
        value: float32, any shape, not empty.
        format: as in :func:`check_format`.
        degree: the power of the gradient's scale that the state is proportional to
            (:func:`lightning_stosign.optim.emulation.state_degree`), for a format with a static scale.

    Returns:
        float32, same shape.

    Example:
        >>> import torch
        >>> stored_values(torch.tensor([1.0, 0.3, 1e-4]), "fp8-raw")
        tensor([1.0000, 0.3125, 0.0000])
    """
    if format == FP4_BLOCK:
        return round_fp4_block(value)
    return as_stored(value, StatePrecision.parse(format), degree)


def underflow_fraction(value: Tensor, format: Format, degree: int = 1) -> Share:
    """Count the nonzero values that a format would store as 0, out of all nonzero values.

    Arguments as in :func:`stored_values`.

    Example:
        >>> import torch
        >>> underflow_fraction(torch.tensor([0.0, 1.0, 1e-4]), "fp8-raw").fraction
        tensor(0.5000, dtype=torch.float64)
    """
    nonzero = value != 0
    return Share(count(nonzero & (stored_values(value, format, degree) == 0)), count(nonzero))


def stalled_fraction(value: Tensor, change: Tensor, format: Format, degree: int = 1) -> Share:
    """Count the values whose next change a format would lose, out of all values that should change.

    A value stalls where the stored value plus the change rounds back to the stored value: the signal is swamped.

    Args:
        value: float32, any shape, not empty.
        change: what the next step adds, same shape, e.g. :func:`nominal_change`.
        format: as in :func:`check_format`.
        degree: as in :func:`stored_values`.

    Example:
        >>> import torch
        >>> value = torch.tensor([1.0, 1.0, 1.0])
        >>> stalled_fraction(value, torch.tensor([0.01, 0.1, 0.0]), "fp8-raw").fraction  # E4M3 has 1 and 1.125
        tensor(0.5000, dtype=torch.float64)

    Source:
        arXiv 2603.16731, arXiv 2505.00347.
    """
    stored = stored_values(value, format, degree)
    changes = change != 0
    return Share(count(changes & (stored_values(stored + change, format, degree) == stored)), count(changes))


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
    if name not in _NEXT:
        return None
    read_decay, change = _NEXT[name]
    if decay is None:
        decay = read_decay(group)
    if decay is None:
        return None
    if grad is None:
        grad = value.new_zeros(())
    elif group.get("maximize", False):
        grad = -grad
    return change(value, grad.to(value.dtype), decay, group)


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
