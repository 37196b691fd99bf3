"""Counting a state of any size in pieces: what it holds, and what a format would lose of it."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_stosign.health.forecast import FP4_BLOCK, Format, underflow_fraction
from lightning_stosign.health.statistics import LOG10_BINS, coordinate_health, log10_histogram, state_statistics
from lightning_stosign.optim.state_precision import StatePrecision
from lightning_stosign.optim.storage import power_of_two_scale

_PIECE = 1 << 18  # values: what a processor's cache holds, several times faster than whole tensors


@dataclass
class StateTally:
    """Counts of one state of one parameter, or summed over parameters.

    Attributes:
        size: number of values.
        zeros: how many are 0.
        largest: the largest magnitude; NaN if there is one.
        square_sum: the sum of squares.
        lost: by format, how many nonzero values it would store as 0.
        log10_counts: histogram of log10 of the magnitudes (:func:`lightning_stosign.health.log10_histogram`).
    """

    size: int = 0
    zeros: int = 0
    largest: float = 0.0
    square_sum: float = 0.0
    lost: dict[str, int] = field(default_factory=dict)
    log10_counts: Tensor = field(default_factory=lambda: torch.zeros(LOG10_BINS, dtype=torch.float64))

    @classmethod
    def of(cls, value: Tensor, formats: Iterable[str], degree: int) -> "StateTally":
        """Count a state.

        Args:
            value: float32 or wider, any shape.
            formats: what to forecast, as in :func:`lightning_stosign.health.check_format`.
            degree: the state's :func:`lightning_stosign.optim.emulation.state_degree`.
        """
        tally = cls(size=value.numel())
        for piece in _pieces(value, _PIECE):
            statistics = state_statistics(piece)
            tally.zeros += int(statistics.zeros)
            tally.largest = _largest(tally.largest, float(statistics.abs_max))
            tally.square_sum += float(statistics.square_sum)
            tally.log10_counts += log10_histogram(piece)
        for name in formats:
            tally.lost[name] = _lost(value, name, degree, tally.largest)
        return tally

    def add(self, other: "StateTally") -> None:
        """Add the counts of another parameter's state."""
        self.size += other.size
        self.zeros += other.zeros
        self.largest = _largest(self.largest, other.largest)
        self.square_sum += other.square_sum
        for name, count in other.lost.items():
            self.lost[name] = self.lost.get(name, 0) + count
        self.log10_counts += other.log10_counts

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
        tally = cls(size=numerator.numel())
        pairs = zip(_pieces(numerator, _PIECE), _pieces(denominator, _PIECE), strict=True)
        for piece_of_numerator, piece_of_denominator in pairs:
            health = coordinate_health(piece_of_numerator, piece_of_denominator)
            tally.dead += int(health.dead)
            tally.exploding += int(health.exploding)
        return tally

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


def _lost(value: Tensor, name: str, degree: int, largest: float) -> int:
    if value.numel() == 0:
        return 0
    size, in_pieces = _PIECE, None
    if value.numel() > _PIECE:
        size, in_pieces = _by_piece(name, degree, largest)
    if in_pieces is None:
        return int(underflow_fraction(value, name, degree).part)
    format, degree = in_pieces
    return sum(int(underflow_fraction(piece, format, degree).part) for piece in _pieces(value, size))


def _by_piece(name: str, degree: int, largest: float) -> tuple[int, tuple[Format, int] | None]:
    """Return a piece's size, and the format and degree that do to each piece what ``name`` does to the whole."""
    if name == FP4_BLOCK:
        return 0, None  # the scales of its blocks depend on each other
    precision = replace(StatePrecision.parse(name), min_numel=0)
    if precision.scaling == "block":
        return max(_PIECE // precision.block_size, 1) * precision.block_size, (precision, degree)
    if precision.scaling == "tensor":
        scale = float(power_of_two_scale(torch.tensor(largest), torch.finfo(precision.dtype).max))
        return _PIECE, (replace(precision, scaling="none", static_scale=1 / scale), 1)
    return _PIECE, (precision, degree)


def _pieces(value: Tensor, size: int) -> Iterator[Tensor]:
    """Cut into pieces, in row-major order; none of an empty tensor."""
    yield from value.reshape(-1).split(size) if value.numel() > 0 else ()


def _largest(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
