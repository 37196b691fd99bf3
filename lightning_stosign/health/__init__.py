"""What the numbers of an optimizer's state mean."""

from lightning_stosign.health.readers import Moments, UpdateRule, read_moments, register_update_rule
from lightning_stosign.health.statistics import (
    coordinate_health,
    log10_histogram,
    noise_intensity,
    state_statistics,
    underflow_fraction,
)

__all__ = [
    "Moments",
    "UpdateRule",
    "coordinate_health",
    "log10_histogram",
    "noise_intensity",
    "read_moments",
    "register_update_rule",
    "state_statistics",
    "underflow_fraction",
]
