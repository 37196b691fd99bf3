"""Lightning callbacks that watch an optimizer's state, and act on it."""

from lightning_stosign.callbacks.collapse_guard import StateCollapseError, StateCollapseGuard
from lightning_stosign.callbacks.state_monitor import OptimizerStateMonitor

__all__ = ["OptimizerStateMonitor", "StateCollapseError", "StateCollapseGuard"]
