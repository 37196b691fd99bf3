"""No learning rate: ALIAS
=======================

ALIAS finds its step size by itself: is that as good as SignSGD with the best of a grid of step sizes?

.. code-block:: bash

    python examples/parameter_free.py logistic     # logistic regression, full gradients and mini-batches: five minutes
    python examples/parameter_free.py gpt          # the examples' GPT: five minutes of one core
    python examples/parameter_free.py gpt --seeds 3

Each prints a table and writes a figure. ALIAS needs now and then a second gradient on the same mini-batch, so it is
compared at equal steps and, with fewer steps, at equal gradient evaluations. The step size that SignStepSizeFinder
suggests is beside the best of the grid.
"""

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import matplotlib
import torch
import torch.nn as nn
import torch.nn.functional as F
from gpt import GPTModule
from jsonargparse import auto_cli
from text_data import TextDataModule
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from lightning_stosign import ALIAS, SignSGD, find_step_size

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Build = Callable[[Iterable[nn.Parameter]], Optimizer]
METHODS: dict[str, Build] = {
    "ALIAS, option I": lambda params: ALIAS(params),
    "ALIAS, option II": lambda params: ALIAS(params, loss_lower_bound=0.0),
    "ALIAS, option II, along the step": lambda params: ALIAS(params, loss_lower_bound=0.0, curvature="step"),
    "ALIAS, momentum, along the step": lambda params: ALIAS(params, momentum=0.9, curvature="step"),
    "ALIAS, Adam-style": lambda params: ALIAS(params, momentum=0.9, beta2=0.999),
}


class Run(NamedTuple):
    """One training: the loss at its end, the gradients it computed, the step size of each step, the time."""

    loss: float
    gradients: int
    step_sizes: list[float]
    seconds: float


class Recorder(pl.Callback):
    """Counts the gradients and notes the step sizes."""

    def __init__(self) -> None:
        self.gradients, self.step_sizes = 0, list[float]()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.gradients += 1

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        group = trainer.optimizers[0].param_groups[0]
        self.step_sizes.append(float(group.get("step_size", group["lr"])))


def quiet_trainer(steps: int, *callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )


class LogisticRegression(pl.LightningModule):
    """Labels drawn from a logistic model of 30 features; 500 examples, in mini-batches of 32 or all at once."""

    def __init__(self, build: Build, batch_size: int, seed: int, lr: float = 1e-3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = torch.randn(500, 30, generator=generator)
        truth = torch.randn(30, generator=generator)
        self.y = 2 * torch.bernoulli((self.a @ truth).sigmoid(), generator=generator) - 1
        self.weight, self.lr = nn.Parameter(torch.zeros(30)), lr
        self.build, self.batch_size, self.seed = build, batch_size, seed

    def loss(self, a: Tensor, y: Tensor) -> Tensor:
        return F.softplus(-y * (a @ self.weight)).mean()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(*batch)

    def configure_optimizers(self) -> Optimizer:
        return self.build(self.parameters())

    def train_dataloader(self) -> DataLoader:
        data: Dataset = TensorDataset(self.a, self.y)
        sampler = RandomSampler(self.a, generator=torch.Generator().manual_seed(self.seed))
        # Whole batches at once from the tensors: this is many small steps.
        batches = torch.utils.data.BatchSampler(sampler, self.batch_size, drop_last=True)
        return DataLoader(data, sampler=batches, batch_size=None)


class TrainedGPT(GPTModule):
    """The examples' GPT with an optimizer of our choice."""

    def __init__(self, build: Build, context: int, lr: float = 1e-3) -> None:
        super().__init__(context=context)
        self.build, self.lr = build, lr

    def configure_optimizers(self) -> Optimizer:
        return self.build(self.parameters())


def train_logistic(build: Build, steps: int, batch_size: int, seed: int) -> Run:
    model, recorder, started = LogisticRegression(build, batch_size, seed), Recorder(), time.perf_counter()
    quiet_trainer(steps, recorder).fit(model)
    loss = model.loss(model.a, model.y).item()
    return Run(loss, recorder.gradients, recorder.step_sizes, time.perf_counter() - started)


def train_gpt(build: Build, steps: int, context: int, batch_size: int, seed: int) -> Run:
    pl.seed_everything(seed, verbose=False)
    model, recorder, started = TrainedGPT(build, context), Recorder(), time.perf_counter()
    data = TextDataModule(context=context, batch_size=batch_size, seed=seed)
    trainer = quiet_trainer(steps, recorder)
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - started
    trainer = quiet_trainer(steps)
    trainer.limit_val_batches = 40
    (result,) = trainer.validate(model, datamodule=data, verbose=False)
    return Run(result["val_loss"], recorder.gradients, recorder.step_sizes, seconds)


def mean_loss(runs: list[Run]) -> float:
    return math.fsum(run.loss for run in runs) / len(runs)


def compare(
    title: str, train: Callable[[Build, int, int], Run], steps: int, seeds: int, grid: list[float], momenta: list[float]
) -> tuple[dict[float, dict[float, float]], dict[str, list[Run]]]:
    """Train with SignSGD on a grid and with each method, at equal steps and at equal gradients; print a table."""
    tuned: dict[float, dict[float, float]] = {momentum: {} for momentum in momenta}
    for momentum, losses in tuned.items():
        for lr in grid:

            def sign_descent(params: Iterable[nn.Parameter], lr: float = lr, momentum: float = momentum) -> Optimizer:
                return SignSGD(params, lr, momentum)

            losses[lr] = mean_loss([train(sign_descent, steps, seed) for seed in range(seeds)])
    found = {name: [train(build, steps, seed) for seed in range(seeds)] for name, build in METHODS.items()}
    best = min(loss for losses in tuned.values() for loss in losses.values())

    print(f"\n{title}, {steps} steps, mean of {seeds} seed(s)")
    print(f"{'optimizer':34}{'loss':>8}{'to best':>9}{'gradients':>11}{'loss at equal gradients':>25}{'to best':>9}")
    for momentum, losses in tuned.items():
        lr = min(losses, key=losses.__getitem__)
        name = f"SignSGD, momentum {momentum}, lr {lr:.2g}"
        print(f"{name:34}{losses[lr]:8.4f}{losses[lr] / best - 1:9.1%}{steps:11}", flush=True)
    for name, runs in found.items():
        fewer = round(steps * steps / runs[0].gradients)
        equal = mean_loss([train(METHODS[name], fewer, seed) for seed in range(seeds)])
        loss = mean_loss(runs)
        print(
            f"{name:34}{loss:8.4f}{loss / best - 1:9.1%}{runs[0].gradients:11}{equal:25.4f}{equal / best - 1:9.1%}",
            flush=True,
        )
    return tuned, found


def draw(
    axes: "list[plt.Axes]", title: str, tuned: dict[float, dict[float, float]], found: dict[str, list[Run]]
) -> None:
    for momentum, losses in tuned.items():
        axes[0].semilogx(list(losses), list(losses.values()), marker=".", label=f"SignSGD, momentum {momentum}")
    for number, (name, runs) in enumerate(found.items()):
        axes[0].axhline(mean_loss(runs), color=f"C{number + 2}", ls="--", label=name)
        axes[1].semilogy(runs[0].step_sizes, color=f"C{number + 2}", label=name)
    every = [mean_loss(runs) for runs in found.values()] + [loss for of in tuned.values() for loss in of.values()]
    lowest = min(every)
    axes[0].set(xlabel="learning rate of SignSGD", ylabel="loss", title=title, ylim=(None, 1.6 * lowest))
    axes[1].set(xlabel="step", ylabel="step size", title="what ALIAS found")
    axes[0].legend(fontsize="small")


def report_finder(title: str, suggestion: float, losses: dict[float, float]) -> None:
    best = min(losses, key=losses.__getitem__)
    print(f"{title}: SignStepSizeFinder suggests {suggestion:.2g}, {suggestion / best:.2f} times the grid's {best:.2g}")


def log_grid(low: float, high: float, points: int) -> list[float]:
    return [low * (high / low) ** (k / (points - 1)) for k in range(points)]


def logistic(steps: int = 2000, seeds: int = 3, points: int = 9, out: str = "runs/parameter_free") -> None:
    """Logistic regression.

    Args:
        steps: of each training.
        seeds: mini-batch orders to average over.
        points: learning rates in the grid, from 0.0005 to 0.05.
        out: folder for the figure.
    """
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for row, (title, size) in enumerate({"full gradients": 500, "mini-batches of 32": 32}.items()):
        seeds_here = seeds if size < 500 else 1

        def train(build: Build, steps: int, seed: int, size: int = size) -> Run:
            return train_logistic(build, steps, size, seed)

        tuned, found = compare(
            f"Logistic regression, {title}", train, steps, seeds_here, log_grid(5e-4, 5e-2, points), [0.0]
        )
        model = LogisticRegression(lambda params: SignSGD(params, 1e-3, momentum=0.0), size, 0)
        search = find_step_size(quiet_trainer(steps), model, steps=steps)
        report_finder(title, search.suggestion(), tuned[0.0])
        draw(list(axes[row]), f"Logistic regression, {title}", tuned, found)
    save(figure, Path(out) / "logistic.png")


def gpt(
    steps: int = 200,
    seeds: int = 1,
    grid: list[float] | None = None,
    context: int = 64,
    batch_size: int = 8,
    out: str = "runs/parameter_free",
) -> None:
    """The examples' GPT of 0.8 M parameters on the source of Python's standard library.

    Args:
        steps: of each training.
        seeds: initial weights and orders of the data to average over.
        grid: learning rates of SignSGD; by default 1e-4, 3e-4, 1e-3.
        context: tokens in a window.
        batch_size: windows in a mini-batch.
        out: folder for the figure.
    """

    def train(build: Build, steps: int, seed: int) -> Run:
        return train_gpt(build, steps, context, batch_size, seed)

    tuned, found = compare("GPT", train, steps, seeds, grid or [1e-4, 3e-4, 1e-3], [0.0, 0.9])
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    draw(list(axes), "GPT, validation loss", tuned, found)
    for momentum, losses in tuned.items():
        pl.seed_everything(0, verbose=False)
        model = TrainedGPT(lambda params, momentum=momentum: SignSGD(params, 1e-3, momentum), context)  # type: ignore[misc]
        data = TextDataModule(context=context, batch_size=batch_size)
        search = find_step_size(quiet_trainer(steps), model, datamodule=data, steps=steps)
        report_finder(f"GPT, momentum {momentum}", search.suggestion(), losses)
    save(figure, Path(out) / "gpt.png")


def save(figure: "plt.Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"\nFigure: {path}")


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning|torch")
    auto_cli([logistic, gpt])
