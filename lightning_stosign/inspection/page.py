"""The report as one page of HTML, with its figures in it: no script, and nothing fetched from anywhere."""

import base64
from collections.abc import Iterable, Iterator
from html import escape

import numpy as np

from lightning_stosign.inspection.figures import as_svg, heat_map, magnitudes
from lightning_stosign.inspection.report import OptimizerReport, Report
from lightning_stosign.inspection.rows import Cell, headings, rows, subtitle, title

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1f; background: #fff; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.1rem; margin-top: 2.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.85rem; }
th, td { padding: 0.15rem 0.6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th { position: sticky; top: 0; background: #fff; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
tr.all { font-weight: 600; background: #f2f2f5; }
.wide { overflow-x: auto; } img { max-width: 100%; display: block; margin: 1rem 0; }
"""


def render_page(report: Report) -> str:
    """Return the page.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    head = escape(title(report))
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            # A page made of somebody's file: whatever a name in it says, the browser runs and fetches nothing.
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width">',
            f"<title>{head}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{head}</h1>",
            *(part for optimizer in report.optimizers for part in _section(report, optimizer)),
            *(
                [f"<p>Left unread: objects of {escape(', '.join(report.left_unread))}</p>"]
                if report.left_unread
                else []
            ),
            "</body></html>",
            "",
        ]
    )


def _section(report: Report, optimizer: OptimizerReport) -> Iterator[str]:
    yield f"<h2>{escape(subtitle(optimizer))}</h2>"
    if not optimizer.states:
        return
    every_row = list(rows(report, optimizer))
    layers, total = every_row[: -len(optimizer.states)], every_row[-len(optimizer.states) :]
    yield _table(report, total)
    counts = {name: tally.log10_counts.tolist() for name, tally in optimizer.states.items()}
    zeros = {name: tally.zero_fraction for name, tally in optimizer.states.items()}
    yield _image(
        as_svg(magnitudes(counts, zeros, "Magnitudes over all layers")), "Histograms of the states' magnitudes"
    )
    columns = [f"{name}: zero" for name in optimizer.states]
    columns += [f"{name}: lost in {format}" for name in optimizer.states for format in report.forecast]
    yield _image(
        as_svg(
            heat_map(_shares(report, optimizer), [x.parameter.label for x in optimizer.layers], columns, _HEAT_TITLE)
        ),
        "Heat map of zeros and forecast losses by layer",
    )
    yield _table(report, layers)


_HEAT_TITLE = "Share of zeros, and of nonzero values that a format would store as 0"


def _shares(report: Report, optimizer: OptimizerReport) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    shares = np.full((len(optimizer.layers), len(optimizer.states) * (1 + len(report.forecast))), np.nan)
    for row, layer in zip(shares, optimizer.layers, strict=True):
        for number, name in enumerate(optimizer.states):
            if name not in layer.states:
                continue
            tally = layer.states[name]
            row[number] = tally.zero_fraction
            lost = len(optimizer.states) + number * len(report.forecast)
            row[lost : lost + len(report.forecast)] = list(tally.underflow_fraction.values())
    return shares


def _image(svg: str, alt: str) -> str:
    data = base64.b64encode(svg.encode()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}">'


def _table(report: Report, body: Iterable[list[Cell]]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings(report))
    lines = [f"<tr>{''.join(map(_cell, row))}</tr>" for row in body]
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _cell(cell: Cell) -> str:
    shade = f' style="background: rgb(214 39 40 / {0.6 * cell.share:.2f})"' if cell.share else ""
    return f"<td{shade}>{escape(cell.text)}</td>"
