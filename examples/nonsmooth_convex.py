"""SignSGD fails, StoSignSGD converges
===================================

Where SignSGD must fail and StoSignSGD does not: a convex function with kinks, ``f(x) = |x1 + x2| + 2 |x1 - x2|``.

.. code-block:: bash

    python examples/nonsmooth_convex.py
    python examples/nonsmooth_convex.py --steps 10000

Why SignSGD fails: a subgradient of f is a (1, 1) + b (1, -1) with ``|a| <= 1`` and b = -2 or 2. The second term is the
larger one in both coordinates, so the sign of the gradient is (1, -1) or (-1, 1), whatever x1 + x2 is: SignSGD only
ever moves along (1, -1), x1 + x2 stays what it was at the start, and ``f - f* >= |x1 + x2|`` for good, for any step
sizes. The random sign of StoSignSGD has the mean g / G, which does not forget the smaller term.

From 20 random starts in X = [-1, 1]^2 each method takes steps of size D / sqrt(2 t), D = 2 the diameter of X, and is
projected onto X (arXiv 2604.15416, Algorithm 1). Theorem 4 bounds the expected error of StoSignSGD's averaged iterate
by ``sqrt(2) D |L|_1 / sqrt(T)``, where L = (3, 3) are the coordinates' Lipschitz constants. The figure (the paper's
Figure 1) shows trajectories and errors, and the bound.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from jsonargparse import auto_cli
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_stosign import SignSGD, StoSignSGD

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DIAMETER, LIPSCHITZ_1 = 2.0, 6.0
SHOWN = 150  # steps of a trajectory in the figure
METHODS: dict[str, Callable[..., Optimizer]] = {
    "SignSGD": partial(SignSGD, momentum=0.0),
    "StoSignSGD": partial(StoSignSGD, betas=(0.0, 1.0)),
    "IE-StoSignSGD": partial(StoSignSGD, betas=(0.0, 1.0), stochastic=False),
    "SGD": SGD,
}


def f(x: Tensor) -> Tensor:
    """Return the function's values at points of shape [..., 2]; its minimum is f* = 0 at the origin."""
    return (x[..., 0] + x[..., 1]).abs() + 2 * (x[..., 0] - x[..., 1]).abs()


def subgradient(x: Tensor) -> Tensor:
    """Return a subgradient; at a kink the one from the side where its argument is positive."""
    plus, minus = x[..., 0] + x[..., 1], x[..., 0] - x[..., 1]
    a, b = torch.where(plus >= 0, 1.0, -1.0), torch.where(minus >= 0, 2.0, -2.0)
    return torch.stack([a + b, a - b], dim=-1).to(x.dtype)


def bound(steps: np.ndarray) -> np.ndarray:
    return math.sqrt(2) * DIAMETER * LIPSCHITZ_1 / np.sqrt(steps)


def random_starts(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def descend(optimizer: Optimizer, x: Tensor, steps: int, checkpoints: list[int]) -> dict[str, Tensor]:
    """Take projected steps of decreasing size from all starts at once.

    Returns:
        `averages`: the averaged iterates at the checkpoints, shape [checkpoints, starts, 2]; `path`: the first
        iterates, shape [SHOWN, starts, 2].
    """
    scheduler = LambdaLR(optimizer, lambda t: 1 / math.sqrt(t + 1))
    mean = torch.zeros_like(x)
    averages, path = [], []
    with torch.no_grad():
        for step in range(1, steps + 1):
            mean += (x - mean) / step
            if step <= SHOWN:
                path.append(x.clone())
            if step in checkpoints:
                averages.append(mean.clone())
            x.grad = subgradient(x)
            optimizer.step()
            scheduler.step()
            x.clamp_(-1, 1)
    return {"averages": torch.stack(averages), "path": torch.stack(path)}


def lowest_of_signsgd(starts: Tensor, step_sizes: list[float], steps: int) -> Tensor:
    """Return the lowest (f - f*) / |x1 + x2| at the start that SignSGD ever sees, for each constant step size.

    Without the projection, which could move x along another direction.
    """
    floor = starts.sum(dim=-1).abs()
    lowest = []
    for step_size in step_sizes:
        x = torch.nn.Parameter(starts.clone())
        optimizer = SignSGD([x], lr=step_size, momentum=0.0)
        best = f(x.detach())
        for _ in range(steps):
            x.grad = subgradient(x.detach())
            optimizer.step()
            best = torch.minimum(best, f(x.detach()))
        lowest.append((best / floor).min())
    return torch.stack(lowest)


def slope(steps: np.ndarray, errors: np.ndarray) -> float:
    """Return the exponent p of the fit errors ~ steps ** p."""
    return float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


def draw(runs: dict[str, dict[str, Tensor]], checkpoints: np.ndarray, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    grid = np.linspace(-1, 1, 201)
    levels = f(torch.from_numpy(np.stack(np.meshgrid(grid, grid), axis=-1))).numpy()
    axes[0].contour(grid, grid, levels, levels=15, colors="0.8", linewidths=0.8)
    # the start that is farthest from the line x1 + x2 = 0, on which alone SignSGD would get to the minimum
    shown = int(runs["SignSGD"]["path"][0].sum(dim=-1).abs().argmax())
    for name, run in runs.items():
        axes[0].plot(*run["path"][:, shown].T, lw=0.9, marker=".", ms=3, label=name)
        errors = f(run["averages"])
        axes[1].loglog(checkpoints, errors.mean(dim=1), marker="o", ms=3, label=name)
    axes[0].plot(0, 0, "k*", ms=10)
    axes[0].set(title=f"the first {SHOWN} iterates from one start", xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    axes[1].loglog(checkpoints, bound(checkpoints), "k--", label="Theorem 4's bound for StoSignSGD")
    axes[1].set(title="error of the averaged iterate, mean over the starts", xlabel="T", ylabel="$f - f^*$")
    axes[1].set_ylim(bottom=1e-6)
    axes[1].legend(loc="lower left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(steps: int = 100_000, starts: int = 20, out: str = "runs/nonsmooth_convex") -> dict[str, float]:
    """Run the four methods, print errors and slopes, draw the figure.

    Args:
        steps: T, at least 1000.
        starts: number of random starts.
        out: folder for the figure.

    Returns:
        The slope of each method's log error against log T.
    """
    if steps < 1000:
        raise ValueError(f"steps must be at least 1000, got {steps}")
    checkpoints = sorted({round(t) for t in np.geomspace(100, steps, 13)})
    runs = {}
    for name, method in METHODS.items():
        x = torch.nn.Parameter(random_starts(starts))
        # SGD's steps are as long as the others' where its gradient is as large as it can be.
        lr = DIAMETER / math.sqrt(2) / (3.0 if name == "SGD" else 1.0)
        runs[name] = descend(method([x], lr=lr), x, steps, checkpoints)

    counted = np.array(checkpoints, dtype=float)
    slopes = {name: slope(counted, f(run["averages"]).mean(dim=1).numpy()) for name, run in runs.items()}
    print(f"{'averaged iterate':18}{'f - f* at T = 100':>20}{f'at T = {steps}':>16}{'slope':>8}   (theory: -0.5)")
    for name, run in runs.items():
        errors = f(run["averages"]).mean(dim=1)
        print(f"{name:18}{errors[0]:20.4f}{errors[-1]:16.6f}{slopes[name]:8.2f}")
    ratio = f(runs["StoSignSGD"]["averages"]).mean(dim=1).numpy() / bound(counted)
    print(f"StoSignSGD's error is at most {ratio.max():.3f} of Theorem 4's bound at every T from 100 to {steps}")
    sizes = [0.001, 0.01, 0.1, 1.0]
    lowest = lowest_of_signsgd(random_starts(starts), sizes, steps // 50)
    listed = ", ".join(f"{value:.6f} at {size:g}" for size, value in zip(sizes, lowest.tolist(), strict=True))
    print(f"SignSGD's lowest f - f* over |x1 + x2| at the start, by constant step size: {listed}")

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    draw(runs, counted, folder / "nonsmooth_convex.png")
    print(f"Figure: {folder / 'nonsmooth_convex.png'}")
    return slopes


if __name__ == "__main__":
    auto_cli(main)
