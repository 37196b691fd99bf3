"""What the numbers of an optimizer's state mean."""

from typing import TYPE_CHECKING

from lightning_stosign._lazy import LazyPackage
from lightning_stosign.health.changes import nominal_change
from lightning_stosign.health.forecast import (
    Share,
    check_format,
    stalled_fraction,
    stored_values,
    underflow_fraction,
)
from lightning_stosign.health.magnitudes import log10_bin_edges, log10_histogram, log10_quantiles, magnitude_counts
from lightning_stosign.health.readers import Moments, read_moments
from lightning_stosign.health.rules import UpdateRule, register_update_rule
from lightning_stosign.health.statistics import coordinate_health, noise_intensity, state_statistics

if TYPE_CHECKING:
    from lightning_stosign.health.metrics import (
        AbsMax,
        DeadFraction,
        ExplodingFraction,
        LogMagnitudeHistogram,
        LogMagnitudeQuantile,
        RootMeanSquare,
        StalledFraction,
        UnderflowFraction,
        ZeroFraction,
    )
    from lightning_stosign.health.stationarity import GeneralizedStationarity, L1Stationarity, generalized_stationarity

__all__ = [
    "AbsMax",
    "DeadFraction",
    "ExplodingFraction",
    "GeneralizedStationarity",
    "L1Stationarity",
    "LogMagnitudeHistogram",
    "LogMagnitudeQuantile",
    "Moments",
    "RootMeanSquare",
    "Share",
    "StalledFraction",
    "UnderflowFraction",
    "UpdateRule",
    "ZeroFraction",
    "check_format",
    "coordinate_health",
    "generalized_stationarity",
    "log10_bin_edges",
    "log10_histogram",
    "log10_quantiles",
    "magnitude_counts",
    "noise_intensity",
    "nominal_change",
    "read_moments",
    "register_update_rule",
    "stalled_fraction",
    "state_statistics",
    "stored_values",
    "underflow_fraction",
]

# torchmetrics, which takes longer to import than torch, is for the metrics alone.
_lazy = LazyPackage(
    __name__,
    __all__,
    {
        "metrics": [
            "AbsMax",
            "DeadFraction",
            "ExplodingFraction",
            "LogMagnitudeHistogram",
            "LogMagnitudeQuantile",
            "RootMeanSquare",
            "StalledFraction",
            "UnderflowFraction",
            "ZeroFraction",
        ],
        "stationarity": ["GeneralizedStationarity", "L1Stationarity", "generalized_stationarity"],
    },
)
if not TYPE_CHECKING:  # a type checker would take any name for one of ours
    __getattr__, __dir__ = _lazy.get, _lazy.dir
