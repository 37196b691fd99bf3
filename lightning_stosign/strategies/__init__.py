"""Strategies for the Trainer; importing this registers ``strategy="sign_ddp"`` and its variants."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_stosign.strategies.sign_ddp import SignDDPStrategy

_ABOUT = "DDP that sends one bit per gradient coordinate"
StrategyRegistry.register("sign_ddp", SignDDPStrategy, _ABOUT)
StrategyRegistry.register("sign_ddp_majority", SignDDPStrategy, _ABOUT, aggregation="majority")
StrategyRegistry.register("sign_ddp_mean", SignDDPStrategy, _ABOUT, aggregation="mean")

__all__ = ["SignDDPStrategy"]
