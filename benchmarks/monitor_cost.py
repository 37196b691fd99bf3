"""What OptimizerStateMonitor costs: steps that log, that do not, and without the monitor, in turn.

python benchmarks/monitor_cost.py                    # GPT of 10 M parameters: about a minute on 2 cores
python benchmarks/monitor_cost.py --size 1m
python benchmarks/monitor_cost.py --model forecaster # a forecasting transformer of 136 small tensors

Prints one table: the median time of a step of each kind, its ratio to the plain step of the same round, and what
logging every 50th step, the default, adds to the time of training (the step after it included, beside which a thread
writes the event); ratios as median, and smallest to largest over the
rounds. What it is to be: nothing between logged steps; at most 0.6% for training on the GPT of 10 M parameters, where a
logged step takes at most 1.3 times a plain one, and at most 1% and 2 times on the forecaster.
"""

import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from gpt import GPTModule
from text_data import TextDataModule

from lightning_stosign import OptimizerStateMonitor, StoSignConfig, StoSignMixin

PLAIN, WATCHED, LOGGED, AFTER = "plain", "watched, not logged", "logged", "after a logged one"
KINDS = (PLAIN, WATCHED, LOGGED, AFTER)
NEVER, EVERY, DEFAULT = 1 << 30, 1, 50


class Forecaster(StoSignMixin, LightningModule):
    """A transformer that predicts the next values of 16 series from their last 64: 136 tensors, 0.4 M parameters."""

    def __init__(self, stosign: StoSignConfig) -> None:
        super().__init__()
        self.stosign = stosign
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True)
        self.embed = nn.Linear(16, 64)
        self.encoder = nn.TransformerEncoder(layer, 11, enable_nested_tensor=False)
        self.head = nn.Linear(64, 16)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (series,) = batch
        return (self.head(self.encoder(self.embed(series[:, :-1]))) - series[:, 1:]).square().mean()

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(32 * 64, 65, 16).cumsum(1)), batch_size=32)


class Turns(Callback):
    """Gives each step its kind in turn, and takes its time."""

    def __init__(self, monitor: OptimizerStateMonitor) -> None:
        self.monitor = monitor
        self.seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.kind = KINDS[batch_idx % len(KINDS)]
        self.monitor.teardown(trainer, pl_module, "fit")
        if self.kind != PLAIN:
            self.monitor.every_n_steps = EVERY if self.kind == LOGGED else NEVER
            self.monitor.on_train_start(trainer, pl_module)
        self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx >= len(KINDS):  # the first of each kind does not count
            self.seconds[self.kind].append(time.perf_counter() - self.start)

    def ratios(self, kind: str) -> list[float]:
        """Return the times of a kind of step over those of the plain step of the same round."""
        return [a / b for a, b in zip(self.seconds[kind], self.seconds[PLAIN], strict=True)]


def benchmark(
    model: Literal["gpt", "forecaster"] = "gpt",
    size: Literal["1m", "10m", "124m"] = "10m",
    optimizer: Literal["adamw", "stosign"] = "adamw",
    rounds: int = 15,
) -> None:
    """Train and print the table.

    Args:
        model: what to train.
        size: of the GPT.
        optimizer: what trains it.
        rounds: steps of each kind that count.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    monitor = OptimizerStateMonitor()
    turns = Turns(monitor)
    stosign = StoSignConfig(optimizer, lr=1e-3, schedule="constant")
    module = Forecaster(stosign) if model == "forecaster" else GPTModule(size, stosign=stosign)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=(rounds + 1) * len(KINDS),
            accelerator="cpu",
            devices=1,
            log_every_n_steps=NEVER,
            limit_val_batches=0,
            logger=TensorBoardLogger(folder),
            callbacks=[turns, monitor],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=None if model == "forecaster" else TextDataModule())
    sizes = [param.numel() for param in module.parameters()]
    print(f"{optimizer}, {sum(sizes) / 1e6:.1f} M parameters in {len(sizes)} tensors, ", end="")
    print(f"{torch.get_num_threads()} threads, {rounds} rounds")
    print(f"{'step':20}  {'time':>8}  ratio to plain")
    for kind in KINDS:
        ratios = sorted(turns.ratios(kind))
        print(
            f"{kind:20}  {statistics.median(turns.seconds[kind]):6.3f} s  "
            f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )
    ratios = sorted(a + b for a, b in zip(turns.ratios(LOGGED), turns.ratios(AFTER), strict=True))
    median, low, high = ((ratio - 2) / DEFAULT for ratio in (statistics.median(ratios), ratios[0], ratios[-1]))
    print(f"logging every {DEFAULT}th step adds {median:.2%} to training ({low:.2%} to {high:.2%})")


if __name__ == "__main__":
    auto_cli(benchmark)
