"""Small models, fits on the CPU, and what their event files say."""

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_stosign import SignSGD, StoSignSGD

OPTIMIZERS = {
    "stosign": lambda params: StoSignSGD(params, lr=0.01, weight_decay=0.1),
    "stosign-fp8": lambda params: StoSignSGD(params, lr=0.01, weight_decay=0.1, state_precision="fp8:min_numel=0"),
    "in-expectation": lambda params: StoSignSGD(params, lr=0.01, stochastic=False),
    "signsgd": lambda params: SignSGD(params, lr=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "plain-sgd": lambda params: torch.optim.SGD(params, lr=0.01),
    "lbfgs": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=4),
    "adafactor": lambda params: torch.optim.Adafactor(params),
}


class Regression(pl.LightningModule):
    """Two layers with dropout between them; the third input is always 0, so its weights get no gradient."""

    def __init__(self, optimizer="stosign", scale=lambda step: 1.0):
        super().__init__()
        torch.manual_seed(1)
        self.optimizer_name, self.scale = optimizer, scale
        self.first = nn.Linear(3, 8)
        self.drop = nn.Dropout(0.25)
        self.head = nn.Linear(8, 1)

    def loss(self, batch):
        (x,) = batch
        return self.head(self.drop(self.first(x).tanh())).sub(x.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss * self.scale(self.global_step)

    def configure_optimizers(self):
        return OPTIMIZERS[self.optimizer_name](self.parameters())

    def train_dataloader(self):
        inputs = torch.randn(64, 3, generator=torch.Generator().manual_seed(2))
        inputs[:, 2] = 0
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs), batch_size=4)


def trainer(folder=None, **options):
    options.setdefault("logger", TensorBoardLogger(folder, name="", version="") if folder is not None else False)
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 4,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**{**settings, **options})


def fit(module, folder=None, ckpt_path=None, seed=0, **options):
    """Train and return the trainer."""
    torch.manual_seed(seed)
    run = trainer(folder, **options)
    run.fit(module, ckpt_path=ckpt_path)
    return run


def events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


def scalars(folder):
    """Return {tag: {step: value}}."""
    accumulator = events(folder)
    return {tag: {e.step: e.value for e in accumulator.Scalars(tag)} for tag in accumulator.Tags()["scalars"]}


def histograms(folder):
    """Return {tag: {step: histogram}}."""
    accumulator = events(folder)
    return {
        tag: {e.step: e.histogram_value for e in accumulator.Histograms(tag)}
        for tag in accumulator.Tags()["histograms"]
    }


class Step(pl.Callback):
    """Keeps the numpy values around one optimizer step: gradients before clipping, parameters, states."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.before = {n: p.detach().double().numpy().copy() for n, p in pl_module.named_parameters()}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            self.grads = {n: p.grad.double().numpy().copy() for n, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step + 1:
            (optimizer,) = trainer.optimizers
            self.clipped = {n: p.grad.double().numpy().copy() for n, p in pl_module.named_parameters()}
            self.after = {n: p.detach().double().numpy().copy() for n, p in pl_module.named_parameters()}
            self.states = {
                n: {k: v.double().numpy().copy() for k, v in optimizer.state[p].items() if torch.is_tensor(v)}
                for n, p in pl_module.named_parameters()
            }

    def flat(self, state):
        """All layers' values of a state."""
        return np.concatenate([layer[state].reshape(-1) for layer in self.states.values()])
