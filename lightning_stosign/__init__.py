"""Optimizers that survive low precision, and the instruments that show when one does not."""

from lightning_stosign.optim import SignSGD, StatePrecision, StoSignSGD, emulate_state_precision

__all__ = ["SignSGD", "StatePrecision", "StoSignSGD", "emulate_state_precision"]
