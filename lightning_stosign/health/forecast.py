"""Forecasts: what a storage format would do to a state's values, while they are still in float32."""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from lightning_stosign.health.sharding import Layout
from lightning_stosign.health.statistics import PART_SIZE, abs_max, count, sum_dtype
from lightning_stosign.optim.emulation import as_stored
from lightning_stosign.optim.state_precision import StatePrecision

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
    rounding = _Rounding(Layout(value.numel()), format, degree)
    return rounding.round(value) if rounding.applies and value.numel() > 0 else value.float()


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


# A scale depends on the largest magnitude of a whole tensor or block, of which a rank may have only a part. A forecast
# therefore is a generator: it yields the largest magnitudes it has seen itself, and is sent those of all ranks.
ForecastRounds = Generator[Tensor, Tensor, Forecast]
Change = Callable[[slice], Tensor]


def forecast_rounds(
    value: Tensor, layout: Layout, format: Format, degree: int = 1, change: Change | None = None
) -> ForecastRounds:
    """Forecast what a format would do to a state of which this rank has a part.

    Args:
        value: float32, flat: the values on this rank.
        layout: where they lie.
        format: as in :func:`check_format`.
        degree: as in :func:`stored_values`.
        change: what the next step adds to a slice of ``value``. None: do not look for stalls.

    Yields:
        Largest magnitudes, float32, of the same length on all ranks. Send their maximum over the ranks.

    Returns:
        The forecast for the values on this rank; counts over ranks add up.
    """
    rounding = _Rounding(layout, format, degree)
    size = value.numel()
    maxima = yield from rounding.maxima(value, size, lambda part: value[part])
    next_maxima = None
    if change is not None:
        known_change = change

        def after(part: slice) -> Tensor:
            return rounding.stored(value[part], part, maxima) + known_change(part)

        next_maxima = yield from rounding.maxima(value, size, after)

    zero = value.new_zeros((), dtype=sum_dtype(value))
    counts = [(zero,) * 4]
    for part in rounding.parts(value):
        before = value[part]
        stored = rounding.stored(before, part, maxima)
        stalled, changing = zero, zero
        if change is not None:
            added = change(part)
            changes = added != 0
            again = rounding.stored(stored + added, part, next_maxima)
            stalled, changing = count((again == stored) & changes), count(changes)
        counts.append((count(before), count(stored), stalled, changing))
    nonzero, kept, stalled, changing = (torch.stack(column).sum() for column in zip(*counts, strict=True))
    return Forecast(Share(nonzero - kept, nonzero), Share(stalled, changing) if change is not None else None)


def run_rounds(forecasts: Sequence[ForecastRounds], group: ProcessGroup | None = None) -> list[Forecast]:
    """Run forecasts side by side, with one collective for each of their at most two rounds.

    Args:
        forecasts: of :func:`forecast_rounds`, the same on all ranks.
        group: the ranks to take the largest magnitudes over; None for this rank alone.

    Returns:
        Their results, in order.
    """
    results: dict[int, Forecast] = {}
    waiting: dict[int, Tensor] = {}

    def advance(index: int, answer: Tensor | None) -> None:
        try:
            waiting[index] = next(forecasts[index]) if answer is None else forecasts[index].send(answer)
        except StopIteration as stop:
            results[index] = stop.value

    for index in range(len(forecasts)):
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
    return [results[index] for index in range(len(forecasts))]


class _Rounding:
    """Rounds any run of a state's values as the format would round them within the whole state.

    Args:
        layout: where this rank's values lie.
        format: the format.
        degree: of the state.
    """

    def __init__(self, layout: Layout, format: Format, degree: int) -> None:
        self._layout = layout
        precision = StatePrecision.parse(format)
        self._block = precision.block_size if precision.scaling == "block" else 1
        self._has_tensor_scale = precision.has_tensor_scale
        self.round: Callable[[Tensor], Tensor] = lambda value: as_stored(value, precision, degree)
        self.applies = layout.numel >= precision.min_numel
        self._cuts = [cut for cut in layout.cuts if cut % self._block]

    def parts(self, value: Tensor) -> Iterator[slice]:
        """Cut this rank's values into runs that end where blocks end, or at the end."""
        size, start = value.numel(), self._layout.start
        wanted = PART_SIZE if value.device.type == "cpu" else size
        length = max(wanted // self._block, 1) * self._block
        begin = 0
        while begin < size:
            end = min(begin + length - (start + begin) % self._block, size)
            yield slice(begin, end)
            begin = end

    def maxima(self, value: Tensor, size: int, values_of: Callable[[slice], Tensor]) -> "_Maxima":
        """Ask for the largest magnitude of the state, and of each block that is cut; None if there is no such need."""
        if not self.applies or not (self._has_tensor_scale or self._cuts):
            return None
        start, block = self._layout.start, self._block
        own = [value.new_zeros((), dtype=sum_dtype(value))]
        if self._has_tensor_scale:
            own += [abs_max(values_of(part)) for part in self.parts(value)]
        largest = [torch.stack(own).amax()]
        for cut in self._cuts:
            first = cut // block * block
            begin, end = max(first - start, 0), min(first + block - start, size)
            largest.append(abs_max(values_of(slice(begin, end))) if begin < end else own[0])
        answer = yield torch.stack(largest).float()
        return answer

    def stored(self, values: Tensor, part: slice, maxima: Tensor | None) -> Tensor:
        """Return values as stored: a run that begins and ends where blocks or this rank's values do."""
        if not self.applies:
            return values
        if maxima is None:
            return self.round(values)
        # Values that stand for what the run does not have: a block with the state's largest, the rest of cut blocks.
        begin = self._layout.start + part.start
        end = begin + values.numel()
        before = [self._standing_for(maxima[0], self._block)] if self._has_tensor_scale else []
        if begin % self._block:
            before.append(self._standing_for(maxima[1 + self._cuts.index(begin)], begin % self._block))
        after = []
        if end % self._block and end != self._layout.numel:
            after.append(self._standing_for(maxima[1 + self._cuts.index(end)], -end % self._block))
        skipped = sum(filler.numel() for filler in before)
        return self.round(torch.cat([*before, values.float(), *after]))[skipped : skipped + values.numel()]

    @staticmethod
    def _standing_for(largest: Tensor, size: int) -> Tensor:
        return torch.nn.functional.pad(largest.reshape(1), (0, size - 1))


_Maxima = Generator[Tensor, Tensor, Tensor | None]
