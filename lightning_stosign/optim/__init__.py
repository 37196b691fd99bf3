"""Optimizers that survive low precision."""

from lightning_stosign.optim.alias import ALIAS
from lightning_stosign.optim.emulation import emulate_state_precision
from lightning_stosign.optim.online_to_nonconvex import OnlineToNonconvex
from lightning_stosign.optim.promotion import promote_state
from lightning_stosign.optim.sign_converted import SignConverted
from lightning_stosign.optim.signsgd import SignSGD
from lightning_stosign.optim.state_precision import StatePrecision
from lightning_stosign.optim.storage import state_bytes
from lightning_stosign.optim.stosign import StoSignSGD

__all__ = [
    "ALIAS",
    "OnlineToNonconvex",
    "SignConverted",
    "SignSGD",
    "StatePrecision",
    "StoSignSGD",
    "emulate_state_precision",
    "promote_state",
    "state_bytes",
]
