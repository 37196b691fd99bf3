"""A second gradient on the same mini-batch, at another point: what a curvature measured on mini-batches needs.

The difference of two gradients of *different* mini-batches is mostly their noise. Both must come from one mini-batch
and from the same dropout masks, so the closure that computes the one is run once more, with the same random numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_stosign.optim.sharding import local, local_grad

Closure = Callable[[], Any]


def gradients_at(params: Sequence[Tensor], points: Sequence[Tensor], closure: Closure) -> list[Tensor | None]:
    """Return the gradients that ``closure`` computes at other values of the parameters.

    Parameters, gradients and torch's global random generators are afterwards as they were, so that a call of the
    closure that follows meets the same random numbers. A closure that adds to the gradients it finds (the last
    micro-batch of an accumulated gradient) adds to the same ones in both calls. Buffers that the closure changes, such
    as the running statistics of a BatchNorm, stay changed. Costs one evaluation, and memory for a copy of the
    parameters and of their gradients.

    Args:
        params: the parameters; may be DTensors.
        points: this process's part of their values at the other point, shaped as they are.
        closure: clears the gradients if it wants to, computes the loss and its gradients.

    Returns:
        This process's part of each gradient, None where there is none.
    """
    with torch.no_grad():
        values = [local(param).clone() for param in params]
        found = [None if param.grad is None else param.grad.clone() for param in params]
        _assign(params, points)
    try:
        with torch.random.fork_rng(**_generators(params)), torch.enable_grad():
            closure()
        with torch.no_grad():
            # Clones: under DDP(gradient_as_bucket_view=True) the next backward writes into the same memory.
            return [None if param.grad is None else local_grad(param).clone() for param in params]
    finally:
        with torch.no_grad():
            _assign(params, values)
        for param, grad in zip(params, found, strict=True):
            param.grad = grad


def _assign(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for param, value in zip(params, values, strict=True):
        local(param).copy_(value)


def _generators(params: Sequence[Tensor]) -> dict[str, Any]:
    """Return which random generators a model on these devices may draw from, as fork_rng's arguments: the CPU's too."""
    devices = sorted({(param.device.type, param.device.index or 0) for param in params if param.device.type != "cpu"})
    if not devices or devices[0][0] == "meta":
        return {"devices": []}
    return {"devices": [index for _, index in devices], "device_type": devices[0][0]}
