"""Where code written before :mod:`lightning_stosign.optim.wrappers` imports MuonAdamW from."""

from lightning_stosign.optim.wrappers.muon_adamw import MuonAdamW

__all__ = ["MuonAdamW"]
