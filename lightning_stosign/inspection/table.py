"""The report in the terminal."""

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TextIO

from lightning_stosign.inspection.report import Report
from lightning_stosign.inspection.rows import (
    Cell,
    headings,
    layer_rows,
    remarks,
    series_table,
    subtitle,
    title,
    total_rows,
    worst_first,
)

if TYPE_CHECKING:
    from rich.console import Console

WORST = 20  # layers that are shown unless more are asked for

_NOT_A_TERMINAL = 200  # columns, so that a file or a pipe gets every number


def print_table(report: Report, file: TextIO | None = None, top: int | None = WORST) -> None:
    """Print the report as tables, one for each optimizer.

    Args:
        report: what to print.
        file: where to; None: standard output.
        top: show so many layers, the worst first, where there are more; None: all, in the optimizer's order.

    Raises:
        ModuleNotFoundError: rich is not installed.
    """
    from rich.text import Text

    console = _console(file)
    # Text, since a string would be searched for markup, and a parameter's name may look like it
    console.print(Text(title(report), style="bold"))
    for optimizer in report.optimizers:
        console.print(Text(subtitle(optimizer)))
        if not optimizer.states:
            continue
        layers = optimizer.layers
        if top is not None and len(layers) > top:
            layers = worst_first(optimizer)[:top]
        body = [row for layer in layers for row in layer_rows(report, layer)]
        _print(console, headings(report), 2, body, total_rows(report, optimizer))
        if len(layers) < len(optimizer.layers):
            more = len(optimizer.layers) - len(layers)
            console.print(Text(f"The worst {len(layers)} layers; {more} more with --all, or --top N"))
    for line in remarks(report):
        console.print(Text(line))


def print_series(reports: Sequence[Report], file: TextIO | None = None) -> None:
    """Print several checkpoints of a run as one table over steps.

    Args:
        reports: of each.
        file: where to; None: standard output.

    Raises:
        ModuleNotFoundError: rich is not installed.
    """
    from rich.text import Text

    console = _console(file)
    columns, rows = series_table(reports)
    _print(console, columns, columns.index("state") + 1, rows)
    for line in dict.fromkeys(line for report in reports for line in remarks(report)):
        console.print(Text(line))


def require_rich() -> None:
    """Raise ModuleNotFoundError, with the command that mends it, unless rich is installed."""
    try:
        import rich  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the table needs rich: pip install 'lightning-stosign[dashboard]'; --json does without"
        ) from error


def _console(file: TextIO | None) -> "Console":
    require_rich()
    from rich.console import Console

    file = file or sys.stdout
    return Console(file=file, width=None if file.isatty() else _NOT_A_TERMINAL, highlight=False)


def _print(
    console: "Console", columns: Sequence[str], left: int, body: Iterable[list[Cell]], total: Iterable[list[Cell]] = ()
) -> None:
    """Print a table.

    Args:
        console: where to.
        columns: their headings.
        left: how many columns hold text, aligned to the left.
        body: the rows.
        total: more rows, below a line.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for number, heading in enumerate(columns):
        table.add_column(Text(heading), justify="left" if number < left else "right", overflow="fold")
    for part in (body, total):
        for row in part:
            table.add_row(*(Text(cell.text, style=_style(cell)) for cell in row))
        table.add_section()
    console.print(table)


def _style(cell: Cell) -> str:
    if cell.share is None or cell.share < 0.01:
        return ""
    return "bold red" if cell.share > 0.5 else "yellow"
