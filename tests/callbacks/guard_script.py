"""A guarded run that tests start as a process of its own; Lightning launches the other ranks.

python guard_script.py FOLDER STRATEGY DEVICES OPTIMIZER STEPS
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_stosign import StateCollapseGuard, StoSignSGD, emulate_state_precision


class Net(LightningModule):
    """Gradients so small that raw E4M3 loses them; the third input is always 0, so its weights stay sick for good."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.optimizer = optimizer
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(3, 7), nn.Linear(7, 1)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.first(x).tanh())

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        (x,) = batch
        return self(x).sub(x.sum(1, keepdim=True)).square().mean() * 1e-3

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "stosign":
            return StoSignSGD(self.parameters(), lr=0.01, state_precision="fp8-raw:min_numel=0")
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        emulate_state_precision(optimizer, "fp8-raw:min_numel=0")
        return optimizer


def main(folder: Path, strategy: Any, devices: int, optimizer: str, steps: int) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(
            data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(2))
    inputs[:, 2] = 0
    guard = StateCollapseGuard(
        0.1, patience=2, action="promote", max_exploding_fraction=1.0, per_layer=True, every_n_steps=1
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        callbacks=[guard],
        max_steps=steps,
        use_distributed_sampler=False,  # the same data on each rank, so that the mean gradient is a single rank's
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    net = Net(optimizer)
    trainer.fit(net, DataLoader(TensorDataset(inputs), batch_size=8))
    weights = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach()
        for name, value in net.named_parameters()
    }
    torch.save({"weights": weights, "guard": guard.state_dict()}, folder / f"rank{trainer.global_rank}.pt")
    if torch.distributed.is_initialized():
        # Lightning leaves gloo's group to the interpreter's end, where its threads now and then abort the process.
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
