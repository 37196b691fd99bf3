"""The report as rows of text, for the terminal and for the page."""

from collections.abc import Iterator
from typing import NamedTuple

from lightning_stosign.inspection.checkpoint import printable
from lightning_stosign.inspection.report import OptimizerReport, Report
from lightning_stosign.inspection.tally import HealthTally, StateTally

ALL_LAYERS = "all layers"


class Cell(NamedTuple):
    """What stands in a cell.

    Attributes:
        text: as printed.
        share: of a share of sick values, the share; else None.
    """

    text: str
    share: float | None = None


def headings(report: Report) -> list[str]:
    """Return the titles of the columns of :func:`rows`."""
    lost = [f"lost in {name}" for name in report.forecast]
    return ["layer", "state", "values", "zero", "largest", "rms", *lost, "dead", "exploding"]


def rows(report: Report, optimizer: OptimizerReport) -> Iterator[list[Cell]]:
    """Yield a row for each layer and state, then one for each state over all layers."""
    for layer in optimizer.layers:
        yield from _rows(report, layer.parameter.label, layer.states, layer.health)
    yield from _rows(report, ALL_LAYERS, optimizer.states, optimizer.health)


def _rows(
    report: Report, label: str, states: dict[str, StateTally], health: HealthTally | None
) -> Iterator[list[Cell]]:
    for number, (name, tally) in enumerate(states.items()):
        # A layer's name, and the health of its coordinates, stand in its first row.
        sick = [Cell(""), Cell("")]
        if number == 0 and health is not None:
            sick = [_share(health.dead_fraction), _share(health.exploding_fraction)]
        yield [
            Cell(label if number == 0 else ""),
            Cell(name),
            Cell(f"{tally.size:,}"),
            _share(tally.zero_fraction),
            Cell(f"{tally.largest:.3g}"),
            Cell(f"{tally.rms:.3g}"),
            *(_share(tally.underflow_fraction[format]) for format in report.forecast),
            *sick,
        ]


def _share(share: float) -> Cell:
    if share in (0, 1):
        return Cell(f"{share:.0%}", share)
    if share < 0.0005:
        return Cell("<0.1%", share)
    if share >= 0.9995:
        return Cell(">99.9%", share)
    return Cell(f"{share:.1%}", share)


def title(report: Report) -> str:
    """Return the file, its size and the step it was saved at, in a line."""
    facts = report.checkpoint.facts
    known = {"step": facts.get("global_step"), "epoch": facts.get("epoch"), "Lightning": facts.get(_VERSION)}
    size = report.checkpoint.size
    readable = f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size / 1e3:,.0f} kB"
    return ", ".join(
        [f"{printable(report.checkpoint.path.name)}: {readable}"]
        + [f"{key} {printable(str(value))}" for key, value in known.items() if value is not None]
    )


def subtitle(optimizer: OptimizerReport) -> str:
    """Return the optimizer, its learning rate and how it stores its states, in a line."""
    values = sum(tally.size for tally in optimizer.states.values())
    stored = ", ".join(f"{name}: {way}" for name, way in optimizer.stored_as.items())
    lr = optimizer.options.get("lr")
    rate = f" at lr {lr:.3g}" if isinstance(lr, (int, float)) else ""
    if not optimizer.states:
        return f"{optimizer.name}{rate}: {len(optimizer.layers)} parameters; it has no states"
    return f"{optimizer.name}{rate}: {len(optimizer.layers)} parameters, {values:,} values of state ({stored})"


_VERSION = "pytorch-lightning_version"
