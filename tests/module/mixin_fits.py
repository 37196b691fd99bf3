"""A small model with StoSignMixin, and its fits."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_stosign import StoSignConfig, StoSignMixin

NAMES = ["stosign", "signsgd", "adamw", "lion", "muon", "muon-sign", "sign-adamw", "sign-adamax", "alias"]


class Model(StoSignMixin, pl.LightningModule):
    """A small regression that takes its config as an argument."""

    def __init__(self, stosign: StoSignConfig = StoSignConfig()):  # noqa: B008 - immutable
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.stosign = stosign
        self.first = nn.Linear(3, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 1)
        self.lrs = []

    def training_step(self, batch, batch_idx):
        return self.head(self.norm(self.first(batch))).square().mean()

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        self.lrs.append([group["lr"] for group in optimizer.param_groups])
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def train_dataloader(self):
        return DataLoader(torch.randn(32, 3, generator=torch.Generator().manual_seed(1)), batch_size=4)


def trainer(**options):
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**settings, **options})


def fit(config, ckpt_path=None, **options):
    model, run = Model(config), trainer(**options)
    run.fit(model, ckpt_path=ckpt_path)
    return model, run
