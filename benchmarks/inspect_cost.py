"""What `lightning-stosign inspect` costs: seconds and memory, beside the size of the checkpoint.

python benchmarks/inspect_cost.py                      # GPT-2's 148 tensors, 124 M parameters: writes 1.5 GB
python benchmarks/inspect_cost.py --width 256          # a small one
python benchmarks/inspect_cost.py --large 10           # also a distributed checkpoint of 10 GB

Each command runs in a process of its own, start-up and imports included, and its peak is that of the whole process.
Targets: 8 seconds and the size of the file in memory for 124 M parameters, 5 seconds for 5,000 tiny tensors, and 1 GB
of memory for 10 GB of shards.
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
import torch.distributed.checkpoint as dcp
from jsonargparse import auto_cli
from lightning.pytorch import LightningModule, Trainer
from optimizer_step import gpt2_shapes
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
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


def save(folder: Path, shapes: list[tuple[int, ...]], optimizer: str) -> None:
    """Train for one step and save last.ckpt, optimizer.pt and a distributed checkpoint, dcp."""
    torch.manual_seed(0)
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, **QUIET)
    module = Weights(shapes, optimizer)
    trainer.fit(module, DataLoader(TensorDataset(torch.zeros(1))))
    trainer.save_checkpoint(folder / "last.ckpt")
    torch.save(trainer.optimizers[0].state_dict(), folder / "optimizer.pt")
    states = {"model": module.state_dict(), "optimizer": get_optimizer_state_dict(module, trainer.optimizers[0])}
    dcp.save(states, checkpoint_id=folder / "dcp")


def save_large(folder: Path, gigabytes: float) -> None:
    """Save AdamW's states of one parameter as a distributed checkpoint; they are zeros that take no memory."""
    numel = int(gigabytes * 1e9 / 8)
    names = ("exp_avg", "exp_avg_sq")
    for name in names:
        with open(folder / name, "wb") as file:
            file.truncate(4 * numel)
    state = {name: torch.from_file(str(folder / name), shared=True, size=numel) for name in names}
    group = {"params": ["weight"], "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    content = {"optimizer": {"state": {"weight": {"step": torch.tensor(3.0), **state}}, "param_groups": [group]}}
    dcp.save(content, checkpoint_id=folder / "dcp")


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of a folder's files."""
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def inspect(path: Path, *options: str) -> tuple[float, float]:
    """Run the command and return its seconds and its peak memory in bytes."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "lightning_stosign", "inspect", str(path), *options]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return time.perf_counter() - started, peak


def benchmark(layers: int = 12, width: int = 768, large: float = 0.0) -> None:
    """Measure the command on the checkpoints of a GPT-2.

    Args:
        layers: its blocks.
        width: its width.
        large: also measure a distributed checkpoint of so many GB; it is written to the folder for temporary files.
    """
    # Processes of their own: a process's record of its children's memory is that of the largest so far.
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:

        def measure(path: Path, what: str, *options: str) -> None:
            seconds, peak = pool.apply(inspect, (path, *options))
            memory = f"{peak / 1e9:5.2f} GB, {peak / size_of(path):.2f} x the file"
            print(f"  {what:28} {seconds:5.1f} s   {memory}", flush=True)

        for title, shapes, optimizers in (
            ("GPT-2", gpt2_shapes(layers, width), list(OPTIMIZERS)),
            ("5,000 tiny tensors", [(16,)] * 5000, ["AdamW, float32"]),
        ):
            for optimizer in optimizers:
                with tempfile.TemporaryDirectory() as name:
                    folder = Path(name)
                    pool.apply(save, (folder, shapes, optimizer))
                    parameters, size = sum(map(math.prod, shapes)), size_of(folder / "last.ckpt")
                    print(f"{title}, {optimizer}: {parameters / 1e6:.1f} M parameters, {size / 1e9:.2f} GB", flush=True)
                    measure(folder / "last.ckpt", "last.ckpt")
                    measure(folder / "last.ckpt", "last.ckpt --json", "--json")
                    measure(folder / "last.ckpt", "last.ckpt --html", "--html", str(folder / "page.html"))
                    measure(folder / "optimizer.pt", "optimizer.pt")
                    measure(folder / "dcp", "distributed checkpoint")
        if large:
            with tempfile.TemporaryDirectory() as name:
                pool.apply(save_large, (Path(name), large))
                print(f"AdamW's states of one parameter, {size_of(Path(name, 'dcp')) / 1e9:.1f} GB", flush=True)
                measure(Path(name, "dcp"), "distributed checkpoint")


if __name__ == "__main__":
    auto_cli(benchmark)
