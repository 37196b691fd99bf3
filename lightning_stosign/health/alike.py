"""Statistics of many small tensors at once: tensors of one size are stacked, and every operation runs on all of them.

On small tensors an operation costs its call, not its values, and a model may have hundreds of them. The results are
those of the functions for single tensors, one per row.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from lightning_stosign.health.forecast import Forecast, Share
from lightning_stosign.health.readers import Moments
from lightning_stosign.health.rounding import Rounding
from lightning_stosign.health.sharding import Layout
from lightning_stosign.health.statistics import (
    PART_SIZE,
    CoordinateHealth,
    NoiseIntensity,
    StateStatistics,
    ones_where,
    sum_dtype,
)
from lightning_stosign.optim.states.state_precision import StatePrecision

Item = TypeVar("Item")


def is_small(value: Tensor) -> bool:
    """Whether a tensor is worth stacking with others of its size."""
    return type(value) in (Tensor, torch.nn.Parameter) and 0 < value.numel() <= PART_SIZE


def kind_of(moments: Moments, formats: Sequence[str]) -> Hashable | None:
    """Return what is equal for moments that can be stacked; None where they cannot.

    Args:
        moments: of one parameter.
        formats: what is to be forecast.
    """
    for name, value in moments.states.items():
        if not is_small(value) or value.dtype != torch.float32 or moments.layout(name).group is not None:
            return None
        if not all(_rounds_rows(value.numel(), format) for format in formats):
            return None
    numerator, denominator = moments.numerator, moments.denominator
    if denominator is None or numerator is None or numerator.shape != denominator.shape:
        pair: Hashable = None
    else:
        pair = numerator.numel(), numerator.dtype, moments.stochastic_sign
    states = tuple(
        (name, value.numel(), value.device, name in moments.changes) for name, value in moments.states.items()
    )
    return states, pair


def batches(items: Iterable[tuple[Hashable, int, Item]]) -> Iterator[list[Item]]:
    """Yield the items that may be stacked, together, as many as one operation on the CPU should have.

    Args:
        items: what is equal for those that may be, the number of values of each, and the item.
    """
    alike: dict[tuple[Hashable, int], list[Item]] = defaultdict(list)
    for kind, numel, item in items:
        alike[kind, numel].append(item)
    for (_, numel), found in alike.items():
        rows = max(PART_SIZE // numel, 1)
        for start in range(0, len(found), rows):
            yield found[start : start + rows]


def stack(values: Iterable[Tensor]) -> Tensor:
    """Return tensors of one size as rows ``[tensors, numel]``."""
    return torch.stack([value.detach().reshape(-1) for value in values])


def rows_statistics(rows: Tensor) -> StateStatistics:
    """Return :func:`state_statistics` of each row, ``[rows]``."""
    nonzero = _row_sums(ones_where(torch.ne, rows, 0))
    largest = rows.abs().amax(1).to(sum_dtype(rows))
    return StateStatistics(zeros=rows.shape[1] - nonzero, abs_max=largest, square_sum=_row_squares(rows))


def rows_forecast(
    rows: Tensor, statistics: StateStatistics, format: str, degree: int, change: Tensor | None
) -> Forecast:
    """Forecast what a format would do to each row, which is a state by itself.

    Args:
        rows: float32, ``[rows, numel]``.
        statistics: of the rows.
        format: one that :func:`kind_of` has let pass.
        degree: of the state.
        change: what the next step adds, like ``rows``; None: do not look for stalls.
    """
    rounding = _rounding(rows.shape[1], format, degree)
    everything = slice(0, rows.shape[1])
    store = rounding.store(_as_maxima(statistics.abs_max))
    stored = store(rows, everything)
    nonzero = rows.shape[1] - statistics.zeros
    underflow = Share(nonzero - _row_sums(ones_where(torch.ne, stored, 0)), nonzero)
    if change is None:
        return Forecast(underflow, None)
    after = stored + change
    if rounding.has_tensor_scale:
        store = rounding.store(_as_maxima(after.abs().amax(1)))
    changes = ones_where(torch.ne, change, 0)
    stalled = _row_sums(ones_where(torch.eq, store(after, everything), stored).mul_(changes))
    return Forecast(underflow, Share(stalled, _row_sums(changes)))


def rows_health(numerator: Tensor, denominator: Tensor) -> CoordinateHealth:
    """Return :func:`coordinate_health` of each row."""
    without = ones_where(torch.eq, denominator, 0)
    exploding = _row_sums(ones_where(torch.ne, numerator, 0).to(without.dtype).mul_(without))
    return CoordinateHealth(dead=_row_sums(without) - exploding, exploding=exploding)


def rows_noise(numerator: Tensor, envelope: Tensor) -> NoiseIntensity:
    """Return :func:`noise_intensity` of each row."""
    u = torch.ops.aten.threshold_backward(numerator / envelope, envelope, 0)
    moving = _row_sums(ones_where(torch.gt, envelope, 0))
    agreement = (moving + u.abs().sum(1, dtype=sum_dtype(u))) / 2
    return NoiseIntensity(variance=moving - _row_squares(u), agreement=agreement, moving=moving)


def rows_update(before: Tensor, after: Tensor, lr: float | Tensor, weight_decay: float | Tensor) -> Tensor:
    """Return for each row the sum of squares of the step divided by lr, without its decay; 0 where nothing moved."""
    dtype = torch.promote_types(after.dtype, torch.float32)
    before = before.to(dtype)
    step = after.to(dtype) - before
    moved = _row_sums(ones_where(torch.ne, step, 0))
    if isinstance(weight_decay, Tensor) or weight_decay != 0:
        step += before * (lr * weight_decay)
    return _row_squares(step) / lr**2 * (moved > 0)


@lru_cache(maxsize=1024)
def _rounding(numel: int, format: str, degree: int) -> Rounding:
    return Rounding(Layout(numel), StatePrecision.parse(format), degree)


def _rounds_rows(numel: int, format: str) -> bool:
    return _rounding(numel, format, 1).rounds_rows


def _as_maxima(largest: Tensor) -> Tensor:
    """Return largest magnitudes of rows as :meth:`Rounding.store` takes them: one, which broadcasts over the rows."""
    return largest.float()[None, :, None]


def _row_sums(ones: Tensor) -> Tensor:
    """Add up zeros and ones, exactly: a row is far below 2**24 long."""
    return ones.sum(1).to(sum_dtype(ones))


def _row_squares(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=sum_dtype(rows)).square()
