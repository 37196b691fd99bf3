"""Figures of optimizer states: which layers lose their values, and how large what is left of them is."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_stosign.health.magnitudes import log10_bin_edges

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_LABELS = 60  # that a heat map's side has room for


def require_matplotlib() -> None:
    """Raise ModuleNotFoundError, with the command that mends it, unless matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'lightning-stosign[dashboard]'") from error


def heat_map(
    shares: np.ndarray[Any, Any], rows: Sequence[str], columns: Sequence[str], title: str, xlabel: str = ""
) -> Figure:
    """Draw shares by row and column.

    Args:
        shares: in [0, 1], ``[len(rows), len(columns)]``; NaN where there is none.
        rows: names of the layers, from top to bottom.
        columns: names of the columns.
        title: what the shares are of.
        xlabel: what the columns are.
    """
    height = min(max(0.16 * min(len(rows), _MOST_LABELS) + 1.6, 2.5), 12)
    figure = _new_figure(8, height)
    axes = figure.subplots()
    image = axes.imshow(shares, aspect="auto", interpolation="nearest", vmin=0, vmax=1, cmap="magma_r")
    axes.set_facecolor("0.85")
    _label(axes.yaxis, rows, _MOST_LABELS)
    _label(axes.xaxis, columns, 12)
    if max(map(len, columns), default=0) > 8:
        for label in axes.get_xticklabels():
            label.set(rotation=30, ha="right", rotation_mode="anchor")
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(xlabel)
    figure.colorbar(image, ax=axes, format=lambda share, _: f"{share:.0%}", fraction=0.04, pad=0.02)
    return figure


def magnitudes(counts: Mapping[str, Sequence[float]], zeros: Mapping[str, float], title: str) -> Figure:
    """Draw how the magnitudes of states are distributed: log10 of the absolute value, as in the paper's Figure 3.

    Args:
        counts: for each state the histogram of :func:`lightning_stosign.health.log10_histogram`.
        zeros: for each state the share of its values that are 0, which a histogram of logarithms leaves out.
        title: of the figure.

    Source:
        arXiv 2604.15416, Figure 3.
    """
    figure = _new_figure(8, 1.2 + 1.6 * max(len(counts), 1))
    panels = figure.subplots(max(len(counts), 1), 1, sharex=True, squeeze=False)[:, 0]
    edges = log10_bin_edges().numpy()
    filled = [i for column in counts.values() for i, count in enumerate(column) if count > 0] or [0, len(edges) - 2]
    first, last = min(filled), max(filled) + 1
    for axes, (name, column) in zip(panels, counts.items(), strict=False):
        used = np.asarray(column[first:last], dtype=np.float64)
        share = used / max(used.sum(), 1) * (1 - zeros[name])
        axes.stairs(share, edges[first : last + 1], fill=True, color="tab:blue")
        axes.set_title(f"{_plain(name)}: {zeros[name]:.1%} is 0", fontsize="small", loc="left", parse_math=False)
        axes.set_ylabel("share")
        axes.axvline(_SMALLEST_E4M3, color="tab:red", ls="--", lw=0.8, label="E4M3's smallest number, no scale")
    panels[0].legend(fontsize="x-small", loc="upper left")
    panels[-1].set_xlabel("log10 of the magnitude")
    figure.suptitle(title, fontsize="medium")
    return figure


_SMALLEST_E4M3 = float(np.log10(2.0**-9))


def as_pixels(figure: Figure) -> np.ndarray[Any, Any]:
    """Return a figure as RGB pixels, uint8, ``[height, width, 3]``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def as_svg(figure: Figure) -> str:
    """Return a figure as an SVG document."""
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()


def _new_figure(width: float, height: float) -> Figure:
    require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot, which would keep the figure and choose a window system

    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def _label(axis: Any, names: Sequence[str], most: int) -> None:
    """Label a side of a heat map, with at most so many of the names."""
    every = -(-len(names) // most) or 1
    axis.set_ticks(range(0, len(names), every), [_plain(name) for name in names[::every]], parse_math=False)
    axis.set_tick_params(labelsize=7)


def _plain(name: str) -> str:
    """Return a name that every font has: others draw as boxes, with a warning each."""
    return name.encode("ascii", "backslashreplace").decode("ascii")
