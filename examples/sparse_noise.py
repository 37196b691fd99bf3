"""Noise in one coordinate
=======================

When the sign wins: under noise in one coordinate SGD needs steps in proportion to the dimension, SignSGD does not.

.. code-block:: bash

    python examples/sparse_noise.py
    python examples/sparse_noise.py --dims "[10, 30, 100]"

The problem: f(x) = 1/2 sum h_i x_i^2 with h = (1, 1/d, ..., 1/d), Gaussian noise of standard deviation 1 on the first
coordinate's gradient only, start (0, 1, ..., 1). The noise on the sharp coordinate forces SGD's one step size down, and
the d - 1 flat coordinates wait for it. A sign moves them as fast as the sharp one. (An isotropic quadratic shows
nothing of this.) In the matrix form the h_i belong to singular directions, hidden by two random rotations: there
Muon, the sign of the singular values, does what SignSGD does for coordinates.

Counted: the steps until the mean of ``|grad f|_1`` over the last half of them is at most 0.1, in the median over seeds,
at the best constant step size of a log grid. For the matrix form it is the nuclear norm. Theory: arXiv 2605.06615.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from jsonargparse import auto_cli
from numpy.typing import NDArray
from scipy.signal import lfilter
from torch import Tensor
from torch.optim import Muon, Optimizer

from lightning_stosign import SignSGD, StoSignSGD

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TARGET = 0.1
# Each with its grid of step sizes and the steps to look for.
METHODS: dict[str, tuple[Callable[..., Optimizer], NDArray, int]] = {
    "SignSGD": (partial(SignSGD, momentum=0.0), np.geomspace(0.01, 0.1, 9), 500),
    "StoSignSGD": (partial(StoSignSGD, betas=(0.9, 1.0)), np.geomspace(0.003, 0.012, 5), 2500),
}


def steps_needed(norms: NDArray) -> NDArray:
    """Return the smallest T with mean(norms[T // 2 : T]) <= TARGET for each column, inf where there is none.

    Args:
        norms: gradient norms at the iterates, shape [steps, columns].
    """
    total = np.concatenate([np.zeros((1, norms.shape[1])), np.cumsum(norms, axis=0)])
    ends = np.arange(1, len(norms) + 1)
    halves = (total[ends] - total[ends // 2]) / (ends - ends // 2)[:, None]
    reached = halves <= TARGET
    return np.where(reached.any(axis=0), reached.argmax(axis=0) + 1, np.inf)


def best(needed: dict[float, NDArray]) -> tuple[float, float]:
    """Return the fewest steps, in the median over the seeds, and their step size."""
    step_size = min(needed, key=lambda size: float(np.median(needed[size])))
    return float(np.median(needed[step_size])), step_size


def sgd_steps(dim: int, step_sizes: NDArray, seeds: int) -> tuple[float, float]:
    """Return SGD's fewest steps, those that torch.optim.SGD would take, but a million in a second.

    The flat coordinates are all alike and have no noise, which leaves two recursions, x <- (1 - lr h) x - lr noise: one
    in closed form for all of them, and one for the first coordinate.
    """
    longest = 400 * dim
    noise = np.random.default_rng(dim).standard_normal((longest - 1, seeds))
    needed = {}
    for lr in step_sizes:
        sharp = np.concatenate([np.zeros((1, seeds)), lfilter([-lr], [1.0, lr - 1.0], noise, axis=0)])
        flat = (dim - 1) / dim * (1 - lr / dim) ** np.arange(longest)
        needed[float(lr)] = steps_needed(np.abs(sharp) + flat[:, None])
    return best(needed)


def sign_steps(
    method: Callable[..., Optimizer], dim: int, step_sizes: NDArray, seeds: int, longest: int
) -> tuple[float, float]:
    """Return a sign method's fewest steps: one param group of all seeds for each step size."""
    h = torch.full((dim,), 1 / dim)
    h[0] = 1.0
    start = torch.ones(seeds, dim)
    start[:, 0] = 0.0
    params = [torch.nn.Parameter(start.clone()) for _ in step_sizes]
    optimizer = method([{"params": [x], "lr": float(lr)} for x, lr in zip(params, step_sizes, strict=True)])
    generator = torch.Generator().manual_seed(dim)
    norms = []
    with torch.no_grad():
        for _ in range(longest):
            grads = [x * h for x in params]
            norms.append(torch.cat([grad.abs().sum(dim=1) for grad in grads]))
            for x, grad in zip(params, grads, strict=True):
                grad[:, 0] += torch.randn(seeds, generator=generator)
                x.grad = grad
            optimizer.step()
    return _best_of_groups(torch.stack(norms), step_sizes)


def muon_steps(dim: int, step_sizes: NDArray, seeds: int, longest: int) -> tuple[float, float]:
    """Return Muon's fewest steps on the matrix form: f(W) = 1/2 sum h_i (u_i W v_i)^2 and, off the diagonal, 0."""
    generator = torch.Generator().manual_seed(dim)
    u, v = (torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q for _ in range(2))
    h = torch.full((dim,), 1 / dim)
    h[0] = 1.0
    start = torch.ones(dim)
    start[0] = 0.0
    runs = [[torch.nn.Parameter((u * start) @ v.T) for _ in range(seeds)] for _ in step_sizes]
    groups = [{"params": run, "lr": float(lr)} for run, lr in zip(runs, step_sizes, strict=True)]
    optimizer = Muon(groups, momentum=0.0, nesterov=False, weight_decay=0.0)
    norms = []
    with torch.no_grad():
        for _ in range(longest):
            row = []
            for w in (w for run in runs for w in run):
                diagonal = ((u.T @ w) * v.T).sum(dim=1) * h
                row.append(diagonal.abs().sum())
                diagonal[0] += torch.randn((), generator=generator)
                w.grad = (u * diagonal) @ v.T
            norms.append(torch.stack(row))
            optimizer.step()
    return _best_of_groups(torch.stack(norms), step_sizes)


def _best_of_groups(norms: Tensor, step_sizes: NDArray) -> tuple[float, float]:
    """Take norms of shape [steps, step sizes * seeds] to the best."""
    needed = np.split(steps_needed(norms.numpy()), len(step_sizes))
    return best(dict(zip(step_sizes.tolist(), needed, strict=True)))


def slope(dims: list[int], counts: list[float]) -> float:
    """Return the exponent p of the fit steps ~ d ** p."""
    return float(np.polyfit(np.log(dims), np.log(counts), 1)[0])


def draw(results: dict[str, dict[int, float]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for name, counts in results.items():
        fitted = slope(list(counts), list(counts.values()))
        axis.loglog(list(counts), list(counts.values()), marker="o", label=f"{name}: slope {fitted:.2f}")
    axis.set(
        xlabel="dimension d (of the matrix: d x d)",
        ylabel=f"steps until the mean gradient norm is {TARGET}",
        title="noise in one coordinate, tuned step sizes",
    )
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    dims: tuple[int, ...] = (10, 30, 100, 300, 1000, 3000),
    muon_up_to: int = 100,
    seeds: int = 8,
    out: str = "runs/sparse_noise",
) -> dict[str, float]:
    """Count steps for each dimension and method, print the slopes, draw the figure.

    Args:
        dims: dimensions d.
        muon_up_to: the largest d for which a d x d matrix is trained with Muon.
        seeds: runs of each count.
        out: folder for the figure.

    Returns:
        The slope of each method's log(steps) against log(d).
    """
    results: dict[str, dict[int, float]] = {"SGD": {}, **{name: {} for name in METHODS}, "Muon, matrix form": {}}
    print(f"{'d':>6}  steps (at step size)")
    for dim in dims:
        row = {"SGD": sgd_steps(dim, np.geomspace(0.016, 0.03, 6), seeds)}
        for name, (method, grid, longest) in METHODS.items():
            row[name] = sign_steps(method, dim, grid, seeds, longest)
        if dim <= muon_up_to:
            row["Muon, matrix form"] = muon_steps(dim, np.geomspace(0.01, 0.1, 6), seeds, longest=200)
        for name, (steps, _) in row.items():
            if math.isinf(steps):
                raise RuntimeError(f"{name} did not reach {TARGET} at d = {dim}: widen its grid of step sizes")
            results[name][dim] = steps
        print(f"{dim:6}  " + "   ".join(f"{name} {steps:.0f} ({size:.3f})" for name, (steps, size) in row.items()))
    slopes = {name: slope(list(counts), list(counts.values())) for name, counts in results.items() if len(counts) > 1}
    theory = {"SGD": 1.0}
    for name, fitted in slopes.items():
        print(f"{name}: slope of log(steps) against log(d) {fitted:.2f}, theory {theory.get(name, 0.0):.1f}")

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    draw({name: results[name] for name in slopes}, folder / "sparse_noise.png")
    print(f"Figure: {folder / 'sparse_noise.png'}")
    return slopes


if __name__ == "__main__":
    auto_cli(main)
