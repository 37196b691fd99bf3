"""Figures of the page, as inline SVG: they take their colours from the page, in the dark too, and need no library."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from lightning_stosign.health.magnitudes import log10_bin_edges

_WIDTH = 640
_SMALLEST_E4M3 = math.log10(2.0**-9)
_MOST_ROWS = 120  # of a heat map; more layers share a row
_COLOURS = 6  # classes c0 ... of the lines


def histogram(counts: Sequence[float], zeros: float, name: str) -> str:
    """Draw how the magnitudes of a state are distributed: log10 of the absolute value, as in the paper's Figure 3.

    Args:
        counts: of :func:`lightning_stosign.health.log10_histogram`.
        zeros: the share of its values that are 0, which have no logarithm.
        name: of the state.

    Source:
        arXiv 2604.15416, Figure 3.
    """
    edges = log10_bin_edges().tolist()
    filled = [i for i, count in enumerate(counts) if count > 0]
    first, last = (min(filled), max(filled)) if filled else (len(edges) // 2 - 8, len(edges) // 2 + 8)
    low, high = math.floor(max(edges[first], edges[last] - 40)), math.ceil(edges[last + 1])
    total = max(sum(counts), 1)
    shares = [count / total * (1 - zeros) for count in counts]
    top = max([*shares, 1e-9])
    left, bottom, height = 48, 130, 100

    def x(value: float) -> float:
        return left + (value - low) / max(high - low, 1) * (_WIDTH - left - 12)

    bars = []
    for i, share in enumerate(shares):
        if share > 0 and edges[i + 1] > low:
            begin, end, tall = x(max(edges[i], low)), x(edges[i + 1]), share / top * height
            box = f'x="{begin:.1f}" width="{max(end - begin, 0.5):.1f}" y="{bottom - tall:.1f}" height="{tall:.1f}"'
            bars.append(f'<rect class="bar" {box}/>')
    step = max((high - low) // 8, 1)
    ticks = [
        f'<text class="tick" x="{x(value):.1f}" y="{bottom + 14}" text-anchor="middle">{value}</text>'
        for value in range(low, high + 1, step)
    ]
    mark = ""
    if low <= _SMALLEST_E4M3 <= high:
        place = x(_SMALLEST_E4M3)
        mark = (
            f'<line class="mark" x1="{place:.1f}" x2="{place:.1f}" y1="{bottom - height}" y2="{bottom}"/>'
            f'<text class="tick" x="{place + 3:.1f}" y="{bottom - height + 8}">E4M3\'s smallest, no scale</text>'
        )
    caption = f"{name}: {zeros:.1%} is 0"
    return _svg(
        165,
        caption,
        [
            f'<text class="name" x="{left}" y="16">{escape(caption)}</text>',
            *bars,
            f'<line class="axis" x1="{left}" x2="{_WIDTH - 12}" y1="{bottom}" y2="{bottom}"/>',
            f'<text class="tick" x="{left - 6}" y="{bottom - height + 6}" text-anchor="end">{top:.1%}</text>',
            *ticks,
            mark,
            f'<text class="tick" x="{_WIDTH / 2}" y="{bottom + 30}" text-anchor="middle">log10 of the magnitude</text>',
        ],
    )


def heat_map(shares: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str], title: str) -> str:
    """Draw shares by row and column.

    Args:
        shares: in [0, 1], by row; None where there is none.
        rows: names of the layers, from top to bottom.
        columns: names of the columns.
        title: what the shares are of.
    """
    together = -(-len(rows) // _MOST_ROWS) or 1
    bands = [range(start, min(start + together, len(rows))) for start in range(0, len(rows), together)]
    cell = min(max(600 // max(len(bands), 1), 6), 18)
    left, top = 200, 120
    width = (_WIDTH - left - 8) / max(len(columns), 1)
    parts = [f'<text class="name" x="4" y="16">{escape(title)}</text>']
    for number, name in enumerate(columns):
        turned = f'transform="translate({left + (number + 0.5) * width:.1f} {top - 6}) rotate(-35)"'
        parts.append(f'<text class="tick" {turned}>{escape(_short(name, 24))}</text>')
    every = max(-(-9 // cell), 1)
    for place, band in enumerate(bands):
        y = top + place * cell
        if place % every == 0:
            text = _short(rows[band[0]], 32) + (" ..." if len(band) > 1 else "")
            middle = y + cell * 0.5 + 3
            parts.append(f'<text class="tick" x="{left - 4}" y="{middle:.1f}" text-anchor="end">{escape(text)}</text>')
        for number, column in enumerate(columns):
            found = [value for i in band if (value := shares[i][number]) is not None]
            where = f'x="{left + number * width:.1f}" y="{y}" width="{width - 1:.1f}" height="{cell - (cell > 8)}"'
            if not found:
                parts.append(f'<rect class="none" {where}/>')
                continue
            label = escape(f"{rows[band[0]][:80]}, {column[:80]}: {max(found):.1%}")
            parts.append(f'<rect class="heat" {where} fill-opacity="{max(found):.3f}"><title>{label}</title></rect>')
    return _svg(top + len(bands) * cell + 8, title, parts)


def lines(series: Mapping[str, Sequence[float | None]], places: Sequence[float], title: str, log: bool = False) -> str:
    """Draw numbers over the steps of a run.

    Args:
        series: by name the numbers; None where there is none.
        places: the steps.
        title: what the numbers are.
        log: draw their logarithms.
    """

    def scaled(value: float | None) -> float | None:
        if value is None or not math.isfinite(value) or (log and value <= 0):
            return None
        return math.log10(value) if log else value

    drawn = {name: [scaled(value) for value in values] for name, values in series.items()}
    every = [value for values in drawn.values() for value in values if value is not None]
    low, high = (min(every), max(every)) if every else (0.0, 1.0)
    if not log:
        low, high = 0.0, max(high, 1e-3)
    elif high - low < 1:
        low, high = low - 0.5, high + 0.5
    left, right, bottom, height = 64, 16, 170, 140
    first, last = min(places, default=0), max(places, default=1)

    def x(place: float) -> float:
        return left + (place - first) / max(last - first, 1e-9) * (_WIDTH - left - right) if last > first else left

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * height

    def shown(value: float) -> str:
        return f"1e{value:.1f}" if log else f"{value:.1%}"

    parts = [f'<text class="name" x="4" y="16">{escape(title)}</text>']
    parts += [
        f'<text class="tick" x="{left - 6}" y="{y(value) + 3:.1f}" text-anchor="end">{shown(value)}</text>'
        for value in (low, high)
    ]
    parts.append(f'<path class="axis" d="M{left} {bottom - height}V{bottom}H{_WIDTH - right}"/>')
    for place in dict.fromkeys((first, last)):
        parts.append(f'<text class="tick" x="{x(place):.1f}" y="{bottom + 14}" text-anchor="middle">{place:g}</text>')
    for number, (name, values) in enumerate(drawn.items()):
        colour = f"c{number % _COLOURS}"
        points = [(x(place), y(value)) for place, value in zip(places, values, strict=True) if value is not None]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline class="line {colour}" points="{path}"/>')
        parts += [f'<circle class="dot {colour}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in points]
        row = bottom + 32 + 16 * number
        parts.append(f'<circle class="dot {colour}" cx="{left + 4}" cy="{row - 4}" r="4"/>')
        parts.append(f'<text class="tick" x="{left + 14}" y="{row}">{escape(_short(name, 90))}</text>')
    return _svg(bottom + 36 + 16 * len(drawn), title, parts)


def _svg(height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {_WIDTH} {height:.0f}" '
        f'preserveAspectRatio="xMinYMin meet">{"".join(parts)}</svg>'
    )


def _short(text: str, most: int) -> str:
    """Return the end of a long name, which tells layers apart."""
    return text if len(text) <= most else "…" + text[-most + 1 :]
