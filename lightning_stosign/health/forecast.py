"""Forecasts: what a storage format would do to a state's values, while they are still in float32."""

import math
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from lightning_stosign.health.rounding import Rounding, Store, runs_between_blocks
from lightning_stosign.health.sharding import Layout
from lightning_stosign.health.statistics import (
    StateStatistics,
    abs_max,
    add_up,
    ones_where,
    state_statistics,
    sum_dtype,
)
from lightning_stosign.optim.emulation import as_stored
from lightning_stosign.optim.states.state_precision import StatePrecision

Format = StatePrecision | str


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


class Forecast(NamedTuple):
    """What a format would do to a state.

    Attributes:
        underflow: nonzero values that it would store as 0, out of all nonzero ones.
        stalled: values whose next change it would lose, out of all that should change; None without a change.
    """

    underflow: Share
    stalled: Share | None


def check_format(format: Format) -> None:
    """Raise ValueError or TypeError unless ``format`` is one that can be forecast.

    Args:
        format: a :class:`StatePrecision` or its name, e.g. ``"fp8"``, ``"fp8-raw:dtype=float8_e5m2"``,
            ``"fp8-block"``, ``"bfloat16"``, ``"fp4-block"``. What it would leave in float32 for being small
            (``min_numel``) loses nothing.
    """
    precision = StatePrecision.parse(format)
    if precision.stochastic_rounding:
        raise ValueError(f"{format!r}: stochastic rounding is not forecast; accepted: rounding to nearest")


def stored_values(value: Tensor, format: Format, degree: int = 1) -> Tensor:
    """Return what would be read back of values stored in a format, rounded to nearest.

    Args:
        value: float32, any shape.
        format: as in :func:`check_format`.
        degree: the power of the gradient's scale that the state is proportional to
            (:func:`lightning_stosign.optim.emulation.state_degree`), for a format with a static scale.

    Returns:
        float32, same shape.

    Example:
        >>> stored_values(torch.tensor([1.0, 0.3, 1e-4]), "fp8-raw:min_numel=0")
        tensor([1.0000, 0.3125, 0.0000])
    """
    precision = StatePrecision.parse(format)
    applies = precision.applies_to(value) and value.numel() > 0
    return as_stored(value, precision, degree) if applies else value.float()


def underflow_fraction(value: Tensor, format: Format, degree: int = 1) -> Share:
    """Count the nonzero values that a format would store as 0, out of all nonzero values.

    Arguments as in :func:`stored_values`.

    Example:
        >>> underflow_fraction(torch.tensor([0.0, 1.0, 1e-4]), "fp8-raw:min_numel=0").fraction
        tensor(0.5000, dtype=torch.float64)
    """
    flat = value.reshape(-1)
    return run_rounds([forecast_rounds(flat, Layout(flat.numel()), format, degree)])[0].underflow


def stalled_fraction(value: Tensor, change: Tensor, format: Format, degree: int = 1) -> Share:
    """Count the values whose next change a format would lose, out of all values that should change.

    A value stalls where the stored value plus the change rounds back to the stored value: the signal is swamped.

    Args:
        value: float32, any shape.
        change: what the next step adds, same shape, e.g. :func:`nominal_change`.
        format: as in :func:`check_format`.
        degree: as in :func:`stored_values`.

    Example:
        >>> value = torch.tensor([1.0, 1.0, 1.0])
        >>> change = torch.tensor([0.01, 0.1, 0.0])
        >>> stalled_fraction(value, change, "fp8-raw:min_numel=0").fraction  # E4M3 has 1 and 1.125
        tensor(0.5000, dtype=torch.float64)

    Source:
        arXiv 2603.16731, arXiv 2505.00347.
    """
    flat, change = value.reshape(-1), change.reshape(-1)
    rounds = forecast_rounds(flat, Layout(flat.numel()), format, degree, lambda part: change[part])
    (forecast,) = run_rounds([rounds])
    assert forecast.stalled is not None
    return forecast.stalled


# A scale depends on the largest magnitude of a whole tensor or block, of which a rank may have only a part. Forecasts
# therefore are generators: they yield the largest magnitudes they have seen, and are sent those of all ranks.
Result = TypeVar("Result")
Rounds = Generator[Tensor, Tensor, Result]
Change = Callable[[slice], Tensor]


def forecast_rounds(
    value: Tensor, layout: Layout, format: Format, degree: int = 1, change: Change | None = None
) -> Rounds[Forecast]:
    """Forecast what one format would do to a state; the rest as of :func:`forecasts_rounds`."""
    (forecast,) = yield from forecasts_rounds(value, layout, [format], degree, change)
    return forecast


def forecasts_rounds(
    value: Tensor,
    layout: Layout,
    formats: Sequence[Format],
    degree: int = 1,
    change: Change | None = None,
    known: StateStatistics | None = None,
) -> Rounds[list[Forecast]]:
    """Forecast what formats would do to a state of which this rank has a part.

    Args:
        value: float32 or wider, flat: the values on this rank.
        layout: where they lie.
        formats: as in :func:`check_format`.
        degree: as in :func:`stored_values`.
        change: what the next step adds to a slice of ``value``. None: do not look for stalls.
        known: the statistics of ``value``, where the caller has them.

    Yields:
        Largest magnitudes, float32, of the same length on all ranks. Send their maximum over the ranks.

    Returns:
        A forecast a format for the values on this rank; counts over ranks add up.
    """
    value = value.detach()
    known = state_statistics(value) if known is None else known
    looks = [_Look(value, Rounding(layout, StatePrecision.parse(format), degree)) for format in formats]
    runs = list(runs_between_blocks(value, layout, math.lcm(*(look.rounding.block for look in looks))))

    answers = yield from _over_ranks([look.maxima(known.abs_max) for look in looks])
    for look, answer in zip(looks, answers, strict=True):
        look.store = look.rounding.store(answer)
    if change is not None:
        scaled = [look for look in looks if look.rounding.has_tensor_scale]
        for run in runs if scaled else ():
            before, added = value[run], change(run)
            for look in scaled:
                look.add_after(run, before, added)
        answers = yield from _over_ranks([look.maxima_after(change) for look in looks])
        for look, answer in zip(looks, answers, strict=True):
            look.next_store = look.rounding.store(answer)

    changing = [value.new_zeros(())]
    for run in runs:
        before = value[run]
        stored = [look.count_kept(run, before) for look in looks]
        if change is not None:
            added = change(run)
            changes = ones_where(torch.ne, added, 0)
            changing.append(add_up(changes))
            for look, kept in zip(looks, stored, strict=True):
                look.count_stalled(run, kept, added, changes)
    nonzero = value.numel() - known.zeros
    return [look.forecast(nonzero, None if change is None else _total(changing)) for look in looks]


def _over_ranks(own: Sequence[list[Tensor]]) -> Rounds[Sequence[Tensor]]:
    """Ask for the maxima over the ranks, if there are any."""
    numbers = [number for maxima in own for number in maxima]
    together = (yield torch.stack(numbers).float()) if numbers else torch.zeros(0, dtype=torch.float32, device="cpu")
    return together.split([len(maxima) for maxima in own])


class _Look:
    """What one format does to a state, found in one run of its values after the other.

    Args:
        value: the values on this rank, flat.
        rounding: of the format.
    """

    store: Store
    next_store: Store

    def __init__(self, value: Tensor, rounding: Rounding) -> None:
        self.rounding = rounding
        self._value = value
        zero = value.new_zeros(())
        self._after, self._kept, self._stalled = [zero], [zero], [zero]

    def maxima(self, largest: Tensor) -> list[Tensor]:
        """Return the largest magnitudes that :meth:`Rounding.store` is to know.

        Args:
            largest: that of all values on this rank.
        """
        cut_blocks = self.rounding.cut_blocks(self._value.numel())
        return [largest] * self.rounding.has_tensor_scale + [abs_max(self._value[block]) for block in cut_blocks]

    def add_after(self, run: slice, before: Tensor, added: Tensor) -> None:
        """Look at the values of a run as stored and changed, for the largest of them."""
        self._after.append((self.store(before, run) + added).abs_().amax())

    def maxima_after(self, change: Change) -> list[Tensor]:
        """Return what :meth:`maxima` returns, of the values as stored and changed."""
        cut_blocks = self.rounding.cut_blocks(self._value.numel())
        of_blocks = [abs_max(self.store(self._value[block], block) + change(block)) for block in cut_blocks]
        return [torch.stack(self._after).amax()] * self.rounding.has_tensor_scale + of_blocks

    def count_kept(self, run: slice, before: Tensor) -> Tensor:
        """Count what is stored as something else than 0; returns the run as stored."""
        stored = self.store(before, run)
        self._kept.append(add_up(ones_where(torch.ne, stored, 0)))
        return stored

    def count_stalled(self, run: slice, stored: Tensor, added: Tensor, changes: Tensor) -> None:
        """Count what is stored again as it was.

        Args:
            run: where to look.
            stored: the run as stored.
            added: its change.
            changes: 1 where that is not 0, and 0 elsewhere.
        """
        again = self.next_store(stored + added, run)
        self._stalled.append(add_up(again.eq_(stored).mul_(changes)))

    def forecast(self, nonzero: Tensor, changing: Tensor | None) -> Forecast:
        """Return the shares of what was counted.

        Args:
            nonzero: how many values are not 0.
            changing: how many should change.
        """
        underflow = Share(nonzero - _total(self._kept), nonzero)
        return Forecast(underflow, None if changing is None else Share(_total(self._stalled), changing))


def _total(counts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(counts)).sum(dtype=sum_dtype(counts[0]))


def run_rounds(rounds: Sequence[Rounds[Result]], group: ProcessGroup | None = None) -> list[Result]:
    """Run forecasts side by side, with one collective for each of their at most two rounds.

    Args:
        rounds: of :func:`forecasts_rounds`, the same on all ranks.
        group: the ranks to take the largest magnitudes over; None for this rank alone.

    Returns:
        Their results, in order.
    """
    results: dict[int, Result] = {}
    waiting: dict[int, Tensor] = {}

    def advance(index: int, answer: Tensor | None) -> None:
        try:
            waiting[index] = next(rounds[index]) if answer is None else rounds[index].send(answer)
        except StopIteration as stop:
            results[index] = stop.value

    for index in range(len(rounds)):
        advance(index, None)
    while waiting:
        order, asked = list(waiting), list(waiting.values())
        waiting.clear()
        if group is not None:
            together = torch.cat(asked).nan_to_num_(nan=torch.inf, posinf=torch.inf)
            all_reduce(together, ReduceOp.MAX, group)
            asked = list(together.split([maxima.numel() for maxima in asked]))
        for index, maxima in zip(order, asked, strict=True):
            advance(index, maxima)
    return [results[index] for index in range(len(rounds))]
