"""What `lightning-stosign inspect` costs: seconds and memory, beside the size of the checkpoint.

python benchmarks/inspect_cost.py                      # GPT-2's 148 tensors, 124 M parameters: writes 1.5 GB
python benchmarks/inspect_cost.py --width 256          # a small one

Each command runs in a process of its own, start-up and imports included, and its peak is that of the whole process.
Targets for 124 M parameters: at most 15 seconds, and at most 3 times the file's size.
"""

import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning.pytorch import LightningModule, Trainer
from optimizer_step import gpt2_shapes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stosign import StoSignSGD

QUIET: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW, float32": lambda params: torch.optim.AdamW(params, foreach=False),
    "StoSignSGD, fp8": lambda params: StoSignSGD(params, fused=False, state_precision="fp8"),
}


class Weights(LightningModule):
    """Parameters of given shapes, with gradients of about 1e-5, and an optimizer of them."""

    def __init__(self, shapes: list[tuple[int, ...]], optimizer: str) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes])
        self.optimizer = optimizer

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return torch.stack([weight.square().sum() for weight in self.weights]).sum() * 1e-3

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.weights)


def save(path: Path, shapes: list[tuple[int, ...]], optimizer: str) -> None:
    """Train for one step and save a checkpoint."""
    torch.manual_seed(0)
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, **QUIET)
    trainer.fit(Weights(shapes, optimizer), DataLoader(TensorDataset(torch.zeros(1))))
    trainer.save_checkpoint(path)


def inspect(path: Path, *options: str) -> tuple[float, float]:
    """Run the command and return its seconds and its peak memory in bytes."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "lightning_stosign", "inspect", str(path), *options]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return time.perf_counter() - started, peak


def benchmark(layers: int = 12, width: int = 768) -> None:
    """Measure the command on the checkpoints of a GPT-2.

    Args:
        layers: its blocks.
        width: its width.
    """
    shapes = gpt2_shapes(layers, width)
    parameters = sum(math.prod(shape) for shape in shapes)
    # Processes of their own: a process's record of its children's memory is that of the largest so far.
    with tempfile.TemporaryDirectory() as folder, get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for optimizer in OPTIMIZERS:
            path = Path(folder) / "last.ckpt"
            pool.apply(save, (path, shapes, optimizer))
            size = path.stat().st_size
            print(f"{optimizer}: {parameters / 1e6:.1f} M parameters, {size / 1e9:.2f} GB", flush=True)
            for options in ((), ("--json",), ("--html", str(path.with_suffix(".html")))):
                seconds, peak = pool.apply(inspect, (path, *options))
                memory = f"{peak / 1e9:5.2f} GB, {peak / size:.2f} x the file"
                print(f"  {options[0] if options else 'table':8} {seconds:5.1f} s   {memory}", flush=True)


if __name__ == "__main__":
    auto_cli(benchmark)
