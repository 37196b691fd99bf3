"""A GPT small enough to be trained several times in a minute, for examples that compare optimizers."""

import logging
import warnings

import torch
from gpt import GPTModule
from lightning.pytorch import Callback, Trainer
from text_data import TextDataModule
from torch.optim import Optimizer

from lightning_stosign import StoSignConfig

CONTEXT, BATCH = 64, 8


def train_small_gpt(config: StoSignConfig, steps: int, *callbacks: Callback) -> tuple[GPTModule, Optimizer]:
    """Train 0.8 M parameters on the source of Python's standard library.

    Args:
        config: optimizer and schedule.
        steps: optimizer steps, of 512 tokens each.
        callbacks: what looks on.

    Returns:
        The trained module, with its last `train_loss` in `trainer.callback_metrics`, and its optimizer.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    torch.manual_seed(0)
    module = GPTModule(size="1m", context=CONTEXT, stosign=config)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, TextDataModule(context=CONTEXT, batch_size=BATCH))
    return module, trainer.optimizers[0]


def kind_of(name: str) -> str:
    """Return what a parameter of the GPT is, by its name: "embedding", "attention", "MLP" or "norm"."""
    if ".ln" in name:
        return "norm"
    if ".qkv." in name or ".out." in name:
        return "attention"
    return "MLP" if ".up." in name or ".down." in name else "embedding"
