"""Statistics of optimizer states as torchmetrics: accumulated over tensors, right under DDP and FSDP2.

A DTensor is taken as it is sharded: each rank looks at the values it holds, and ``update``, a collective then, adds
what the ranks have found, so that every rank has the exact value for the whole. A plain tensor is taken to be the same
on all ranks, as the states of data-parallel replicas are, and counts once; with ``replicated=False`` it is a part that
only this rank has.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp, all_reduce
from torch.distributed.tensor import DTensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_stosign.health.forecast import Format, check_format, forecast_rounds, run_rounds
from lightning_stosign.health.magnitudes import MAGNITUDE_BINS, histogram_of, log10_quantiles, magnitude_counts
from lightning_stosign.health.sharding import Layout, localize
from lightning_stosign.health.statistics import abs_max, coordinate_health, count, square_sum
from lightning_stosign.health.stored_states import in_float32
from lightning_stosign.optim.states.state_precision import StatePrecision

Gather = Callable[..., list[Tensor]]


def _count_replicas_once(gather: Gather, sums: Tensor, group: Any = None) -> list[Tensor]:
    """Gather [2, ...] from all ranks; of what is replicated only the first rank's is kept."""
    first, *others = gather(sums, group)
    return [first, *(torch.stack([torch.zeros_like(own), own]) for _, own in others)]


class _Sums(Metric):
    """Base: sums over values, those that all ranks have in row 0 and this rank's own in row 1.

    The state is a plain sum over batches and is named after what it sums: ``MetricCollection`` takes metrics of one
    state name for one compute group as soon as their first values agree.

    Args:
        what: what is summed; two metrics that update alike have the same.
        size: how many sums.
        replicated: whether plain tensors are the same on all ranks.
        kwargs: torchmetrics' own options.
    """

    is_differentiable = False
    higher_is_better: bool | None = False
    full_state_update = False

    def __init__(self, what: str, size: int, replicated: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(replicated, bool):
            raise TypeError(f"replicated={replicated!r} must be a bool")
        self.replicated = replicated
        self._state = f"{what}_{'replicated' if replicated else 'own'}"
        self.add_state(
            self._state, default=torch.zeros(2, size, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum"
        )

    def sync(self, dist_sync_fn: Gather | None = None, *args: Any, **kwargs: Any) -> None:
        """Add up over ranks, as torchmetrics does; what is replicated counts once.

        Args:
            dist_sync_fn: how to gather a tensor from all ranks; None: as the constructor was told.
            args: as of :meth:`torchmetrics.Metric.sync`.
            kwargs: as of :meth:`torchmetrics.Metric.sync`.
        """
        gather = dist_sync_fn or self.dist_sync_fn or gather_all_tensors
        super().sync(partial(_count_replicas_once, gather), *args, **kwargs)

    def _add(self, value: Tensor, layout: Layout, *sums: Tensor) -> None:
        """Add what was found in this rank's part of ``value``; of a DTensor what all its shards have together."""
        state = getattr(self, self._state)
        found = torch.stack([total.to(state).reshape(-1) for total in sums]).flatten()
        if layout.group is not None:
            all_reduce(found, ReduceOp.SUM, layout.group)
        state[0 if self.replicated or isinstance(value, DTensor) else 1] += found

    def _total(self) -> Tensor:
        return getattr(self, self._state).sum(dim=0)


class ZeroFraction(_Sums):
    r"""Share of entries equal to 0.

    .. math::
        \frac{\#\{i : x_i = 0\}}{\#\{i\}}

    Args:
        replicated: whether plain tensors are the same on all ranks; False: each rank has a part of its own.
        kwargs: torchmetrics' own options.

    Raises:
        TypeError: ``replicated`` is not a bool.

    Example:
        >>> metric = ZeroFraction()
        >>> metric.update(torch.tensor([0.0, 1.0]))
        >>> metric.update(torch.tensor([[2.0], [3.0]]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    def __init__(self, replicated: bool = True, **kwargs: Any) -> None:
        super().__init__("zeros", 2, replicated, **kwargs)

    def update(self, value: Tensor) -> None:
        """Add a state: floating point, any shape."""
        local, layout = _local(value)
        size = local.new_tensor(local.numel(), dtype=torch.float64)
        self._add(value, layout, size - count(local), size)

    def compute(self) -> Tensor:
        """Return the share, a 0-dimensional tensor; NaN of no values."""
        zeros, size = self._total()
        return zeros / size


class RootMeanSquare(_Sums):
    r"""Root mean square of all entries.

    .. math::
        \sqrt{\frac1n \sum_i x_i^2}

    The sum is float64: squares of second moments below 1e-19 would underflow in float32.

    Args:
        replicated: as of :class:`ZeroFraction`.
        kwargs: torchmetrics' own options.

    Raises:
        TypeError: ``replicated`` is not a bool.

    Example:
        >>> metric = RootMeanSquare()
        >>> metric.update(torch.tensor([3.0, 4.0]))
        >>> metric.update(torch.tensor([0.0, 0.0]))
        >>> metric.compute()
        tensor(2.5000, dtype=torch.float64)
    """

    def __init__(self, replicated: bool = True, **kwargs: Any) -> None:
        super().__init__("squares", 2, replicated, **kwargs)

    def update(self, value: Tensor) -> None:
        """Add a state: floating point, any shape."""
        local, layout = _local(value)
        self._add(value, layout, square_sum(local), local.new_tensor(local.numel(), dtype=torch.float64))

    def compute(self) -> Tensor:
        """Return the root mean square, a 0-dimensional tensor; NaN of no values."""
        squares, size = self._total()
        return (squares / size).sqrt()


class AbsMax(Metric):
    r"""Largest magnitude, :math:`\max_i |x_i|`; NaN if there is one.

    Args:
        kwargs: torchmetrics' own options.

    Example:
        >>> metric = AbsMax()
        >>> metric.update(torch.tensor([1.0, -3.0]))
        >>> metric.update(torch.tensor([2.0]))
        >>> metric.compute()
        tensor(3., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better: bool | None = False
    full_state_update = False
    largest: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("largest", default=torch.tensor(0.0, dtype=torch.float64, device="cpu"), dist_reduce_fx="max")

    def update(self, value: Tensor) -> None:
        """Add a state: floating point, any shape."""
        self.largest = torch.maximum(self.largest, abs_max(_local(value)[0]).to(self.largest))

    def compute(self) -> Tensor:
        """Return the largest magnitude, a 0-dimensional tensor; 0 of no values."""
        return self.largest


class UnderflowFraction(_Sums):
    r"""Share of the nonzero entries that a storage format would store as 0: a forecast.

    .. math::
        \frac{\#\{i : x_i \ne 0, Q(x_i) = 0\}}{\#\{i : x_i \ne 0\}}

    with :math:`Q` the rounding of the format, its scales included: exactly what storing the tensor would lose.

    Args:
        format: a :class:`~lightning_stosign.StatePrecision` or its name, or ``"fp4-block"``.
        replicated: as of :class:`ZeroFraction`.
        kwargs: torchmetrics' own options.

    Raises:
        ValueError: the format is unknown, or rounds stochastically.
        TypeError: ``format`` is not a format, or ``replicated`` not a bool.

    Example:
        >>> metric = UnderflowFraction("fp8-raw:min_numel=0")
        >>> metric.update(torch.tensor([0.0, 1.0, 1e-4]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    def __init__(self, format: Format, replicated: bool = True, **kwargs: Any) -> None:
        check_format(format)
        super().__init__(f"underflow_{StatePrecision.parse(format)!r}", 2, replicated, **kwargs)
        self.format = format

    def update(self, value: Tensor, degree: int = 1) -> None:
        """Add a state.

        Args:
            value: floating point, any shape.
            degree: the power of the gradient's scale that it is proportional to (2 for a second moment), for a format
                with a static scale.
        """
        local, layout = _local(value)
        rounds = forecast_rounds(local.reshape(-1), layout, self.format, degree)
        self._add(value, layout, *run_rounds([rounds], layout.group)[0].underflow)

    def compute(self) -> Tensor:
        """Return the share, a 0-dimensional tensor; 0 where all values are 0."""
        lost, nonzero = self._total()
        return lost / nonzero.clamp(min=1)


class StalledFraction(_Sums):
    r"""Share of the changing entries whose next change a storage format would lose: signal swamping.

    .. math::
        \frac{\#\{i : d_i \ne 0, Q(Q(x_i) + d_i) = Q(x_i)\}}{\#\{i : d_i \ne 0\}}

    Args:
        format: as of :class:`UnderflowFraction`, with its errors.
        replicated: as of :class:`ZeroFraction`.
        kwargs: torchmetrics' own options.

    Example:
        >>> metric = StalledFraction("fp8-raw:min_numel=0")
        >>> metric.update(torch.tensor([1.0, 1.0]), torch.tensor([0.01, 0.1]))  # E4M3 has 1 and 1.125
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)

    Source:
        arXiv 2603.16731.
    """

    def __init__(self, format: Format, replicated: bool = True, **kwargs: Any) -> None:
        check_format(format)
        super().__init__(f"stalled_{StatePrecision.parse(format)!r}", 2, replicated, **kwargs)
        self.format = format

    def update(self, value: Tensor, change: Tensor, degree: int = 1) -> None:
        """Add a state and what its next step adds, e.g. :func:`~lightning_stosign.health.nominal_change`.

        Args:
            value: floating point, any shape.
            change: the same shape, sharded alike.
            degree: as of :meth:`UnderflowFraction.update`.
        """
        local, layout = _local(value)
        flat_change = _local(change)[0].reshape(-1)
        rounds = forecast_rounds(local.reshape(-1), layout, self.format, degree, lambda part: flat_change[part])
        stalled = run_rounds([rounds], layout.group)[0].stalled
        assert stalled is not None
        self._add(value, layout, *stalled)

    def compute(self) -> Tensor:
        """Return the share, a 0-dimensional tensor; 0 where nothing changes."""
        stalled, changing = self._total()
        return stalled / changing.clamp(min=1)


class _CoordinateFraction(_Sums):
    """Base: a share of the coordinates, judged by the update's numerator and denominator."""

    def __init__(self, replicated: bool = True, **kwargs: Any) -> None:
        super().__init__("coordinates", 3, replicated, **kwargs)

    def update(self, numerator: Tensor, denominator: Tensor) -> None:
        """Add a parameter's numerator (e.g. ``exp_avg``) and denominator (e.g. ``exp_avg_sq``), of one shape."""
        (top, layout), (bottom, _) = _local(numerator), _local(denominator)
        size = top.new_tensor(top.numel(), dtype=torch.float64)
        self._add(numerator, layout, *coordinate_health(top, bottom), size)


class DeadFraction(_CoordinateFraction):
    """Share of the coordinates with numerator 0 and denominator 0: they cannot move.

    Args:
        replicated: as of :class:`ZeroFraction`.
        kwargs: torchmetrics' own options.

    Example:
        >>> metric = DeadFraction()
        >>> metric.update(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """Return the share, a 0-dimensional tensor; NaN of no values."""
        dead, _, size = self._total()
        return dead / size


class ExplodingFraction(_CoordinateFraction):
    """Share of the coordinates with denominator 0 and a numerator that is not: Adam's quotient explodes.

    Args:
        replicated: as of :class:`ZeroFraction`.
        kwargs: torchmetrics' own options.

    Example:
        >>> metric = ExplodingFraction()
        >>> metric.update(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """Return the share, a 0-dimensional tensor; NaN of no values."""
        _, exploding, size = self._total()
        return exploding / size


class LogMagnitudeHistogram(_Sums):
    """Counts of the nonzero magnitudes by their log10, between :func:`~lightning_stosign.health.log10_bin_edges`.

    Args:
        replicated: as of :class:`ZeroFraction`.
        kwargs: torchmetrics' own options.

    Example:
        >>> metric = LogMagnitudeHistogram()
        >>> metric.update(torch.tensor([0.0, 1.1, -1.1, 1e-3]))
        >>> int(metric.compute().sum()), int(metric.compute().max())
        (3, 2)

    Source:
        arXiv 2604.15416, Figure 3.
    """

    higher_is_better: bool | None = None

    def __init__(self, replicated: bool = True, **kwargs: Any) -> None:
        super().__init__("magnitudes", MAGNITUDE_BINS, replicated, **kwargs)

    def update(self, value: Tensor) -> None:
        """Add a state: floating point, any shape."""
        local, layout = _local(value)
        self._add(value, layout, magnitude_counts(local))

    def compute(self) -> Tensor:
        """Return the counts, float64, one fewer than there are edges."""
        return histogram_of(self._total())


class LogMagnitudeQuantile(_Sums):
    """Quantiles of log10 of the nonzero magnitudes, to within 0.003.

    Args:
        quantiles: each in [0, 1].
        replicated: as of :class:`ZeroFraction`.
        kwargs: torchmetrics' own options.

    Raises:
        ValueError: a quantile is out of range.
        TypeError: ``replicated`` is not a bool.

    Example:
        >>> metric = LogMagnitudeQuantile([0.5, 1.0])
        >>> metric.update(torch.tensor([0.0, 1.0, 1.0, 8.0]))
        >>> metric.compute()
        tensor([0.0000, 0.9031], dtype=torch.float64)
    """

    higher_is_better: bool | None = None

    def __init__(self, quantiles: Sequence[float], replicated: bool = True, **kwargs: Any) -> None:
        for quantile in quantiles:
            if not 0 <= quantile <= 1:
                raise ValueError(f"quantiles={quantiles!r}: each must be in [0, 1]")
        super().__init__("magnitudes", MAGNITUDE_BINS, replicated, **kwargs)
        self.quantiles = tuple(quantiles)

    def update(self, value: Tensor) -> None:
        """Add a state: floating point, any shape."""
        local, layout = _local(value)
        self._add(value, layout, magnitude_counts(local))

    def compute(self) -> Tensor:
        """Return the quantiles, float64, in order; NaN where all values are 0."""
        return log10_quantiles(self._total(), self.quantiles)


def _local(value: Tensor) -> tuple[Tensor, Layout]:
    """Return this rank's values in float32 or float64, and where they lie."""
    local, layout = localize(value.detach())
    return in_float32(local), layout
