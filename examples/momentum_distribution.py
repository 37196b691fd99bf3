"""The magnitudes of optimizer states
==================================

What a format must hold: the magnitudes of the momentum, and of what divides it, at the end of a training run.

.. code-block:: bash

    python examples/momentum_distribution.py
    python examples/momentum_distribution.py --steps 50

A small GPT is trained with AdamW, SignSGD and StoSignSGD, with float32 states. The histograms of log10 of the states'
magnitudes (arXiv 2604.15416, Figure 3) are drawn beside what FP8 (E4M3) holds under a loss scale of 1024: 5.4 decades,
at magnitudes 1024 times as small as its own, or 1024^2 times for AdamW's second moment, which is a square and therefore
spans twice the decades. Printed is the share of nonzero entries that the format would store as 0, without a scale, with
that loss scale, and with one scale a tensor.
"""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from jsonargparse import auto_cli
from small_gpt import train_small_gpt
from torch import Tensor
from torch.optim import Optimizer

from lightning_stosign import StoSignConfig
from lightning_stosign.health import log10_bin_edges, log10_histogram, read_moments, underflow_fraction
from lightning_stosign.optim.emulation import state_degree

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = {
    "AdamW": StoSignConfig(optimizer="adamw", betas=(0.9, 0.999), warmup_steps=10),
    "SignSGD": StoSignConfig(optimizer="signsgd", lr=4e-4, warmup_steps=10),
    "StoSignSGD": StoSignConfig(optimizer="stosign", warmup_steps=10),
}
LOSS_SCALE = 1024.0
FORMATS = {"no scale": "fp8-raw", "loss scale": f"fp8-raw:static_scale={LOSS_SCALE:g}", "tensor scale": "fp8"}
E4M3_SMALLEST, E4M3_LARGEST = 2.0**-9, 448.0


def states_of(optimizer: Optimizer) -> dict[str, list[Tensor]]:
    """Return each state's tensors over all parameters."""
    states: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            for name, value in read_moments(optimizer, param, group).states.items():
                states.setdefault(name, []).append(value)
    return states


def share_lost(name: str, tensors: list[Tensor], precision: str) -> float:
    """Return the share of a state's nonzero entries that a format stores as 0."""
    shares = [underflow_fraction(value, precision, state_degree(name)) for value in tensors]
    return float(sum(share.part for share in shares) / sum(share.whole for share in shares))


def draw(states: dict[str, dict[str, list[Tensor]]], path: Path) -> None:
    columns = max(len(of_method) for of_method in states.values())
    figure, axes = plt.subplots(len(states), columns, figsize=(9, 8), layout="constrained", sharex=True, squeeze=False)
    edges = log10_bin_edges().numpy()
    for row, (method, of_method) in zip(axes, states.items(), strict=True):
        for axis in row[len(of_method) :]:
            axis.axis("off")
        for axis, (name, tensors) in zip(row, of_method.items(), strict=False):
            counts = sum((log10_histogram(value) for value in tensors), torch.zeros(len(edges) - 1)).numpy()
            axis.bar(edges[:-1], counts / counts.sum(), width=np.diff(edges), align="edge")
            scale = LOSS_SCALE ** state_degree(name)
            axis.axvspan(*np.log10([E4M3_SMALLEST / scale, E4M3_LARGEST / scale]), color="tab:green", alpha=0.15, lw=0)
            axis.set(title=f"{method}: {name}", xlim=(-13, 1))
    for axis in axes[-1]:
        axis.set_xlabel("log10 of the magnitude; green: what E4M3 holds\n(loss scale 1024)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(steps: int = 200, out: str = "runs/momentum_distribution") -> dict[str, dict[str, float]]:
    """Train with each method, print what FP8 would lose of each state, draw the histograms.

    Args:
        steps: optimizer steps of each run, more than 10.
        out: folder for the figure.

    Returns:
        The share lost under the loss scale, of each state of each method.
    """
    states = {}
    for method, config in METHODS.items():
        _, optimizer = train_small_gpt(config, steps)
        states[method] = states_of(optimizer)
    lost: dict[str, dict[str, float]] = {}
    print(f"{'':12}{'state':12}{'decades, 1% to 99%':>20}    lost in FP8: " + "".join(f"{f:>14}" for f in FORMATS))
    for method, of_method in states.items():
        for name, tensors in of_method.items():
            magnitudes = np.concatenate([value.abs().flatten().numpy() for value in tensors])
            low, high = np.quantile(np.log10(magnitudes[magnitudes > 0]), [0.01, 0.99])
            shares = {title: share_lost(name, tensors, precision) for title, precision in FORMATS.items()}
            lost.setdefault(method, {})[name] = shares["loss scale"]
            listed = "".join(f"{share:14.1%}" for share in shares.values())
            print(f"{method:12}{name:12}{high - low:20.1f}{'':17}{listed}")

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    draw(states, folder / "momentum_distribution.png")
    print(f"Figure: {folder / 'momentum_distribution.png'}")
    return lost


if __name__ == "__main__":
    auto_cli(main)
