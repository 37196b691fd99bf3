"""A monitored run, in one process or in two that shard or replicate the model, which see the same data.

python sharded_script.py FOLDER STRATEGY    (STRATEGY: single, ddp, fsdp2)
"""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_stosign import OptimizerStateMonitor
from lightning_stosign.health import (
    AbsMax,
    DeadFraction,
    LogMagnitudeHistogram,
    LogMagnitudeQuantile,
    RootMeanSquare,
    StalledFraction,
    UnderflowFraction,
    ZeroFraction,
)

FORMATS = ("fp8", "fp8-raw", "fp8-block", "fp8-block:dtype=float8_e5m2,block_size=77", "bfloat16", "fp4-block")


class Net(LightningModule):
    """Layers whose rows two processes share unevenly, so that blocks of 16, 77 and 128 values are cut."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(60, 101), nn.Tanh(), nn.Linear(101, 67), nn.LayerNorm(67), nn.Linear(67, 1)
        )

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for layer in self.layers:
                if list(layer.parameters()):
                    fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.layers(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)

    def train_dataloader(self):
        batches = torch.randn(3, 8, 60, generator=torch.Generator().manual_seed(1)) * torch.logspace(-5, 0, 60)
        batches[:, :, ::7] = 0  # these columns of the first layer have no gradient
        return torch.utils.data.DataLoader(list(batches), batch_size=None)


class Metrics:
    """The torchmetrics, over all states of the optimizer."""

    def __init__(self):
        self.of_one = {
            "zeros": ZeroFraction(),
            "rms": RootMeanSquare(),
            "largest": AbsMax(),
            "histogram": LogMagnitudeHistogram(),
            "quantiles": LogMagnitudeQuantile([0.1, 0.5, 0.99]),
            **{name: UnderflowFraction(name) for name in FORMATS},
        }
        self.dead, self.stalled = DeadFraction(), StalledFraction("fp8-block")

    def compute(self, optimizer):
        for state in optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                for metric in self.of_one.values():
                    metric.update(state[name])
            self.stalled.update(state["exp_avg_sq"], state["exp_avg_sq"] * -0.05)
            self.dead.update(state["exp_avg"], state["exp_avg_sq"])
        metrics = {**self.of_one, "dead": self.dead, "stalled": self.stalled}
        return {name: metric.compute().tolist() for name, metric in metrics.items()}


def run(folder, strategy):
    """Train three steps; writes FOLDER/metrics.csv (the monitor's) and FOLDER/rank*.json (the torchmetrics')."""
    monitor = OptimizerStateMonitor(every_n_steps=1, forecast=FORMATS)
    trainer = Trainer(
        max_steps=3,
        accelerator="cpu",
        devices=1 if strategy == "single" else 2,
        strategy={
            "single": "auto",
            "ddp": "ddp",
            "fsdp2": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        }[strategy],
        use_distributed_sampler=False,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net())
    if strategy == "fsdp2":
        assert trainer.model.layers[0].weight.to_local().shape[0] < 101
    computed = Metrics().compute(trainer.optimizers[0])
    Path(folder, f"rank{trainer.global_rank}.json").write_text(json.dumps(computed))
    if strategy != "single":
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(*sys.argv[1:])
