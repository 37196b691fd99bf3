"""How many bytes per parameter training needs: weights, gradients and optimizer states, counted and measured.

python benchmarks/memory.py                              # 38 M parameters: needs 2 GB
python benchmarks/memory.py --methods '["*release*"]' --layers 2 --width 256

Each method trains the same GPT for some steps in a process of its own, in a Lightning Trainer. Bytes per parameter:
  weights, gradients, states   of the tensors that exist; of the gradients, those that exist at one time at most
  sum                          of these
  resident                     the most memory of the process in use during a step, beyond what it used before the model
                               was built: with activations, temporary tensors and what autocast keeps
Linux and CPU only: resident memory and its peak come from /proc.
"""

import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer
from optimizer_scaling import _PROCESS, _resident
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

from lightning_stosign import StoSignConfig, StoSignMixin, state_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from gpt import GPT

CONTEXT, STEPS = 32, 3

# Published, arXiv 2602.23349: weights of 24 bits, 16-bit gradients, 8-bit states, for CUDA only.
PUBLISHED = {"FlashOptim AdamW (published)": 7.0, "FlashOptim AdamW, release (published)": 5.0}


def _adamw(params: list[Tensor]) -> Optimizer:
    return AdamW(params, lr=1e-4)


def _torchao(params: list[Tensor]) -> Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr=1e-4, bf16_stochastic_round=True)


def _ours(optimizer: Literal["stosign", "muon-sign"], state_precision: str, release: bool = False) -> StoSignConfig:
    return StoSignConfig(optimizer, 1e-4, state_precision=state_precision, release_gradients=release)


@dataclass(frozen=True)
class Method:
    """A way to train.

    Args:
        optimizer: the mixin's config, or a function of the parameters.
        precision: the Trainer's.
    """

    optimizer: StoSignConfig | Callable[[list[Tensor]], Optimizer]
    precision: Literal["bf16-mixed", "bf16-true"] = "bf16-true"


METHODS = {
    "AdamW, mixed precision": Method(_adamw, "bf16-mixed"),
    "AdamW, bfloat16": Method(_adamw),
    "StoSignSGD, bfloat16, fp8": Method(_ours("stosign", "fp8")),
    "StoSignSGD, bfloat16, fp4-block": Method(_ours("stosign", "fp4-block:stochastic_rounding=true")),
    "MuonSign, bfloat16, fp8": Method(_ours("muon-sign", "fp8")),
    "StoSignSGD, bfloat16, fp8, release": Method(_ours("stosign", "fp8", True)),
    "StoSignSGD, bfloat16, fp4-block, release": Method(_ours("stosign", "fp4-block:stochastic_rounding=true", True)),
    "MuonSign, bfloat16, fp8, release": Method(_ours("muon-sign", "fp8", True)),
    "torchao AdamW8bit, bfloat16": Method(_torchao),
}


class Module(StoSignMixin, LightningModule):
    """A GPT on random tokens."""

    def __init__(self, method: Method, layers: int, width: int) -> None:
        super().__init__()
        self._optimizer = method.optimizer
        if isinstance(method.optimizer, StoSignConfig):
            self.stosign = method.optimizer
        self.model = GPT(256, CONTEXT, layers, width // 64, width)

    def configure_optimizers(self) -> Any:
        if isinstance(self._optimizer, StoSignConfig):
            return super().configure_optimizers()
        return self._optimizer(list(self.parameters()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


class Peak(Callback):
    """Finds the most gradients that exist at one time, and the most resident memory during the last step."""

    gradients = 0
    resident = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        params = list(pl_module.parameters())

        def look(_: Tensor) -> None:
            held = sum(_nbytes(param.grad) for param in params if param.grad is not None)
            self.gradients = max(self.gradients, held)

        for param in params:
            param.register_post_accumulate_grad_hook(look)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        (_PROCESS / "clear_refs").write_text("5")  # the peak starts anew

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.resident = 1024 * _resident("VmHWM")


def _nbytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def fit(method: Method, layers: int, width: int) -> dict[str, float]:
    """Train for some steps; return bytes per parameter."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    tokens = torch.randint(256, (STEPS, CONTEXT + 1))
    before = 1024 * _resident("VmRSS")
    peak = Peak()
    trainer = Trainer(
        max_steps=STEPS,
        precision=method.precision,
        callbacks=[peak],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=1,
    )
    with trainer.init_module():
        module = Module(method, layers, width)
    trainer.fit(module, DataLoader(tokens, batch_size=1))  # type: ignore[arg-type]
    params = list(module.parameters())
    count = sum(param.numel() for param in params)
    total = {
        "weights": sum(_nbytes(param) for param in params),
        "gradients": peak.gradients,
        "states": state_bytes(trainer.optimizers[0]),
        "resident": peak.resident - before,
    }
    return {"parameters": count, **{name: value / count for name, value in total.items()}}


def measure(name: str, layers: int, width: int) -> dict[str, float]:
    """Return a method's bytes per parameter, in a process of its own."""
    fit(METHODS[name], 1, 64)  # what libraries load at their first use is not the model's
    return fit(METHODS[name], layers, width)


def processes() -> ForkServerContext:
    """Return what starts processes that give what they free back to the system at once."""
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_ARENA_MAX="1")  # read when a process starts
    context = multiprocessing.get_context("forkserver")  # forked from one that has imported all that they need
    context.set_forkserver_preload(["memory"])
    return context


def benchmark(methods: Sequence[str] = ("*",), layers: int = 12, width: int = 512) -> None:
    """Print the table.

    Args:
        methods: names of the table's rows, or shell-style patterns of names.
        layers: of the GPT.
        width: of the GPT, a multiple of 64.
    """
    chosen = [name for name in METHODS if any(fnmatch(name, pattern) for pattern in methods)]
    if not chosen:
        raise ValueError(f"methods={list(methods)} match none; accepted: {', '.join(METHODS)}, or patterns")
    context, columns = processes(), ("weights", "gradients", "states")
    print(f"bytes per parameter; cpu, torch {torch.__version__}")
    print(f"{'':42}{''.join(f'{column:>10}' for column in (*columns, 'sum', 'resident'))}")
    for name in chosen:
        with context.Pool(1) as pool:
            found = pool.apply(measure, (name, layers, width))
        values = [found[column] for column in columns]
        cells = "".join(f"{value:10.2f}" for value in (*values, sum(values), found["resident"]))
        print(f"{name:42}{cells}", flush=True)
    for name, value in PUBLISHED.items():
        print(f"{name:42}{'':30}{value:10.2f}")
    print(f"{found['parameters'] / 1e6:.1f} M parameters, {layers} layers of width {width}, {CONTEXT} tokens per step")


if __name__ == "__main__":
    auto_cli(benchmark)
