"""How a state's magnitudes are distributed: histogram and quantiles of log10, from one count of bit patterns.

The bits of a float32 without its sign are ordered as the magnitudes are, so that their upper half is a bin with a
relative width of 2**-7: the number that bfloat16 truncates to. Counting these is one cheap pass; histograms and
quantiles, of one layer or of many, follow from the counts.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lightning_stosign.health.statistics import count, in_parts

MAGNITUDE_BINS = 0x7F80  # the patterns below infinity's

# The histograms' quarter decades, and one bin for what is smaller: subnormal numbers that share a pattern with 0.
_FIRST_EDGE, _LAST_EDGE = -39.75, 38.75


def magnitude_counts(value: Tensor, zeros: Tensor | None = None) -> Tensor:
    """Count the nonzero finite magnitudes by the upper 16 bits of their float32 patterns.

    Args:
        value: float32 or wider, any shape.
        zeros: how many entries are 0, if that is known; 0-dimensional.

    Returns:
        int64, ``[MAGNITUDE_BINS]``: entry ``i`` counts the magnitudes from ``magnitude_of_bin(i)`` up to the next.

    Example:
        >>> counts = magnitude_counts(torch.tensor([0.0, 1.0, -1.0, 3.0]))
        >>> counts.nonzero().flatten().tolist(), counts.max().item()
        ([16256, 16448], 2)
    """
    counts = torch.zeros(1 << 15, dtype=torch.int64, device=value.device)
    one = counts.new_ones(())
    if zeros is None:
        zeros = value.numel() - count(value)
    for (part,) in in_parts(value):
        bits = part.float().view(torch.int32)
        pattern = bits.bitwise_and(0x7FFFFFFF).bitwise_right_shift_(16)
        counts.index_add_(0, pattern, one.expand_as(pattern))
    counts[0] -= zeros.long()
    return counts[:MAGNITUDE_BINS]


def add_magnitude_counts(counts: Tensor, rows: Tensor, places: Tensor, zeros: Tensor) -> None:
    """Add :func:`magnitude_counts` of each row to a row of counts; several may share one.

    Args:
        counts: int32 or int64, contiguous, ``[places, MAGNITUDE_BINS]``; changed in place.
        rows: float32, ``[rows, numel]``.
        places: int64, ``[rows]``: which row of the counts each is added to.
        zeros: how many entries of each row are 0, ``[rows]``.
    """
    pattern = rows.view(torch.int32).bitwise_and(0x7FFFFFFF).bitwise_right_shift_(16).long()
    is_finite = (pattern < MAGNITUDE_BINS).to(counts.dtype)
    pattern = pattern.clamp_(max=MAGNITUDE_BINS - 1).add_((places * MAGNITUDE_BINS).unsqueeze(1))
    counts.view(-1).index_add_(0, pattern.view(-1), is_finite.view(-1))
    counts[:, 0].index_add_(0, places, -zeros.to(counts.dtype))


def magnitude_of_bin(index: Tensor) -> Tensor:
    """Return the smallest magnitude of a bin, float32; of bin 0, which has only subnormal numbers, 2**-149.

    Args:
        index: int64, any shape.
    """
    magnitude = index.to(torch.int32).bitwise_left_shift(16).view(torch.float32)
    return magnitude.clamp(min=2.0**-149)


def log10_quantiles(counts: Tensor, quantiles: Sequence[float]) -> Tensor:
    """Return quantiles of log10 of the nonzero magnitudes, to within the width of a bin, 0.003.

    Args:
        counts: of :func:`magnitude_counts`; they add up over layers and ranks.
        quantiles: each in [0, 1].

    Returns:
        float64, ``[len(quantiles)]``: log10 of the smallest bin's lower end at which the share of the magnitudes
        in this bin and those below reaches the quantile; NaN where all are 0.

    Example:
        >>> log10_quantiles(magnitude_counts(torch.tensor([0.0, 1e-3, 1.0, 1.0, 1.0])), [0.0, 0.5])
        tensor([-3.0002,  0.0000], dtype=torch.float64)
    """
    return quantiles_of_cumulative(counts.cumsum(0), quantiles)


def quantiles_of_cumulative(cumulative: Tensor, quantiles: Sequence[float]) -> Tensor:
    """Return :func:`log10_quantiles` from the cumulative sum of the counts, ``[..., MAGNITUDE_BINS]``."""
    total = cumulative[..., -1:]
    wanted = (torch.tensor(list(quantiles), dtype=torch.float64, device=total.device) * total).ceil().clamp(min=1.0)
    index = torch.searchsorted(cumulative, wanted.to(cumulative.dtype)).clamp(max=MAGNITUDE_BINS - 1)
    return torch.where(total > 0, magnitude_of_bin(index).double().log10(), torch.nan)


def log10_histogram(value: Tensor) -> Tensor:
    """Count the nonzero magnitudes by their log10.

    Args:
        value: float32 or wider, any shape.

    Returns:
        Counts, int64: entry ``i`` is of the magnitudes between the edges ``i`` and ``i + 1`` of
        :func:`log10_bin_edges`. NaN and inf are left out.

    Source:
        arXiv 2604.15416, Figure 3.

    Example:
        >>> counts = log10_histogram(torch.tensor([0.0, 1.1, -1.1, 1e-3]))
        >>> int(counts.sum()), int(counts.max())
        (3, 2)
    """
    return histogram_of(magnitude_counts(value))


def histogram_of(counts: Tensor) -> Tensor:
    """Return the histogram of :func:`log10_histogram` from :func:`magnitude_counts`."""
    return histogram_of_cumulative(counts.cumsum(0))


def histogram_of_cumulative(cumulative: Tensor) -> Tensor:
    """Return :func:`histogram_of` from the cumulative sum of the counts, ``[..., MAGNITUDE_BINS]``."""
    below = cumulative.index_select(-1, _edge_bins(cumulative.device)[1:] - 1)
    return torch.cat([below[..., :1], below[..., 1:] - below[..., :-1]], dim=-1)


def log10_bin_edges() -> Tensor:
    """Return the edges of :func:`log10_histogram`'s bins, float64.

    They are a quarter of a decade apart, each rounded down to a number that bfloat16 has, from 10**-39.75 on; the first
    bin holds all that is smaller.
    """
    edges = magnitude_of_bin(_edge_bins(torch.device("cpu"))).double().log10()
    edges[-1] = math.log10(torch.finfo(torch.float32).max)
    return edges


@lru_cache(maxsize=8)
def _edge_bins(device: torch.device) -> Tensor:
    """Return the magnitude bins at which the histogram's bins begin, and the end of the last."""
    decades = torch.arange(_FIRST_EDGE, _LAST_EDGE, 0.25, dtype=torch.float64, device="cpu")
    bins = (10.0**decades).float().view(torch.int32).bitwise_right_shift(16).long()
    return torch.cat([bins.new_tensor([0]), bins, bins.new_tensor([MAGNITUDE_BINS])]).to(device)
