"""Optimizers that survive low precision, and the instruments that show when one does not."""

from typing import TYPE_CHECKING

from lightning_stosign._lazy import LazyPackage, after_import

if TYPE_CHECKING:
    from lightning_stosign.atomic_checkpoint import AtomicCheckpointIO
    from lightning_stosign.callbacks import (
        Float8Monitor,
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
        MuonSign,
        OnlineToNonconvex,
        SignConverted,
        SignSGD,
        StatePrecision,
        StoSignSGD,
        emulate_state_precision,
        promote_state,
        resume_with,
        state_bytes,
    )
    from lightning_stosign.precision import Float8Precision
    from lightning_stosign.state_logger import OptimizerStateLogger
    from lightning_stosign.strategies import SignDDPStrategy
    from lightning_stosign.trainer_callback import OptimizerStateCallback

__version__ = "0.1.0"

__all__ = [
    "ALIAS",
    "AtomicCheckpointIO",
    "Float8Monitor",
    "Float8Precision",
    "MuonSign",
    "OnlineToNonconvex",
    "OptimizerDashboard",
    "OptimizerStateCallback",
    "OptimizerStateLogger",
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
    "resume_with",
    "state_bytes",
]

# A name is looked up when it is used: the optimizers and the command line need no Lightning. Once Lightning is imported
# everything is, whichever comes first: Trainer(strategy="sign_ddp") and LightningCLI go by what is there.
_lazy = LazyPackage(
    __name__,
    __all__,
    {
        "atomic_checkpoint": ["AtomicCheckpointIO"],
        "callbacks": [
            "Float8Monitor",
            "OptimizerDashboard",
            "OptimizerStateMonitor",
            "SignStepSizeFinder",
            "StateCollapseError",
            "StateCollapseGuard",
            "find_step_size",
        ],
        "health": [],
        "inspection": [],
        "module": ["StoSignConfig", "StoSignMixin"],
        "optim": [
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
        ],
        "precision": ["Float8Precision"],
        "state_logger": ["OptimizerStateLogger"],
        "strategies": ["SignDDPStrategy"],
        "trainer_callback": ["OptimizerStateCallback"],
    },
    optional=["trainer_callback"],  # needs transformers
)
if not TYPE_CHECKING:  # a type checker would take any name for one of ours
    __getattr__, __dir__ = _lazy.get, _lazy.dir
for _name in ("lightning.pytorch", "pytorch_lightning"):
    after_import(_name, _lazy.load)
