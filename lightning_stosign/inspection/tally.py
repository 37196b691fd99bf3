"""Counts of a state: what it holds, and what a format would lose of it; they add up over parameters."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_stosign.health.forecast import underflow_fraction
from lightning_stosign.health.magnitudes import log10_bin_edges, log10_histogram
from lightning_stosign.health.statistics import coordinate_health, state_statistics

_BINS = len(log10_bin_edges()) - 1


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
    log10_counts: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64, device="cpu"))

    @classmethod
    def of(cls, value: Tensor, formats: Iterable[str], degree: int) -> "StateTally":
        """Count a state.

        Args:
            value: float32 or wider, any shape.
            formats: what to forecast, as in :func:`lightning_stosign.health.check_format`.
            degree: the state's :func:`lightning_stosign.optim.emulation.state_degree`.
        """
        statistics = state_statistics(value)
        return cls(
            size=value.numel(),
            zeros=int(statistics.zeros),
            largest=float(statistics.abs_max),
            square_sum=float(statistics.square_sum),
            lost={name: int(underflow_fraction(value, name, degree).part) for name in formats},
            log10_counts=log10_histogram(value),
        )

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
        health = coordinate_health(numerator, denominator)
        return cls(size=numerator.numel(), dead=int(health.dead), exploding=int(health.exploding))

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
