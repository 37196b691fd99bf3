"""Modules whose optimizer states collapse, on command or by themselves, a run of them, and what the guard reports."""

import math
import warnings

import lightning.pytorch as pl
import torch
from fits import Regression, fit
from torch import nn

from lightning_stosign import SignSGD, StoSignSGD, emulate_state_precision

NAN, INF = float("nan"), float("inf")
HEALTHY, DYING = 0.0, 0.6


class Scripted(pl.LightningModule):
    """Ten weights ``x``, thirty weights ``y``, under AdamW, whose states get a share of zeros prescribed by step.

    A step of the script is the share (or a NaN or inf, which becomes the first entry), or {parameter: share}; it is
    given to each of ``states``, the same entries, and the other entries are 1. With a precision the states are emulated
    in it, before the script.
    """

    def __init__(self, *script, states=("exp_avg", "exp_avg_sq"), precision=None):
        super().__init__()
        self.script, self.states, self.precision = script, states, precision
        self.x, self.y = nn.Parameter(torch.ones(10)), nn.Parameter(torch.ones(30))

    def training_step(self, batch, batch_idx):
        return self.x.square().sum() + self.y.square().sum()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-12)
        if self.precision is not None:
            emulate_state_precision(optimizer, self.precision)
        optimizer.register_step_post_hook(self.follow_script)
        return optimizer

    def follow_script(self, optimizer, args, kwargs):
        shares = self.script[self.trainer.global_step]
        for name, param in self.named_parameters():
            share = shares.get(name, HEALTHY) if isinstance(shares, dict) else shares
            for state in self.states:
                value = optimizer.state[param][state].fill_(1.0)
                if math.isfinite(share):
                    value[: round(param.numel() * share)] = 0
                else:
                    value[0] = share

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(64))


def run(script, guard, **options):
    """Train through the script and return the trainer and the guard's warnings."""
    module = script if isinstance(script, pl.LightningModule) else Scripted(*script)
    options.setdefault("max_steps", len(module.script))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(module, callbacks=[guard, *options.pop("callbacks", [])], **options)
    return trainer, [str(w.message) for w in caught if "has collapsed" in str(w.message)]


class Underflowing(Regression):
    """Its gradients are so small that raw E4M3 states lose some of them, and AdamW's squares of them nearly all."""

    def __init__(self, optimizer="adamw", precision="fp8-raw", scale=0.02):
        super().__init__(optimizer, scale=lambda step: scale)
        self.precision = f"{precision}:min_numel=0"

    def configure_optimizers(self):
        if self.optimizer_name == "adamw":
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            emulate_state_precision(optimizer, self.precision)
            return optimizer
        cls = {"stosign": StoSignSGD, "signsgd": SignSGD}[self.optimizer_name]
        return cls(self.parameters(), lr=0.01, state_precision=self.precision)


def rows(report):
    """The report's table: {layer: {title: cell}}."""
    lines = [line for line in report.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(set(cell) == {"-"} for cell in cells[1])
    return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}
