"""Lightning callbacks that watch an optimizer's state, and act on it."""

from lightning_stosign.callbacks.collapse_guard import StateCollapseError, StateCollapseGuard
from lightning_stosign.callbacks.dashboard import OptimizerDashboard
from lightning_stosign.callbacks.float8_monitor import Float8Monitor
from lightning_stosign.callbacks.state_monitor import OptimizerStateMonitor
from lightning_stosign.callbacks.step_size_finder import SignStepSizeFinder, find_step_size

__all__ = [
    "Float8Monitor",
    "OptimizerDashboard",
    "OptimizerStateMonitor",
    "SignStepSizeFinder",
    "StateCollapseError",
    "StateCollapseGuard",
    "find_step_size",
]
