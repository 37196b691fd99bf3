"""What a checkpoint's optimizer states hold, and what a format would lose of them."""

import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_stosign.health.forecast import check_format
from lightning_stosign.health.readers import Moments
from lightning_stosign.inspection.checkpoint import Checkpoint
from lightning_stosign.inspection.folders import read_checkpoint
from lightning_stosign.inspection.messages import CheckpointError, one_line, printable
from lightning_stosign.inspection.pickle_reader import Global, Unread
from lightning_stosign.inspection.saved_optimizer import SavedOptimizer, SavedParameter, name_parameters
from lightning_stosign.inspection.stored_tensor import is_file_tensor, numel, read_whole
from lightning_stosign.inspection.tally import Forecasts, HealthTally, Magnitudes, StateTally
from lightning_stosign.optim.emulation import state_degree

DEFAULT_FORECAST = ("fp8-raw", "fp8", "fp8-block")

_MOST_PARAMETERS = 250_000
_MOST_THREADS = 4
_BATCH = 4 << 20  # bytes of states that a thread reads in one go; small parameters go together

# What the readers raise on states that contradict each other.
_UNREADABLE = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
)


@dataclass
class LayerReport:
    """One parameter.

    Attributes:
        parameter: which one.
        states: counts by state.
        health: counts of its coordinates; None where the optimizer divides by nothing, or nobody knows by what.
        decisive: the names of the states without which its update fails.
    """

    parameter: SavedParameter
    states: dict[str, StateTally] = field(default_factory=dict)
    health: HealthTally | None = None
    decisive: frozenset[str] = frozenset()


@dataclass
class OptimizerReport:
    """One optimizer, with each of its parameters and their sum.

    Attributes:
        name: which optimizer it is.
        label: what tells it from the checkpoint's others; empty for the only one.
        options: the options of its first param group, as plain values.
        layers: its parameters.
        states: counts by state, over all of them.
        stored_as: how each state is stored; several ways are joined by "/".
        health: counts over all parameters, or None.
        magnitudes: by state the histogram of :func:`lightning_stosign.health.log10_histogram`; empty unless asked for.
    """

    name: str
    label: str
    options: dict[str, Any]
    layers: list[LayerReport] = field(default_factory=list)
    states: dict[str, StateTally] = field(default_factory=dict)
    stored_as: dict[str, str] = field(default_factory=dict)
    health: HealthTally | None = None
    magnitudes: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, optimizer: SavedOptimizer, forecasts: Forecasts, histograms: bool) -> "OptimizerReport":
        """Read an optimizer's states, a few parameters at a time."""
        options = {printable(name): plain(value) for name, value in list(optimizer.options.items())[:1000]}
        report = cls(optimizer.name, optimizer.label, options)
        counts: dict[str, Magnitudes] = {}
        stored: dict[str, list[str]] = {}
        for look in _looks(optimizer, forecasts, histograms):
            for layer in look.layers:
                report._add(layer, stored)
            for name, magnitudes in look.magnitudes.items():
                counts.setdefault(name, Magnitudes()).merge(magnitudes)
        report.stored_as = {name: " / ".join(ways) for name, ways in stored.items()}
        report.magnitudes = {name: magnitudes.histogram() for name, magnitudes in counts.items()}
        return report

    def _add(self, layer: LayerReport, stored: dict[str, list[str]]) -> None:
        self.layers.append(layer)
        for name, tally in layer.states.items():
            self.states.setdefault(name, StateTally()).add(tally)
            ways = stored.setdefault(name, [])
            if (way := layer.parameter.stored_as(name)) not in ways:
                ways.append(way)
        if layer.health is not None:
            self.health = self.health or HealthTally()
            self.health.add(layer.health)


class _Look:
    """Reads and counts the states of a few parameters, in a thread of its own."""

    def __init__(self, optimizer: SavedOptimizer, forecasts: Forecasts, histograms: bool) -> None:
        self.layers: list[LayerReport] = []
        self.magnitudes: dict[str, Magnitudes] = {}
        self._optimizer, self._forecasts, self._histograms = optimizer, forecasts, histograms

    def run(self, parameters: Iterable[SavedParameter]) -> "_Look":
        for parameter in parameters:
            try:
                self.layers.append(self._layer(parameter))
            except CheckpointError:
                raise
            except _UNREADABLE as error:
                reason = one_line(error)
                raise CheckpointError(f"the states of parameter {parameter.label} cannot be read: {reason}") from error
        return self

    def _layer(self, parameter: SavedParameter) -> LayerReport:
        layer = LayerReport(parameter)
        runs = parameter.runs(self._forecasts.block)
        for run in runs:
            moments = self._optimizer.read(parameter, *run)
            self._count(layer, moments)
            if len(runs) == 1:
                self._count_lost(layer, moments, 0)
        for run in runs if len(runs) > 1 else ():  # again, now that the largest values are known
            self._count_lost(layer, self._optimizer.read(parameter, *run), run[0])
        return layer

    def _count(self, layer: LayerReport, moments: Moments) -> None:
        layer.decisive = moments.decisive_names
        for name, value in moments.states.items():
            flat = value.reshape(-1)
            tally = layer.states.setdefault(name, StateTally(lost=dict.fromkeys(self._forecasts.formats, 0)))
            tally.count(flat)
            if self._histograms:
                self.magnitudes.setdefault(name, Magnitudes()).add(flat)
        numerator, denominator = moments.numerator, moments.denominator
        if numerator is not None and denominator is not None and numerator.shape == denominator.shape:
            layer.health = layer.health or HealthTally()
            layer.health.add(HealthTally.of(numerator, denominator))

    def _count_lost(self, layer: LayerReport, moments: Moments, start: int) -> None:
        for name, value in moments.states.items():
            tally = layer.states[name]
            roundings = self._forecasts.of(tally.size, state_degree(name))
            tally.count_lost(value.reshape(-1), start, roundings, self._forecasts.block)


def _looks(optimizer: SavedOptimizer, forecasts: Forecasts, histograms: bool) -> Iterator[_Look]:
    """Read all parameters on a few threads; yields what was found in the optimizer's order."""
    threads = min(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _MOST_THREADS
    )
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(
            lambda parameters: _Look(optimizer, forecasts, histograms).run(parameters), _batches(optimizer.parameters)
        )
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(parameters: Iterable[SavedParameter]) -> Iterator[list[SavedParameter]]:
    batch: list[SavedParameter] = []
    size = 0
    for parameter in parameters:
        batch.append(parameter)
        size += parameter.nbytes
        if size > _BATCH or len(batch) >= 500:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass
class Report:
    """Everything about a checkpoint.

    Attributes:
        checkpoint: the file or folder.
        forecast: the formats.
        optimizers: one report each.
        left_unread: the classes of objects that were not loaded.
    """

    checkpoint: Checkpoint
    forecast: tuple[str, ...]
    optimizers: list[OptimizerReport]
    left_unread: list[str]


def inspect_checkpoint(
    path: Path | str, forecast: Iterable[str] = DEFAULT_FORECAST, *, histograms: bool = False
) -> Report:
    """Read a checkpoint's optimizer states, without its model's code.

    Args:
        path: a file or folder of any of the formats in ``docs/inspect.md``.
        forecast: formats for which to count what they would store as 0: names of a :class:`StatePrecision`, such as
            ``"fp8-raw:dtype=float8_e5m2"``, or ``"fp4-block"``.
        histograms: whether to count the magnitudes of each state too.

    Raises:
        CheckpointError: the checkpoint cannot be read; one line says why.
        ValueError: a format is unknown.
    """
    forecast = tuple(dict.fromkeys(forecast))
    for name in forecast:
        check_format(name)
    checkpoint = read_checkpoint(path)
    number = sum(len(group["params"]) for each in checkpoint.optimizers.values() for group in each["param_groups"])
    if number > _MOST_PARAMETERS:
        raise CheckpointError(f"{path} has {number:,} parameters; at most {_MOST_PARAMETERS:,} are read")
    optimizers = [SavedOptimizer(state_dict, label) for label, state_dict in checkpoint.optimizers.items()]
    name_parameters(optimizers, checkpoint.weights, checkpoint.ordered)
    forecasts = Forecasts(forecast)
    unread = set(checkpoint.left_unread)
    for optimizer in optimizers:
        unread.update(name for parameter in optimizer.parameters for name in parameter.left_unread)
    reports = [OptimizerReport.of(optimizer, forecasts, histograms) for optimizer in optimizers]
    return Report(checkpoint, forecast, reports, sorted(map(printable, unread)))


def plain(value: Any, depth: int = 3) -> Any:
    """Return what JSON can hold of a value; a number that is not finite, which JSON lacks, is None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (bool, int, type(None))):
        return value
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, (tuple, list)):
        return [plain(item, depth - 1) for item in value[:20]] if depth else "[...]"
    return _described(value)


def _described(value: Any) -> Any:
    if is_file_tensor(value):
        if numel(value) == 1 and not value.dtype.is_complex:
            return plain(read_whole(value).item())
        return f"tensor of shape {list(value.shape)}"[:100]
    if isinstance(value, (Global, Unread)):
        return printable(value.name)
    return f"{type(value).__name__} with {len(value)} entries" if isinstance(value, (dict, bytes)) else "object"
