"""The report as rows of text, for the terminal and for the page."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lightning_stosign.inspection.messages import printable
from lightning_stosign.inspection.report import LayerReport, OptimizerReport, Report
from lightning_stosign.inspection.tally import HealthTally, StateTally

ALL_LAYERS = "all layers"


class Cell(NamedTuple):
    """What stands in a cell.

    Attributes:
        text: as printed.
        share: of a share of lost values, the share; else None.
        number: of a number, the number, to sort by; else None.
    """

    text: str
    share: float | None = None
    number: float | None = None


def headings(report: Report) -> list[str]:
    """Return the titles of the columns of :func:`layer_rows`."""
    lost = [f"lost in {name}" for name in report.forecast]
    return ["layer", "state", "values", "zero", "largest", "rms", *lost, "dead", "exploding"]


def layer_rows(report: Report, layer: LayerReport) -> Iterator[list[Cell]]:
    """Yield a row for each state of a layer; only the first has the layer's name and the health of its coordinates."""
    return _rows(report, layer.parameter.label, layer.states, layer.health)


def total_rows(report: Report, optimizer: OptimizerReport) -> Iterator[list[Cell]]:
    """Yield a row for each state over all layers."""
    return _rows(report, ALL_LAYERS, optimizer.states, optimizer.health)


def worst_first(optimizer: OptimizerReport) -> list[LayerReport]:
    """Return the layers, those first whose states are not finite, then by the share that has been lost.

    What counts is the share of exploding coordinates and of zeros in the decisive states, then what a format would
    lose. Layers without states come last.
    """

    def badness(layer: LayerReport) -> tuple[float, float, float]:
        if not layer.states:
            return (-1.0, 0.0, 0.0)
        tallies = layer.states.values()
        not_finite = any(not math.isfinite(tally.largest) for tally in tallies)
        zeros = max(
            (tally.zero_fraction for name, tally in layer.states.items() if name in layer.decisive), default=0.0
        )
        exploding = layer.health.exploding_fraction if layer.health is not None else 0.0
        lost = max((share for tally in tallies for share in tally.underflow_fraction.values()), default=0.0)
        return (float(not_finite), exploding + zeros, lost)

    return sorted(optimizer.layers, key=badness, reverse=True)


def _rows(
    report: Report, label: str, states: dict[str, StateTally], health: HealthTally | None
) -> Iterator[list[Cell]]:
    for number, (name, tally) in enumerate(states.items()):
        coordinates = [Cell(""), Cell("")]
        if number == 0 and health is not None:
            coordinates = [share_cell(health.dead_fraction), share_cell(health.exploding_fraction)]
        yield [
            Cell(label if number == 0 else ""),
            Cell(printable(name)),
            Cell(f"{tally.size:,}", number=tally.size),
            share_cell(tally.zero_fraction),
            number_cell(tally.largest),
            number_cell(tally.rms),
            *(share_cell(tally.underflow_fraction.get(format, 0.0)) for format in report.forecast),
            *coordinates,
        ]


def number_cell(value: float) -> Cell:
    """Return a cell with a magnitude."""
    return Cell(f"{value:.3g}", number=value)


def share_cell(share: float) -> Cell:
    """Return a cell with a share, which is never rounded to none or all."""
    if share in (0, 1):
        return Cell(f"{share:.0%}", share, share)
    if share < 0.0005:
        return Cell("<0.1%", share, share)
    if share >= 0.9995:
        return Cell(">99.9%", share, share)
    return Cell(f"{share:.1%}", share, share)


def title(report: Report) -> str:
    """Return the checkpoint, its format and size, and the step it was saved at, in a line."""
    checkpoint = report.checkpoint
    facts = checkpoint.facts
    known = {"step": facts.get("global_step"), "epoch": facts.get("epoch"), "Lightning": facts.get(_VERSION)}
    size = checkpoint.size
    readable = f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size / 1e3:,.0f} kB"
    name = printable(checkpoint.path.name or str(checkpoint.path))
    return ", ".join(
        [f"{name}: {checkpoint.format}", readable]
        + [f"{key} {printable(str(value))}" for key, value in known.items() if value is not None]
    )


def subtitle(optimizer: OptimizerReport) -> str:
    """Return the optimizer, its learning rate and how it stores its states, in a line."""
    values = sum(tally.size for tally in optimizer.states.values())
    stored = ", ".join(f"{printable(name)}: {way}" for name, way in optimizer.stored_as.items())
    lr = optimizer.options.get("lr")
    rate = f" at lr {lr:.3g}" if isinstance(lr, (int, float)) and not isinstance(lr, bool) else ""
    name = f"{optimizer.label}: {optimizer.name}" if optimizer.label else optimizer.name
    if not optimizer.states:
        return f"{name}{rate}: {len(optimizer.layers)} parameters; it has no states"
    return f"{name}{rate}: {len(optimizer.layers)} parameters, {values:,} values of state ({stored})"


def remarks(report: Report, most: int = 8) -> Iterator[str]:
    """Yield what else there is to say: notes on the numbers, what was left unread, and what would run a program.

    Args:
        report: the report.
        most: how many names a line lists.
    """
    yield from (f"Note: {note}" for note in report.checkpoint.notes)
    if report.left_unread:
        yield f"Left unread: objects of {_listed(report.left_unread, most)}"
    if report.checkpoint.dangerous:
        names = _listed([printable(name) for name in report.checkpoint.dangerous], most)
        yield f"Warning: torch.load(weights_only=False) would let this file call {names}"


def _listed(names: Sequence[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


_VERSION = "pytorch-lightning_version"


class SeriesRow(NamedTuple):
    """One state of one optimizer of one checkpoint.

    Attributes:
        checkpoint: its name.
        step: the step it was saved at, None where it does not say.
        optimizer: the optimizer's label.
        state: the state's name.
        tally: counts over all layers.
        health: counts of the optimizer's coordinates, with its first state.
    """

    checkpoint: str
    step: int | None
    optimizer: str
    state: str
    tally: StateTally
    health: HealthTally | None


def series(reports: Sequence[Report]) -> list[SeriesRow]:
    """Return what several checkpoints of a run hold, by step where all have one, else in their order."""
    found = [report.checkpoint.facts.get("global_step") for report in reports]
    steps = [step if isinstance(step, int) else None for step in found]
    order = list(range(len(reports)))
    if None not in steps:
        order.sort(key=lambda index: steps[index] or 0)
    rows = []
    for index in order:
        report, step = reports[index], steps[index]
        for optimizer in report.optimizers:
            for number, (name, tally) in enumerate(optimizer.states.items()):
                rows.append(
                    SeriesRow(
                        printable(report.checkpoint.path.name or str(report.checkpoint.path)),
                        step,
                        optimizer.label,
                        printable(name),
                        tally,
                        optimizer.health if number == 0 else None,
                    )
                )
    return rows


def series_table(reports: Sequence[Report]) -> tuple[list[str], list[list[Cell]]]:
    """Return headings and rows of a table over the steps of several checkpoints."""
    formats = list(dict.fromkeys(name for report in reports for name in report.forecast))
    with_label = any(optimizer.label for report in reports for optimizer in report.optimizers)
    columns = ["step", "checkpoint", *(["optimizer"] if with_label else []), "state", "zero", "largest", "rms"]
    columns += [*(f"lost in {name}" for name in formats), "dead", "exploding"]
    rows = []
    for row in series(reports):
        coordinates = [Cell(""), Cell("")]
        if row.health is not None:
            coordinates = [share_cell(row.health.dead_fraction), share_cell(row.health.exploding_fraction)]
        rows.append(
            [
                Cell("?" if row.step is None else str(row.step), number=row.step),
                Cell(row.checkpoint),
                *([Cell(row.optimizer)] if with_label else []),
                Cell(row.state),
                share_cell(row.tally.zero_fraction),
                number_cell(row.tally.largest),
                number_cell(row.tally.rms),
                *(share_cell(row.tally.underflow_fraction.get(name, 0.0)) for name in formats),
                *coordinates,
            ]
        )
    return columns, rows
