"""The report in the terminal."""

import sys
from typing import TextIO

from lightning_stosign.inspection.report import Report
from lightning_stosign.inspection.rows import ALL_LAYERS, Cell, headings, rows, subtitle, title

_NOT_A_TERMINAL = 200  # columns, so that a file or a pipe gets every number


def print_table(report: Report, file: TextIO | None = None) -> None:
    """Print the report as tables, one for each optimizer.

    Args:
        report: what to print.
        file: where to; None: standard output.

    Raises:
        ModuleNotFoundError: rich is not installed.
    """
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the table needs rich: pip install 'lightning-stosign[dashboard]'; --json does without"
        ) from error
    file = file or sys.stdout
    console = Console(file=file, width=None if file.isatty() else _NOT_A_TERMINAL, highlight=False)
    # Text, since a string would be searched for markup, and a parameter's name may look like it
    console.print(Text(title(report), style="bold"))
    for optimizer in report.optimizers:
        console.print(Text(subtitle(optimizer)))
        if not optimizer.states:
            continue
        table = Table()
        for number, heading in enumerate(headings(report)):
            table.add_column(heading, justify="left" if number < 2 else "right", overflow="fold")
        for row in rows(report, optimizer):
            if row[0].text == ALL_LAYERS:
                table.add_section()
            table.add_row(*(Text(cell.text, style=_style(cell)) for cell in row))
        console.print(table)
    if report.checkpoint.placeholders:
        console.print(Text(f"Left unread: objects of {', '.join(report.left_unread)}"))


def _style(cell: Cell) -> str:
    if cell.share is None or cell.share < 0.01:
        return ""
    return "bold red" if cell.share > 0.5 else "yellow"
