"""A training run that tests start as a process of its own, to kill it, or to have Lightning launch its replicas.

python train_script.py FOLDER [--devices N] [--die_after STEP] [--resume CHECKPOINT] [--optimizer NAME] [--precision P]
"""

import argparse
import os
import signal
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stosign import OnlineToNonconvex, StoSignConfig, StoSignMixin

STEPS, EVERY = 50, 20


class Net(StoSignMixin, LightningModule):
    """Small, but with what makes replicas differ if anything does: dropout and data of their own."""

    def __init__(self, stosign: StoSignConfig) -> None:
        super().__init__()
        self.stosign = stosign
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.2), nn.LayerNorm(32), nn.Linear(32, 4))
        self.losses: list[float] = []

    def on_train_batch_start(self, batch, batch_idx):
        # Dropout is a function of (step, rank): other on each rank, and again the same after a resume.
        torch.manual_seed(1000 * self.global_rank + self.global_step)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.layers(x), y)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


class OnlineNet(Net):
    """With the one optimizer that the config does not build."""

    def configure_optimizers(self):
        return OnlineToNonconvex(self.parameters(), lr=1e-2, radius=1e-2, window=10, seed=7)


class Die(Callback):
    """Ends the process as a power cut would, before Lightning can do anything about it."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.after:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--die_after", type=int, default=0)
    parser.add_argument("--resume")
    parser.add_argument("--optimizer", default="stosign")
    parser.add_argument("--precision", default="fp8:stochastic_rounding=true,min_numel=0")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    if args.optimizer == "online-to-nonconvex":
        net: Net = OnlineNet(StoSignConfig())
    else:
        net = Net(StoSignConfig(args.optimizer, lr=1e-2, warmup_steps=5, state_precision=args.precision))
    # One epoch a batch, in order: what a checkpoint in the middle of an epoch does to data is not what is tested here.
    data = TensorDataset(torch.randn(8 * args.devices, 16), torch.randint(0, 4, (8 * args.devices,)))
    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        default_root_dir=args.folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        callbacks=[
            ModelCheckpoint(args.folder, "{step}", every_n_train_steps=EVERY, save_top_k=-1),
            *([Die(args.die_after)] if args.die_after else []),
        ],
    )
    trainer.fit(net, DataLoader(data, batch_size=8), ckpt_path=args.resume, weights_only=True)
    torch.save({"weights": net.state_dict(), "losses": net.losses}, args.folder / f"rank{trainer.global_rank}.pt")
    if args.devices > 1:
        # Lightning leaves gloo's group to the interpreter's end, where its threads now and then abort the process.
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
