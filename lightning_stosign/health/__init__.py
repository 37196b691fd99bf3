"""What the numbers of an optimizer's state mean."""

from lightning_stosign.health.forecast import (
    Share,
    check_format,
    nominal_change,
    stalled_fraction,
    stored_values,
    underflow_fraction,
)
from lightning_stosign.health.readers import Moments, UpdateRule, read_moments, register_update_rule
from lightning_stosign.health.stationarity import GeneralizedStationarity, L1Stationarity, generalized_stationarity
from lightning_stosign.health.statistics import (
    coordinate_health,
    log10_histogram,
    noise_intensity,
    state_statistics,
)

__all__ = [
    "GeneralizedStationarity",
    "L1Stationarity",
    "Moments",
    "Share",
    "UpdateRule",
    "check_format",
    "coordinate_health",
    "generalized_stationarity",
    "log10_histogram",
    "noise_intensity",
    "nominal_change",
    "read_moments",
    "register_update_rule",
    "stalled_fraction",
    "state_statistics",
    "stored_values",
    "underflow_fraction",
]
