"""Counts of a state: what it holds, and what a format would lose of it; they add up over parameters."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_stosign.health.magnitudes import histogram_of, magnitude_counts
from lightning_stosign.health.rounding import Rounding, Store
from lightning_stosign.health.sharding import Layout
from lightning_stosign.health.statistics import PART_SIZE, add_up, coordinate_health, ones_where, state_statistics
from lightning_stosign.optim.states.state_precision import StatePrecision


class Forecasts:
    """The formats to forecast, parsed once.

    Args:
        formats: as in :func:`lightning_stosign.health.check_format`.

    Attributes:
        formats: their names.
        block: a number of values that is a multiple of the blocks of all of them.
    """

    def __init__(self, formats: Iterable[str]) -> None:
        self.formats = tuple(formats)
        self._precisions = {name: StatePrecision.parse(name) for name in self.formats}
        self.block = math.lcm(*(Rounding(Layout(1 << 60), p, 1).block for p in self._precisions.values()))

    def of(self, size: int, degree: int) -> dict[str, Rounding]:
        """Return by format what it does to a state of so many values; without those that leave it as it is.

        Args:
            size: the number of values of the whole state.
            degree: the state's :func:`lightning_stosign.optim.emulation.state_degree`.
        """
        return {
            name: Rounding(Layout(size), precision, degree)
            for name, precision in self._precisions.items()
            if size >= max(precision.min_numel, 1)
        }


@dataclass
class StateTally:
    """Counts of one state of one parameter, or summed over parameters.

    Attributes:
        size: number of values.
        zeros: how many are 0.
        largest: the largest magnitude; NaN if there is one.
        square_sum: the sum of squares.
        lost: by format, how many nonzero values it would store as 0.
    """

    size: int = 0
    zeros: int = 0
    largest: float = 0.0
    square_sum: float = 0.0
    lost: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Tensor, formats: Iterable[str], degree: int) -> "StateTally":
        """Count a state that is in memory.

        Args:
            value: float32 or wider, any shape.
            formats: what to forecast.
            degree: the state's :func:`lightning_stosign.optim.emulation.state_degree`.
        """
        forecasts = Forecasts(formats)
        flat = value.reshape(-1)
        tally = cls(lost=dict.fromkeys(forecasts.formats, 0))
        tally.count(flat)
        tally.count_lost(flat, 0, forecasts.of(flat.numel(), degree), forecasts.block)
        return tally

    def count(self, run: Tensor) -> None:
        """Count a run of values, flat."""
        statistics = state_statistics(run)
        zeros, largest, square_sum = torch.stack([each.double() for each in statistics]).tolist()
        self.size += run.numel()
        self.zeros += int(zeros)
        self.largest = _largest(self.largest, largest)
        self.square_sum += square_sum

    def count_lost(self, run: Tensor, start: int, roundings: dict[str, Rounding], block: int) -> None:
        """Count what formats would store as 0, of a run of values.

        Args:
            run: flat.
            start: the index of its first value in the whole state; a multiple of ``block``.
            roundings: what the formats do; ``largest`` has to be that of the whole state for those with a scale per
                tensor.
            block: of :class:`Forecasts`.
        """
        if not roundings or run.numel() == 0:
            return
        stores = {name: rounding.store(self._maxima(rounding)) for name, rounding in roundings.items()}
        length = max(PART_SIZE // block, 1) * block
        lost = dict.fromkeys(stores, 0.0)
        for begin in range(0, run.numel(), length):
            part = run[begin : begin + length]
            nonzero = add_up(ones_where(torch.ne, part, 0))
            place = slice(start + begin, start + begin + part.numel())
            for name, store in stores.items():
                lost[name] += (nonzero - _kept(store, part, place)).item()
        for name, count in lost.items():
            self.lost[name] = self.lost.get(name, 0) + int(count)

    def _maxima(self, rounding: Rounding) -> Tensor:
        return torch.tensor([self.largest] if rounding.has_tensor_scale else [], dtype=torch.float32, device="cpu")

    def add(self, other: "StateTally") -> None:
        """Add the counts of another parameter's state."""
        self.size += other.size
        self.zeros += other.zeros
        self.largest = _largest(self.largest, other.largest)
        self.square_sum += other.square_sum
        for name, count in other.lost.items():
            self.lost[name] = self.lost.get(name, 0) + count

    @property
    def zero_fraction(self) -> float:
        """Share of values equal to 0."""
        return _share(self.zeros, self.size)

    @property
    def rms(self) -> float:
        """Root mean square."""
        return math.sqrt(_share(self.square_sum, self.size))

    @property
    def underflow_fraction(self) -> dict[str, float]:
        """By format, the share of nonzero values that it would store as 0."""
        return {name: _share(count, self.size - self.zeros) for name, count in self.lost.items()}


def _kept(store: Store, part: Tensor, place: slice) -> Tensor:
    return add_up(ones_where(torch.ne, store(part, place), 0))


class Magnitudes:
    """A histogram of a state's magnitudes over all parameters; small ones are counted together."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None
        self._waiting: list[Tensor] = []
        self._size = 0

    def add(self, run: Tensor) -> None:
        """Count a run of values, flat."""
        self._waiting.append(run)
        self._size += run.numel()
        if self._size > PART_SIZE:
            self._count()

    def merge(self, other: "Magnitudes") -> None:
        """Add what another has counted."""
        other._count()
        if other._counts is not None:
            self._counts = other._counts if self._counts is None else self._counts + other._counts

    def _count(self) -> None:
        if self._waiting:
            counts = magnitude_counts(self._waiting[0] if len(self._waiting) == 1 else _together(self._waiting))
            self._counts = counts if self._counts is None else self._counts.add_(counts)
        self._waiting, self._size = [], 0

    def histogram(self) -> list[int]:
        """Return the counts of :func:`lightning_stosign.health.log10_histogram`."""
        self._count()
        counts = (
            magnitude_counts(torch.empty(0, dtype=torch.float32, device="cpu"))
            if self._counts is None
            else self._counts
        )
        return histogram_of(counts).tolist()


def _together(runs: Sequence[Tensor]) -> Tensor:
    return torch.cat([run.float() for run in runs])


@dataclass
class HealthTally:
    """Counts of the coordinates that have a numerator and a denominator.

    Attributes:
        size: their number.
        dead: how many have neither: they cannot move.
        exploding: how many have a numerator over 0.
    """

    size: int = 0
    dead: int = 0
    exploding: int = 0

    @classmethod
    def of(cls, numerator: Tensor, denominator: Tensor) -> "HealthTally":
        """Count one parameter; both tensors of one shape."""
        dead, exploding = torch.stack(list(coordinate_health(numerator, denominator))).tolist()
        return cls(size=numerator.numel(), dead=int(dead), exploding=int(exploding))

    def add(self, other: "HealthTally") -> None:
        """Add the counts of another parameter."""
        self.size += other.size
        self.dead += other.dead
        self.exploding += other.exploding

    @property
    def dead_fraction(self) -> float:
        """Share of coordinates that cannot move."""
        return _share(self.dead, self.size)

    @property
    def exploding_fraction(self) -> float:
        """Share of coordinates whose quotient explodes."""
        return _share(self.exploding, self.size)


def _largest(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
