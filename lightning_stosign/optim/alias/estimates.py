"""What ALIAS knows of the loss: the curvature met so far and how far the loss can fall, and the step size they give.

The estimates are a dictionary of plain values and scalar tensors, so that they are part of any checkpoint:
``step`` (how many were taken), ``eta`` and ``curvature`` (its last term), ``decrease`` (dtilde) and ``d``, ``d0``, and
``bound``: the lower bound of the loss, None in Option I.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_stosign.optim.alias.totals import mean_over_processes

# How often the loss is compared with its lower bound, which makes the host wait for the device.
CHECK_BOUND_EVERY = 100
# d0 where none is given: this share of the first loss, or this much where there is no loss to be seen.
_FIRST_DECREASE = 1e-3


def first_estimates(loss: Tensor | None, options: Mapping[str, Any], like: Tensor) -> dict[str, Any]:
    """Return the estimates before the first step.

    Args:
        loss: f(x_0) on this process, a scalar, or None.
        options: ALIAS's.
        like: gives the estimates their dtype and device.

    Raises:
        RuntimeError: Option II, and no loss.
    """
    zero, bound, d0 = torch.zeros_like(like), options["loss_lower_bound"], options["d0"]
    first = None
    if bound is not None or d0 is None:
        first = None if loss is None else mean_over_processes(loss) * options["accumulate_grad_batches"]
    if d0 is None:
        d0 = _FIRST_DECREASE
        if first is not None:
            d0 = torch.where(first == 0, d0, d0 * first.abs())
    d0 = zero + d0
    estimates = {"step": 0, "eta": zero, "curvature": zero, "decrease": zero, "d": d0, "d0": d0, "bound": bound}
    if bound is None:
        return estimates
    if first is None:
        raise RuntimeError(
            f"loss_lower_bound={bound} needs optimizer.step(closure) with a closure that returns the loss"
        )
    return _gap_above({**estimates, "first_loss": first}, first.item(), bound)


def check_bound(estimates: dict[str, Any], loss: Tensor | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the estimates of Option II, put right if the loss is below its lower bound; warns the first time."""
    if estimates["bound"] is None or loss is None:
        return estimates
    loss = mean_over_processes(loss) * options["accumulate_grad_batches"]
    return _gap_above(estimates, loss.item(), options["loss_lower_bound"])


def next_estimates(
    estimates: dict[str, Any],
    grad_sum: Tensor,
    decrease: Tensor,
    difference: Tensor | None,
    motion: Tensor,
    *,
    along_step: bool = False,
) -> tuple[dict[str, Any], Tensor]:
    """Return the estimates of step t and its step size gamma_t; scalars, without a transfer to the host.

    Args:
        estimates: of step t - 1.
        grad_sum: ||g_t||_1.
        decrease: <g_t, x_{t-1} - x_t>.
        difference: ||g_t - g_{t-1}||_1, or with ``along_step`` <g_t - g_{t-1}, x_t - x_{t-1}>; None where it was not
            measured.
        motion: ||x_t - x_{t-1}||_inf.
        along_step: ALIAS's ``curvature="step"``.
    """
    # eta_t = eta_{t-1} + ||g_t - g_{t-1}||_1 / ||x_t - x_{t-1}||_inf; the last term again where it is not known
    curvature = estimates["curvature"]
    if difference is not None:
        ratio = difference / (motion.square() if along_step else motion)
        curvature = torch.where(ratio.isfinite(), ratio, curvature)  # not finite where nothing moved
    eta = estimates["eta"] + curvature.clamp(min=0)  # negative only along a step
    # dtilde_t = dtilde_{t-1} + <g_t, x_{t-1} - x_t>, to the second order where the curvature along the step is known
    total_decrease = estimates["decrease"] + decrease
    if along_step:
        total_decrease = total_decrease + curvature * motion.square() / 2
    # d_t = max(d_{t-1}, dtilde_t), or f(x_0) - f_low
    d = torch.maximum(estimates["d"], total_decrease) if estimates["bound"] is None else estimates["d"]
    # gamma_t = sqrt(d_t / eta_t); until there is a curvature, the step that would lower a linear loss by d0
    linear = torch.where(grad_sum > 0, estimates["d0"] / grad_sum, 0.0)
    gamma = torch.where(eta > 0, (2 * d / eta if along_step else d / eta).sqrt(), linear)
    moved = {"step": estimates["step"] + 1, "eta": eta, "curvature": curvature, "decrease": total_decrease, "d": d}
    return {**estimates, **moved}, gamma


def _gap_above(estimates: dict[str, Any], loss: float, claimed: float) -> dict[str, Any]:
    """Return the estimates with d = f(x_0) - bound, at least d0, and the bound no higher than the loss."""
    bound = estimates["bound"]
    if not math.isfinite(loss):
        return estimates
    if loss < bound:
        if bound == claimed:
            warnings.warn(
                f"ALIAS: the loss {loss:g} is below loss_lower_bound={claimed}. The lowest loss seen in every "
                f"{CHECK_BOUND_EVERY}th step is taken for the bound from now on.",
                RuntimeWarning,
                stacklevel=5,
            )
        bound = loss
    return {**estimates, "bound": bound, "d": torch.maximum(estimates["first_loss"] - bound, estimates["d0"])}
