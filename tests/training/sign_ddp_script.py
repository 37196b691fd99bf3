"""Trains with sign_ddp on two gloo processes: python sign_ddp_script.py NAME_OF_LIGHTNING FILE."""

import importlib
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_stosign as ours

if __name__ == "__main__":
    name, path = sys.argv[1:]
    pl = importlib.import_module(name)

    class Net(ours.StoSignMixin, pl.LightningModule):
        """Clips what the strategy has averaged."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

        def training_step(self, batch, index):
            return (self.layers(batch[0]) - batch[0].roll(1, 1)).square().mean()

    inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ours.SignDDPStrategy(aggregation="mean"),
        plugins=[ours.Float8Precision()],
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Net()
    trainer.fit(model, DataLoader(TensorDataset(inputs), batch_size=8))
    if trainer.is_global_zero:
        torch.save(model.state_dict(), path)
