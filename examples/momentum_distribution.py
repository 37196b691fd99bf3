"""What a format must hold: the magnitudes of the momentum, and of what divides it, at the end of a training run.

    python examples/momentum_distribution.py
    python examples/momentum_distribution.py --steps 50

A small GPT is trained with AdamW, SignSGD and StoSignSGD, with float32 states. The histograms of log10 of the states'
magnitudes (arXiv 2604.15416, Figure 3) are drawn beside what FP8 (E4M3) holds when a tensor has one scale, chosen so
that its largest value just fits: 5.2 decades. AdamW's second moment is a square and spans twice the decades of the
gradients; StoSignSGD's envelope spans fewer than they do, as it never forgets the largest. The share of nonzero entries
that the format would store as 0 is printed.
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
from lightning_stosign.health import log10_bin_edges, log10_histogram, read_moments

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = {
    "AdamW": StoSignConfig(optimizer="adamw", betas=(0.9, 0.999), warmup_steps=10),
    "SignSGD": StoSignConfig(optimizer="signsgd", lr=4e-4, warmup_steps=10),
    "StoSignSGD": StoSignConfig(optimizer="stosign", warmup_steps=10),
}
E4M3_LARGEST, E4M3_SMALLEST = 448.0, 2.0**-9


def states_of(optimizer: Optimizer) -> dict[str, list[Tensor]]:
    """Return each state's tensors over all parameters."""
    states: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            for name, value in read_moments(optimizer, param, group).states.items():
                states.setdefault(name, []).append(value)
    return states


def share_lost(tensors: list[Tensor]) -> float:
    """Return the share of nonzero entries that E4M3 with one scale a tensor rounds to 0."""
    lost, nonzero = 0, 0
    for value in tensors:
        magnitude = value.abs()
        half_smallest = magnitude.max() / E4M3_LARGEST * E4M3_SMALLEST / 2
        nonzero += int((magnitude > 0).sum())
        lost += int(((magnitude > 0) & (magnitude <= half_smallest)).sum())
    return lost / nonzero


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
            largest = float(np.log10(max(float(value.abs().max()) for value in tensors)))
            held = np.log10(E4M3_LARGEST / E4M3_SMALLEST)
            axis.axvspan(largest - held, largest, color="tab:green", alpha=0.15, lw=0)
            axis.set(title=f"{method}: {name}, FP8 would lose {share_lost(tensors):.1%}", xlim=(-20, 1))
    for axis in axes[-1]:
        axis.set_xlabel("log10 of the magnitude; green: what E4M3 holds")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(steps: int = 200, out: str = "runs/momentum_distribution") -> dict[str, dict[str, float]]:
    """Train with each method, print what FP8 would lose of each state, draw the histograms.

    Args:
        steps: optimizer steps of each run, more than 10.
        out: folder for the figure.

    Returns:
        The share lost of each state of each method.
    """
    states = {}
    for method, config in METHODS.items():
        _, optimizer = train_small_gpt(config, steps)
        states[method] = states_of(optimizer)
    lost = {method: {n: share_lost(v) for n, v in of_method.items()} for method, of_method in states.items()}
    print(f"{'':12}{'state':12}{'decades from 1% to 99%':>24}{'lost in FP8':>13}")
    for method, of_method in states.items():
        for name, tensors in of_method.items():
            magnitudes = np.concatenate([value.abs().flatten().numpy() for value in tensors])
            low, high = np.quantile(np.log10(magnitudes[magnitudes > 0]), [0.01, 0.99])
            print(f"{method:12}{name:12}{high - low:24.1f}{lost[method][name]:13.1%}")

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    draw(states, folder / "momentum_distribution.png")
    print(f"Figure: {folder / 'momentum_distribution.png'}")
    return lost


if __name__ == "__main__":
    auto_cli(main)
