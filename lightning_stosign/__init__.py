"""Optimizers that survive low precision, and the instruments that show when one does not."""

from lightning_stosign.callbacks import (
    OptimizerDashboard,
    OptimizerStateMonitor,
    SignStepSizeFinder,
    StateCollapseError,
    StateCollapseGuard,
    find_step_size,
)
from lightning_stosign.module import StoSignConfig, StoSignMixin
from lightning_stosign.optim import (
    ALIAS,
    OnlineToNonconvex,
    SignConverted,
    SignSGD,
    StatePrecision,
    StoSignSGD,
    emulate_state_precision,
    promote_state,
    state_bytes,
)
from lightning_stosign.precision import Float8Precision
from lightning_stosign.strategies import SignDDPStrategy

__all__ = [
    "ALIAS",
    "Float8Precision",
    "OnlineToNonconvex",
    "OptimizerDashboard",
    "OptimizerStateMonitor",
    "SignConverted",
    "SignDDPStrategy",
    "SignSGD",
    "SignStepSizeFinder",
    "StateCollapseError",
    "StateCollapseGuard",
    "StatePrecision",
    "StoSignConfig",
    "StoSignMixin",
    "StoSignSGD",
    "emulate_state_precision",
    "find_step_size",
    "promote_state",
    "state_bytes",
]
