"""How close to stationary a point is: measures for non-smooth functions and for sign methods, as torchmetrics."""

from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

# One vector, or what makes one up: the gradients of all parameters, say.
Vector: TypeAlias = Tensor | Iterable[Tensor]


def generalized_stationarity(points: Tensor, gradients: Tensor, delta: float) -> Tensor:
    r"""Return :math:`\|\bar g\|_1 + \delta \cdot \frac1n \sum_i \|y_i - \bar y\|_\infty^2` of n points.

    An upper bound of the generalised stationarity :math:`\|\nabla f(\bar y)\|^{[\delta]}_{1,\infty}`, the infimum of
    :math:`\|E \nabla f(y)\|_1 + \delta E \|y - \bar y\|_\infty^2` over random y of mean :math:`\bar y`.

    Args:
        points: :math:`y_i`, shape ``[n, d]``.
        gradients: :math:`\nabla f(y_i)`, shape ``[n, d]``.
        delta: weight of the spread, >= 0.

    Returns:
        A 0-dimensional tensor.

    Raises:
        ValueError: the shapes differ or are not ``[n, d]`` with n >= 1; ``delta`` is negative or not finite.

    Example:
        >>> points = torch.tensor([[1.0], [-1.0]])  # |x| on both sides of its kink
        >>> generalized_stationarity(points, points.sign(), delta=0.1)
        tensor(0.1000)

    Source:
        arXiv 2604.15416, Definitions 2 and 3.
    """
    if points.dim() != 2 or points.shape != gradients.shape or len(points) == 0:
        raise ValueError(
            f"points of shape {list(points.shape)} and gradients of shape {list(gradients.shape)} must both be [n, d], "
            "n at least 1"
        )
    _check_delta(delta)
    spread = (points - points.mean(dim=0)).abs().amax(dim=1).square().mean()
    return gradients.mean(dim=0).abs().sum() + delta * spread


class GeneralizedStationarity(Metric):
    r"""Generalised stationarity of the mean of the iterates since the last reset.

    .. math::
        \|\bar g\|_1 + \delta \cdot \frac1n \sum_i \|y_i - \bar y\|_\infty^2

    of the iterates :math:`y_i` and the gradients :math:`g_i` at them: small where gradients cancel over a small
    neighbourhood, as around the minimum of :math:`|x|`, at which no gradient is small. What
    :class:`~lightning_stosign.optim.OnlineToNonconvex` makes small; reset it when a window of N steps begins. Gradients
    of mini-batches add their noise: about the mean of :math:`|g - E g|` over :math:`\sqrt n`, for each coordinate.

    Keeps all points and gradients since the reset (2 n d values). Over processes the points of all are put together;
    data-parallel replicas have the same ones.

    Args:
        delta: weight of the spread :math:`\delta`, >= 0.
        kwargs: torchmetrics' own options.

    Raises:
        ValueError: ``delta`` is negative or not finite.

    Example:
        >>> metric = GeneralizedStationarity(delta=0.1)
        >>> for y in (1.0, -1.0):
        ...     x = torch.tensor([y], requires_grad=True)
        ...     x.abs().sum().backward()
        ...     metric.update(x, x.grad)
        >>> metric.compute()
        tensor(0.1000)

    Source:
        arXiv 2604.15416, Definitions 2 and 3.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    points: list[Tensor]
    gradients: list[Tensor]

    def __init__(self, delta: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_delta(delta)
        self.delta = delta
        self.add_state("points", default=[], dist_reduce_fx="cat")
        self.add_state("gradients", default=[], dist_reduce_fx="cat")

    def update(self, point: Vector, gradient: Vector) -> None:
        """Add an iterate and the gradient at it.

        Args:
            point: one tensor, or the parameters: copied, in at least float32.
            gradient: likewise, of as many values.

        Raises:
            ValueError: they do not have as many values as each other, or as the points before.
        """
        y, g = _flatten(point), _flatten(gradient)
        expected = self.points[0].numel() if self.points else y.numel()
        if not y.numel() == g.numel() == expected:
            raise ValueError(
                f"point of {y.numel()} values and gradient of {g.numel()} values must both have {expected} values"
            )
        self.points.append(y.unsqueeze(0))
        self.gradients.append(g.unsqueeze(0))

    def compute(self) -> Tensor:
        """Return the measure, a 0-dimensional tensor; NaN before the first update."""
        if len(self.points) == 0:
            return torch.tensor(float("nan"), device=self.device)
        return generalized_stationarity(dim_zero_cat(self.points), dim_zero_cat(self.gradients), self.delta)


class L1Stationarity(Metric):
    r"""Mean of the gradients' :math:`\ell_1` norms, :math:`\frac1T \sum_t \|\nabla f(x_t)\|_1`.

    The measure in which sign methods are analysed: a step of size :math:`\gamma` along the sign decreases a smooth
    function by about :math:`\gamma \|\nabla f\|_1`.

    Args:
        kwargs: torchmetrics' own options.

    Example:
        >>> metric = L1Stationarity()
        >>> metric.update(torch.tensor([3.0, -1.0]))
        >>> metric.update([torch.tensor([1.0]), torch.tensor([[-1.0]])])
        >>> metric.compute()
        tensor(3.)

    Source:
        arXiv 2605.06615; arXiv 2506.03725.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", default=torch.tensor(0.0, dtype=torch.float32, device="cpu"), dist_reduce_fx="sum")
        self.add_state("count", default=torch.tensor(0, device="cpu"), dist_reduce_fx="sum")

    def update(self, gradient: Vector) -> None:
        """Add a gradient: one tensor, or those of all parameters (which are taken as one vector)."""
        for part in _parts(gradient):
            self.total += _full(torch.linalg.vector_norm(_in_float32(part.detach()), 1)).to(self.total)
        self.count += 1

    def compute(self) -> Tensor:
        """Return the mean, a 0-dimensional tensor; NaN before the first update."""
        return self.total / self.count


def _check_delta(delta: float) -> None:
    if not 0 <= delta < float("inf"):
        raise ValueError(f"delta={delta} must be finite and at least 0")


def _parts(vector: Vector) -> list[Tensor]:
    return [vector] if isinstance(vector, Tensor) else list(vector)


def _flatten(vector: Vector) -> Tensor:
    """Return all values in one new tensor of shape ``[d]``."""
    return torch.cat([_in_float32(_full(part.detach())).reshape(-1) for part in _parts(vector)])


def _full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _in_float32(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
