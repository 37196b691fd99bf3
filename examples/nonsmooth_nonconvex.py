"""Non-smooth and non-convex: OnlineToNonconvex
============================================

A guarantee where gradients never get small: online-to-non-convex conversion on a ReLU network.

.. code-block:: bash

    python examples/nonsmooth_nonconvex.py
    python examples/nonsmooth_nonconvex.py --budgets "[1000, 10000]"

The absolute error of a small ReLU network is neither smooth nor convex: at its kinks the gradient jumps, so that no
number of steps makes it small. What can be made small is the generalised stationarity, the norm of the *mean* gradient
over a small neighbourhood plus delta times the neighbourhood's squared size (arXiv 2604.15416, Definitions 2 and 3).
OnlineToNonconvex (Algorithm 12) does so with StoSignSGD as its online learner. For T gradients in all, windows of
N ~ T^(4/7) steps and a radius of D ~ T^(-5/7) balance the three terms of its bound, 1 / (D T), 1 / sqrt(N) and
delta (D N)^2, which then falls as T^(-2/7). Printed is the exponent fitted to the budgets' mean stationarity over their
windows, beside the theory's.
"""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from jsonargparse import auto_cli
from torch import Tensor

from lightning_stosign import OnlineToNonconvex
from lightning_stosign.health import GeneralizedStationarity

matplotlib.use("Agg")
import matplotlib.pyplot as plt

THEORY = -2 / 7
HIDDEN, INPUTS, EXAMPLES = 8, 4, 64


def network(x: Tensor, inputs: Tensor) -> Tensor:
    """Return a . relu(W z + b) for each row z of the inputs, with x = (W, b, a) as one vector."""
    hidden, bias, outer = x.split([HIDDEN * INPUTS, HIDDEN, HIDDEN])
    return torch.relu(inputs @ hidden.view(INPUTS, HIDDEN) + bias) @ outer


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a start of 48 weights, and inputs and targets (the outputs of other weights) to fit."""
    generator = torch.Generator().manual_seed(seed)
    start, teacher = torch.randn(2, HIDDEN * (INPUTS + 2), generator=generator) / 2
    inputs = torch.randn(EXAMPLES, INPUTS, generator=generator)
    return start, inputs, network(2 * teacher, inputs)


def stationarity(budget: int, delta: float, seed: int, scale: float) -> tuple[float, float]:
    """Spend a budget of gradients.

    Args:
        budget: T.
        delta: weight of the neighbourhood's size.
        seed: of the network, the data and the optimizer.
        scale: of the radius: it is scale * T^(-5/7).

    Returns:
        The mean generalised stationarity of the windows, and the loss at the last window's mean.
    """
    start, inputs, targets = problem(seed)
    x = torch.nn.Parameter(start)
    window, radius = max(1, round(budget ** (4 / 7))), scale * budget ** (-5 / 7)
    optimizer = OnlineToNonconvex([x], lr=radius / window**0.5, radius=radius, window=window, seed=seed)
    metric, windows = GeneralizedStationarity(delta), []
    for step in range(1, budget + 1):
        loss = (network(x, inputs) - targets).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        assert x.grad is not None
        metric.update(x, x.grad)
        optimizer.step()
        if step % window == 0:
            windows.append(float(metric.compute()))
            metric.reset()
            mean = optimizer.state[x]["window_mean"].clone()
    return float(np.mean(windows)), float((network(mean, inputs) - targets).abs().mean())


def main(
    budgets: tuple[int, ...] = (1_000, 10_000, 100_000),
    delta: float = 1.0,
    scale: float = 3.0,
    seeds: int = 2,
    out: str = "runs/nonsmooth_nonconvex",
) -> float:
    """Spend each budget, print the stationarity and its exponent, draw the figure.

    Args:
        budgets: numbers of gradients T, at least two.
        delta: weight of the neighbourhood's size in the stationarity.
        scale: the radius is scale * T^(-5/7).
        seeds: networks that each budget is averaged over.
        out: folder for the figure.

    Returns:
        The fitted exponent.
    """
    if len(budgets) < 2:
        raise ValueError(f"budgets must be at least two, got {budgets}")
    means = []
    for budget in budgets:
        values, losses = zip(*(stationarity(budget, delta, seed, scale) for seed in range(seeds)), strict=True)
        means.append(float(np.mean(values)))
        print(f"{budget:8} gradients: generalised stationarity {means[-1]:.4f}, loss {np.mean(losses):.4f}", flush=True)
    exponent = float(np.polyfit(np.log(budgets), np.log(means), 1)[0])
    print(f"fitted exponent {exponent:.3f}, theory {THEORY:.3f}")

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    figure, axis = plt.subplots(figsize=(5.6, 4), layout="constrained")
    axis.loglog(budgets, means, "o-", label=f"measured: exponent {exponent:.2f}")
    axis.loglog(budgets, means[0] * (np.array(budgets) / budgets[0]) ** THEORY, "k--", label="theory's: -2/7")
    axis.set(xlabel="gradients T", ylabel="generalised stationarity", title="O2NC on a ReLU network's absolute error")
    axis.legend()
    figure.savefig(folder / "nonsmooth_nonconvex.png", dpi=120)
    plt.close(figure)
    print(f"Figure: {folder / 'nonsmooth_nonconvex.png'}")
    return exponent


if __name__ == "__main__":
    auto_cli(main)
