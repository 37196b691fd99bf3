"""Strategies for the Trainer; importing this registers ``strategy="sign_ddp"`` and its variants."""

import sys
from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from lightning_stosign._lazy import after_import
from lightning_stosign.strategies.sign_ddp import SignDDPStrategy

_ABOUT = "DDP that sends one bit per gradient coordinate"


def _register(registry: Any) -> None:
    registry.register("sign_ddp", SignDDPStrategy, _ABOUT)
    registry.register("sign_ddp_majority", SignDDPStrategy, _ABOUT, aggregation="majority")
    registry.register("sign_ddp_mean", SignDDPStrategy, _ABOUT, aggregation="mean")
    # Without an argument, LightningCLI takes --trainer.strategy=lightning_stosign.SignDDPStrategy for a name.
    for name in ("SignDDPStrategy", "lightning_stosign.SignDDPStrategy"):
        registry.register(name.lower(), SignDDPStrategy, _ABOUT)


_register(StrategyRegistry)
after_import("pytorch_lightning", lambda: _register(sys.modules["pytorch_lightning"].strategies.StrategyRegistry))

__all__ = ["SignDDPStrategy"]
