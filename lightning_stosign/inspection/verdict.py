"""Has a state collapsed? StateCollapseGuard's conditions and limits, for a checkpoint."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lightning_stosign.inspection.messages import printable
from lightning_stosign.inspection.report import LayerReport, OptimizerReport, Report
from lightning_stosign.inspection.tally import HealthTally, StateTally


@dataclass(frozen=True)
class Limits:
    """The largest healthy shares; the defaults are :class:`lightning_stosign.StateCollapseGuard`'s.

    Attributes:
        max_zero_fraction: of zeros in a watched state.
        max_dead_fraction: of coordinates with numerator 0 and denominator 0.
        max_exploding_fraction: of coordinates with denominator 0 and numerator not.
        states: the names of the states whose zeros count; None: those without which the update fails.
        per_layer: whether each layer has to keep to the limits, not only all of them together.
    """

    max_zero_fraction: float = 0.5
    max_dead_fraction: float = 1.0
    max_exploding_fraction: float = 0.01
    states: tuple[str, ...] | None = None
    per_layer: bool = False


@dataclass(frozen=True)
class Finding:
    """A condition beyond its limit.

    Attributes:
        text: what, in words.
        severity: larger is worse.
    """

    text: str
    severity: float


def find_collapses(report: Report, limits: Limits) -> list[Finding]:
    """Return every condition that is beyond its limit, the worst first.

    A value that is not finite in a watched state is beyond every limit.
    """
    found = [finding for optimizer in report.optimizers for finding in _of_optimizer(optimizer, limits)]
    return sorted(found, key=lambda finding: -finding.severity)


def verdict_line(report: Report, limits: Limits, most: int = 3) -> str:
    """Return one line that says whether a state has collapsed, and why.

    Args:
        report: of the checkpoint.
        limits: what is healthy.
        most: how many findings it names.
    """
    name = printable(report.checkpoint.path.name or str(report.checkpoint.path))
    found = find_collapses(report, limits)
    if found:
        more = f"; and {len(found) - most} more" if len(found) > most else ""
        return f"{name}: collapsed: {'; '.join(each.text for each in found[:most])}{more}"
    if not any(optimizer.states for optimizer in report.optimizers):
        return f"{name}: healthy: the optimizer has no states"
    shares = [pair for each in report.optimizers for pair in _watched_shares(each, limits)]
    share, state = max(shares, default=(0.0, "no state"))
    return f"{name}: healthy: {share:.1%} of {state} is zero (limit {limits.max_zero_fraction:.1%})"


def watched(optimizer: OptimizerReport, limits: Limits) -> list[str]:
    """Return the names of the states whose zeros count."""
    if limits.states is not None:
        return [name for name in optimizer.states if name in limits.states]
    decisive = {name for layer in optimizer.layers for name in layer.decisive}
    return [name for name in optimizer.states if name in decisive]


def _watched_shares(optimizer: OptimizerReport, limits: Limits) -> Iterator[tuple[float, str]]:
    for name in watched(optimizer, limits):
        yield optimizer.states[name].zero_fraction, printable(name)


def _of_optimizer(optimizer: OptimizerReport, limits: Limits) -> Iterator[Finding]:
    names = watched(optimizer, limits)
    where = f" of {optimizer.label}" if optimizer.label else ""
    yield from _of_place(optimizer.states, optimizer.health, names, where, limits)
    layers: list[LayerReport] = optimizer.layers if limits.per_layer else []
    for layer in layers:
        yield from _of_place(layer.states, layer.health, names, f" in {layer.parameter.label}{where}", limits)


def _of_place(
    states: Mapping[str, StateTally], health: HealthTally | None, names: list[str], where: str, limits: Limits
) -> Iterator[Finding]:
    for name in names:
        tally = states.get(name)
        if tally is None or tally.size == 0:
            continue
        shown = printable(name)
        if not math.isfinite(tally.largest):
            yield Finding(f"{shown}{where} holds values that are not finite", math.inf)
        elif tally.zero_fraction > limits.max_zero_fraction:
            text = f"{tally.zero_fraction:.1%} of {shown} is zero{where} (limit {limits.max_zero_fraction:.1%})"
            yield Finding(text, tally.zero_fraction)
    if health is None:
        return
    conditions = (
        (health.exploding_fraction, limits.max_exploding_fraction, "of the quotients explode", 1.0),
        (health.dead_fraction, limits.max_dead_fraction, "of the coordinates are dead", 0.0),
    )
    for share, limit, what, offset in conditions:
        if share > limit:
            yield Finding(f"{share:.1%} {what}{where} (limit {limit:.1%})", share + offset)
