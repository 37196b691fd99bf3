"""How much of a sign is noise
===========================

How much noise a sign adds: noise intensity and update size of AdamW and StoSignSGD on a small GPT.

.. code-block:: bash

    python examples/noise_intensity.py
    python examples/noise_intensity.py --steps 50

An optimizer's update u, in [-1, 1], becomes the sign method sign(u + n) with n uniform in [-1, 1] (SignConverted). Its
noise has the variance 1 - u^2, and the step goes the wrong way with probability ``(1 - |u|) / 2``. Shown over the
steps, for each kind of parameter, are the RMS of sqrt(1 - u^2) and the mean of ``1 - |u|`` (arXiv 2604.15416, Figure
4), and the RMS of u itself, which for AdamW is known to be about 0.2. Updates are small almost everywhere, so a single
sign is nearly all noise: what counts is the mean over many steps.

The optimizers train in their in-expectation form, that is, without the noise, which is the optimizer itself.
"""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer
from small_gpt import kind_of, train_small_gpt
from torch import Tensor
from torch.optim import Optimizer

from lightning_stosign import StoSignConfig

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = {
    "AdamW": StoSignConfig(optimizer="sign-adamw", stochastic=False, weight_decay=0.0, warmup_steps=10),
    "StoSignSGD": StoSignConfig(optimizer="stosign", stochastic=False, weight_decay=0.0, warmup_steps=10),
}
MEASURES = {
    "RMS of $\\sqrt{1 - u^2}$": lambda u: (1 - u.square()).clamp(min=0),
    "mean of $1 - |u|$": lambda u: (1 - u.abs()).clamp(min=0),
    "RMS of $u$": torch.square,
}


class UpdateMeasures(Callback):
    """Takes the update u = (old - new parameter) / lr of each step, where there is no weight decay, and its measures.

    Attributes:
        values: for each kind of parameter one row a step: the values of MEASURES.
    """

    def __init__(self) -> None:
        self.values: defaultdict[str, list[list[float]]] = defaultdict(list)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        names = {param: name for name, param in pl_module.named_parameters()}
        before: dict[Tensor, Tensor] = {}

        def keep(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            before.update({param: param.detach().clone() for param in names})

        def measure(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            updates = defaultdict(list)
            for group in optimizer.param_groups:
                for param in group["params"]:
                    u = (before[param] - param.detach()) / group["lr"]
                    updates[kind_of(names[param])].append(u.flatten())
            for kind, parts in updates.items():
                u = torch.cat(parts)
                means = [float(of(u).mean()) for of in MEASURES.values()]
                self.values[kind].append([means[0] ** 0.5, means[1], means[2] ** 0.5])

        optimizer.register_step_pre_hook(keep)
        optimizer.register_step_post_hook(measure)


def draw(measured: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained", sharex=True, sharey="col")
    for row, (method, kinds) in zip(axes, measured.items(), strict=True):
        for column, (axis, measure) in enumerate(zip(row, MEASURES, strict=True)):
            for kind, values in kinds.items():
                axis.plot(range(1, len(values) + 1), values[:, column], lw=0.9, label=kind)
            axis.set(title=f"{method}: {measure}", ylim=(0, 1.05), xlabel="step")
    axes[0, 0].legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(steps: int = 200, lr: float = 1e-3, out: str = "runs/noise_intensity") -> dict[str, dict[str, np.ndarray]]:
    """Train with each method, print the measures over the last half of the steps, draw the figure.

    Args:
        steps: optimizer steps of each run, at least 20.
        lr: learning rate of each run.
        out: folder for the figure.

    Returns:
        For each method and kind of parameter the measures, shape [steps, 3].
    """
    measured = {}
    print(f"{'':12}{'':12}{'RMS sqrt(1 - u^2)':>20}{'mean 1 - |u|':>15}{'RMS u':>8}")
    for method, config in METHODS.items():
        callback = UpdateMeasures()
        train_small_gpt(replace(config, lr=lr), steps, callback)
        measured[method] = {kind: np.array(rows) for kind, rows in sorted(callback.values.items())}
        for kind, values in measured[method].items():
            late = values[len(values) // 2 :].mean(axis=0)
            print(f"{method:12}{kind:12}{late[0]:20.3f}{late[1]:15.3f}{late[2]:8.3f}")

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    draw(measured, folder / "noise_intensity.png")
    print(f"Figure: {folder / 'noise_intensity.png'}")
    return measured


if __name__ == "__main__":
    auto_cli(main)
