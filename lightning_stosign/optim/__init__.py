"""Optimizers that survive low precision."""

from lightning_stosign.optim.alias.alias import ALIAS
from lightning_stosign.optim.emulation import emulate_state_precision
from lightning_stosign.optim.promotion import promote_state
from lightning_stosign.optim.resuming import resume_with
from lightning_stosign.optim.signsgd import SignSGD
from lightning_stosign.optim.states.state_precision import StatePrecision
from lightning_stosign.optim.states.storage import state_bytes
from lightning_stosign.optim.stosign import StoSignSGD
from lightning_stosign.optim.wrappers.muon_sign import MuonSign
from lightning_stosign.optim.wrappers.online_to_nonconvex import OnlineToNonconvex
from lightning_stosign.optim.wrappers.sign_converted import SignConverted

__all__ = [
    "ALIAS",
    "MuonSign",
    "OnlineToNonconvex",
    "SignConverted",
    "SignSGD",
    "StatePrecision",
    "StoSignSGD",
    "emulate_state_precision",
    "promote_state",
    "resume_with",
    "state_bytes",
]
