"""The report as one page of HTML with its figures in it; nothing is fetched from anywhere."""

import base64
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from lightning_stosign.inspection.messages import printable
from lightning_stosign.inspection.report import LayerReport, OptimizerReport, Report
from lightning_stosign.inspection.rows import (
    Cell,
    headings,
    layer_rows,
    remarks,
    series,
    series_table,
    subtitle,
    title,
    total_rows,
)
from lightning_stosign.inspection.svg import heat_map, histogram, lines
from lightning_stosign.optim.states.state_precision import StatePrecision

GENERATOR = '<meta name="generator" content="lightning-stosign inspect">'

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #fff; --soft: #f2f2f5; --rule: #d5d5dc; --bad: 214 39 40;
  --accent: #1f6fb4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6ea; --paper: #16161a; --soft: #24242b; --rule: #3b3b45; --bad: 255 92 92; --accent: #6cb2eb; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.1rem; margin-top: 2.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.85rem; }
th, td { padding: 0.15rem 0.6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { position: sticky; top: 0; background: var(--paper); }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
.text { text-align: left; }
.wide { overflow-x: auto; margin: 1rem 0; }
svg { display: block; width: 100%; max-width: 46rem; height: auto; margin: 1rem 0; }
svg text { fill: var(--ink); font: 10px system-ui, sans-serif; } svg .name { font-size: 12px; font-weight: 600; }
svg .bar { fill: var(--accent); } svg .axis, svg .mark { stroke: var(--ink); fill: none; stroke-width: 1; }
svg .mark { stroke: rgb(var(--bad)); stroke-dasharray: 4 3; } svg .heat { fill: rgb(var(--bad)); stroke: var(--rule);
  stroke-width: 0.3; } svg .none { fill: var(--soft); } svg .line { fill: none; stroke-width: 2; }
.c0 { stroke: #4c8fd0; } .c1 { stroke: #e0803a; } .c2 { stroke: #3fa66b; } .c3 { stroke: #c95fb0; }
.c4 { stroke: #9a8c2a; } .c5 { stroke: #7b7bd8; } svg .dot { fill: var(--paper); stroke-width: 2; }
@media (max-width: 40rem) { body { margin: 1rem auto; } th, td { padding: 0.15rem 0.35rem; } }
"""

# A click on a heading sorts its table; a second one turns it round.
_SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const heading = button.parentElement, table = heading.closest("table"), column = heading.cellIndex;
  const down = heading.getAttribute("aria-sort") !== "descending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const body = table.tBodies[0], key = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
  const compare = (a, b) => {
    const x = key(a), y = key(b), both = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
    return both ? x - y : (x !== "") - (y !== "") || x.localeCompare(y);
  };
  body.append(...[...body.rows].sort((a, b) => down ? compare(b, a) : compare(a, b)));
});
"""


def render_page(reports: Sequence[Report]) -> str:
    """Return the page of one checkpoint, or of several of a run with plots over steps."""
    head = escape(title(reports[0]) if len(reports) == 1 else f"{len(reports)} checkpoints of a run")
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    body = [] if len(reports) == 1 else list(_series(reports))
    for report in reports:
        if len(reports) > 1:
            body.append(f"<h1>{escape(title(report))}</h1>")
        for optimizer in report.optimizers:
            body += _section(report, optimizer)
        body += [f"<p>{escape(line)}</p>" for line in remarks(report, most=100)]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            GENERATOR,
            # A page made of somebody's file: whatever a name in it says, the browser runs and fetches nothing else.
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            f"script-src 'sha256-{digest}'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{head}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{head}</h1>",
            *body,
            f"<script>{_SCRIPT}</script></body></html>",
            "",
        ]
    )


def _section(report: Report, optimizer: OptimizerReport) -> Iterator[str]:
    yield f"<h2>{escape(subtitle(optimizer))}</h2>"
    if not optimizer.states:
        return
    columns = headings(report)
    yield _table(columns, 2, total_rows(report, optimizer))
    for name, counts in optimizer.magnitudes.items():
        yield histogram(counts, optimizer.states[name].zero_fraction, printable(name))
    states = [printable(name) for name in optimizer.states]
    names = [f"{name}: zero" for name in states]
    names += [f"{name}: lost in {format}" for name in states for format in report.forecast]
    yield from _heat_map(report, optimizer, names)
    rows = []
    for layer in optimizer.layers:
        for row in layer_rows(report, layer):
            rows.append([Cell(layer.parameter.label), *row[1:]])  # each row by itself, since they may be sorted
    yield _table(columns, 2, rows)


_HEAT_TITLE = "Share of zeros, and of nonzero values that a format would store as 0"


def _heat_map(report: Report, optimizer: OptimizerReport, columns: Sequence[str]) -> Iterator[str]:
    """Yield the heat map of the layers that can lose something, and how many cannot."""
    shown = [layer for layer in optimizer.layers if _can_lose(report, layer)]
    if shown:
        labels = [layer.parameter.label for layer in shown]
        yield heat_map(_shares(report, optimizer, shown), labels, columns, _HEAT_TITLE)
    hidden = len(optimizer.layers) - len(shown)
    if hidden:
        yield f"<p>{hidden} parameters without zeros are too small to be stored in these formats, and lose nothing.</p>"


def _can_lose(report: Report, layer: LayerReport) -> bool:
    """Whether a state has zeros, or is large enough for one of the formats to apply."""
    smallest = min((StatePrecision.parse(format).min_numel for format in report.forecast), default=0)
    return any(tally.zeros > 0 or tally.size >= smallest for tally in layer.states.values())


def _shares(report: Report, optimizer: OptimizerReport, layers: Sequence[LayerReport]) -> list[list[float | None]]:
    shares: list[list[float | None]] = []
    for layer in layers:
        tallies = [layer.states.get(name) for name in optimizer.states]
        row = [None if tally is None else tally.zero_fraction for tally in tallies]
        for tally in tallies:
            row += [None if tally is None else tally.underflow_fraction.get(name) for name in report.forecast]
        shares.append(row)
    return shares


def _series(reports: Sequence[Report]) -> Iterator[str]:
    """Yield plots and a table over the steps of a run."""
    columns, rows = series_table(reports)
    by_name: dict[str, dict[float, tuple[float, float, dict[str, float]]]] = {}
    places: dict[tuple[str, int | None], float] = {}
    for row in series(reports):
        place = places.setdefault((row.checkpoint, row.step), row.step if row.step is not None else len(places))
        name = f"{row.optimizer}: {row.state}" if row.optimizer else row.state
        tally = row.tally
        by_name.setdefault(name, {})[place] = tally.zero_fraction, tally.rms, tally.underflow_fraction
    steps = sorted(set(places.values()))

    def over_steps(read: int, format: str | None = None) -> dict[str, list[float | None]]:
        found: dict[str, list[float | None]] = {}
        for name, entries in by_name.items():
            values = [entries.get(step) for step in steps]
            found[name] = [
                None if entry is None else entry[2].get(format) if format is not None else float(entry[read])  # type: ignore[arg-type]
                for entry in values
            ]
        return found

    yield lines(over_steps(0), steps, "Share of zeros over steps")
    yield lines(over_steps(1), steps, "Root mean square over steps", log=True)
    for name in dict.fromkeys(name for report in reports for name in report.forecast):
        yield lines(over_steps(2, name), steps, f"Share of nonzero values lost in {name}, over steps")
    yield _table(columns, columns.index("state") + 1, rows)


def _table(columns: Sequence[str], left: int, body: Iterable[list[Cell]]) -> str:
    kind = ['class="text"' if number < left else "" for number in range(len(columns))]
    head = "".join(
        f'<th {kind[i]} scope="col"><button type="button">{escape(name)}</button></th>'
        for i, name in enumerate(columns)
    )
    lines_ = [f"<tr>{''.join(map(_cell, row, kind))}</tr>" for row in body]
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines_)}</tbody></table></div>'


def _cell(cell: Cell, kind: str) -> str:
    shade = f' style="background: rgb(var(--bad) / {0.6 * cell.share:.2f})"' if cell.share else ""
    value = f' data-v="{cell.number!r}"' if cell.number is not None and math.isfinite(cell.number) else ""
    return f"<td {kind}{shade}{value}>{escape(cell.text)}</td>"
