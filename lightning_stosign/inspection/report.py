"""What a checkpoint's optimizer states hold, and what a format would lose of them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_stosign.health.forecast import check_format
from lightning_stosign.inspection.checkpoint import (
    UNREADABLE,
    Checkpoint,
    CheckpointError,
    one_line,
    printable,
    read_checkpoint,
)
from lightning_stosign.inspection.saved_optimizer import SavedOptimizer, SavedParameter, name_parameters
from lightning_stosign.inspection.tally import HealthTally, StateTally
from lightning_stosign.optim.emulation import state_degree

DEFAULT_FORECAST = ("fp8-raw", "fp8", "fp8-block")


@dataclass
class LayerReport:
    """One parameter.

    Attributes:
        parameter: which one.
        states: counts by state.
        health: counts of its coordinates; None where the optimizer divides by nothing, or nobody knows by what.
    """

    parameter: SavedParameter
    states: dict[str, StateTally]
    health: HealthTally | None


@dataclass
class OptimizerReport:
    """One optimizer, with each of its parameters and their sum.

    Attributes:
        name: which optimizer it is.
        options: the options of its first param group, as plain values.
        layers: its parameters.
        states: counts by state, over all of them.
        stored_as: how each state is stored; several ways are joined by "/".
        health: counts over all parameters, or None.
    """

    name: str
    options: dict[str, Any]
    layers: list[LayerReport] = field(default_factory=list)
    states: dict[str, StateTally] = field(default_factory=dict)
    stored_as: dict[str, str] = field(default_factory=dict)
    health: HealthTally | None = None

    @classmethod
    def of(cls, optimizer: SavedOptimizer, forecast: Iterable[str]) -> "OptimizerReport":
        """Read an optimizer's states, one parameter at a time."""
        options = {printable(name): _plain(value) for name, value in optimizer.options.items()}
        report = cls(optimizer.name, options)
        stored: dict[str, list[str]] = {}
        for parameter in optimizer.parameters:
            layer = _layer(optimizer, parameter, forecast)
            report.layers.append(layer)
            for name, tally in layer.states.items():
                report.states.setdefault(name, StateTally()).add(tally)
                ways = stored.setdefault(name, [])
                if (way := parameter.stored_as(name)) not in ways:
                    ways.append(way)
            if layer.health is not None:
                report.health = report.health or HealthTally()
                report.health.add(layer.health)
        report.stored_as = {name: " / ".join(ways) for name, ways in stored.items()}
        return report


def _layer(optimizer: SavedOptimizer, parameter: SavedParameter, forecast: Iterable[str]) -> LayerReport:
    try:
        moments = optimizer.read(parameter)
        states = {name: StateTally.of(value, forecast, state_degree(name)) for name, value in moments.states.items()}
        health = None
        if moments.numerator is not None and moments.denominator is not None:
            health = HealthTally.of(moments.numerator, moments.denominator)
    except UNREADABLE as error:
        raise CheckpointError(f"the states of parameter {parameter.label} cannot be read: {one_line(error)}") from error
    return LayerReport(parameter, states, health)


@dataclass
class Report:
    """Everything about a checkpoint.

    Attributes:
        checkpoint: the file.
        forecast: the formats.
        optimizers: one report each.
    """

    checkpoint: Checkpoint
    forecast: tuple[str, ...]
    optimizers: list[OptimizerReport]

    @property
    def left_unread(self) -> list[str]:
        """The classes of objects in the file that were not read."""
        return [printable(name) for name in self.checkpoint.placeholders]


def inspect_checkpoint(path: Path | str, forecast: Iterable[str] = DEFAULT_FORECAST) -> Report:
    """Read a Lightning checkpoint's optimizer states, without its model's code.

    Args:
        path: a ``.ckpt`` file.
        forecast: formats for which to count what they would store as 0: names of a :class:`StatePrecision`, such as
            ``"fp8-raw:dtype=float8_e5m2"``, or ``"fp4-block"``.

    Raises:
        CheckpointError: the file cannot be read; one line says why.
        ValueError: a format is unknown.
    """
    forecast = tuple(dict.fromkeys(forecast))
    for name in forecast:
        check_format(name)
    checkpoint = read_checkpoint(path)
    optimizers = [SavedOptimizer(state_dict) for state_dict in checkpoint.optimizer_states]
    name_parameters(optimizers, checkpoint.weights)
    return Report(checkpoint, forecast, [OptimizerReport.of(optimizer, forecast) for optimizer in optimizers])


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as plain values; numbers that are not finite, which JSON lacks, are None."""
    return {
        "checkpoint": str(report.checkpoint.path),
        "bytes": report.checkpoint.size,
        **report.checkpoint.facts,
        "left_unread": report.left_unread,
        "optimizers": [
            {
                "optimizer": optimizer.name,
                "options": optimizer.options,
                "stored_as": optimizer.stored_as,
                **_counts(optimizer.states, optimizer.health),
                "layers": [
                    {
                        "number": layer.parameter.number,
                        "name": None if layer.parameter.name is None else layer.parameter.label,
                        "shape": None if layer.parameter.shape is None else list(layer.parameter.shape),
                        **_counts(layer.states, layer.health),
                    }
                    for layer in optimizer.layers
                ],
            }
            for optimizer in report.optimizers
        ],
    }


def _counts(states: dict[str, StateTally], health: HealthTally | None) -> dict[str, Any]:
    counts: dict[str, Any] = {
        "states": {
            name: {
                "values": tally.size,
                "zero_fraction": tally.zero_fraction,
                "abs_max": _plain(tally.largest),
                "rms": _plain(tally.rms),
                "underflow_fraction": tally.underflow_fraction,
            }
            for name, tally in states.items()
        }
    }
    if health is not None:
        counts.update(dead_fraction=health.dead_fraction, exploding_fraction=health.exploding_fraction)
    return counts


def _plain(value: Any) -> Any:
    """Return what JSON can hold of a value."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, type(None))) else printable(str(value))
