"""The report as strict JSON; ``docs/inspect.md`` has its schema."""

from collections.abc import Sequence
from typing import Any

from lightning_stosign.inspection.messages import printable
from lightning_stosign.inspection.report import OptimizerReport, Report, plain
from lightning_stosign.inspection.tally import HealthTally, StateTally

SCHEMA_VERSION = 1  # rises when a key is renamed, removed or changes its meaning; new keys do not count


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as plain values; numbers that are not finite, which JSON lacks, are None."""
    checkpoint = report.checkpoint
    return {
        "schema_version": SCHEMA_VERSION,
        "checkpoint": printable(str(checkpoint.path), longest=4096),
        "format": checkpoint.format,
        "bytes": checkpoint.size,
        **{key: plain(value) for key, value in checkpoint.facts.items()},
        "left_unread": report.left_unread,
        "would_run_code": list(map(printable, checkpoint.dangerous)),
        "notes": list(checkpoint.notes),
        "optimizers": [_optimizer(optimizer) for optimizer in report.optimizers],
    }


def as_json_series(reports: Sequence[Report]) -> dict[str, Any]:
    """Return several reports as plain values, in their order."""
    return {"schema_version": SCHEMA_VERSION, "checkpoints": [as_json(report) for report in reports]}


def _optimizer(optimizer: OptimizerReport) -> dict[str, Any]:
    return {
        "optimizer": optimizer.name,
        "label": optimizer.label,
        "options": optimizer.options,
        "stored_as": {printable(name): way for name, way in optimizer.stored_as.items()},
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


def _counts(states: dict[str, StateTally], health: HealthTally | None) -> dict[str, Any]:
    counts: dict[str, Any] = {
        "states": {
            printable(name): {
                "values": tally.size,
                "zero_fraction": tally.zero_fraction,
                "abs_max": plain(tally.largest),
                "rms": plain(tally.rms),
                "underflow_fraction": tally.underflow_fraction,
            }
            for name, tally in states.items()
        }
    }
    if health is not None:
        counts.update(dead_fraction=health.dead_fraction, exploding_fraction=health.exploding_fraction)
    return counts
