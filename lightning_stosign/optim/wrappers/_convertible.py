"""Can this optimizer be converted? A trial on made-up gradients says so, for an optimizer of any library."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer, SparseAdam

from lightning_stosign.optim.wrappers.shadow import BaseFactory, build_base

_STEPS = 8  # beyond the first, unnormalised steps of RAdam
_SIDE = 4  # a trial parameter has this many entries along each dimension

_REASONS: dict[type[Optimizer], str] = {
    LBFGS: "it evaluates the closure several times a step, each time at parameters that it has moved",
    SparseAdam: "it takes sparse gradients, whose absent coordinates have no update to take the sign of",
}


def refuse_unless_convertible(
    factory: BaseFactory, options: dict[str, Any], params: list[Tensor], *, normalised: bool
) -> None:
    """Raise unless a base's update is its learning rate times a function of the gradients.

    Args:
        factory: builds the base.
        options: the base's options for these parameters.
        params: the parameters; only their devices and numbers of dimensions matter.
        normalised: whether that function must be bounded, too: not grow in proportion to the gradients.

    Raises:
        TypeError: ``factory`` does not build a torch optimizer.
        ValueError: the base cannot be converted; the message says why.
    """
    for device, dims in sorted({(_trial_device(param), param.dim()) for param in params}, key=str):
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            _refuse(factory, options, [_SIDE] * dims, device, normalised)


def _refuse(
    factory: BaseFactory, options: dict[str, Any], shape: list[int], device: torch.device, normalised: bool
) -> None:
    generator = torch.Generator("cpu").manual_seed(0)
    # With a mean, so that parameters leave their start: learning-rate-free methods go by how far they have got.
    on_cpu: Any = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    mean = torch.randn(shape, **on_cpu)
    grads = (mean + 0.5 * torch.randn(_STEPS, *shape, **on_cpu)).to(device)
    start = torch.randn(shape, **on_cpu).to(device)
    updates = _updates(factory, options, grads)
    name = type(build_base(factory, {"params": [torch.nn.Parameter(start)], **options})).__name__
    largest = updates.abs().max()
    # From elsewhere, at half the learning rate and without going back to where it was.
    free = _updates(factory, options, grads, start=start * largest, lr=0.5)
    if not torch.allclose(free, updates / 2, rtol=0, atol=1e-5 * float(largest)):
        raise ValueError(
            f"base: {name} cannot be converted: its update is not its learning rate times a function of the gradients "
            "(it depends on the parameters' values, on chance, or otherwise on the learning rate)"
        )
    if normalised:
        louder = _updates(factory, options, grads * 1024)[-1].norm()
        if louder > 2 * updates[-1].norm():
            raise ValueError(
                f"base: the updates of {name} grow with the gradients, but the sign of an update plus noise in [-1, 1] "
                "is unbiased only for updates in [-1, 1]; pass normalize=True to divide them by their running maximum"
            )


def _updates(
    factory: BaseFactory, options: dict[str, Any], grads: Tensor, *, start: Tensor | None = None, lr: float = 1.0
) -> Tensor:
    """Return the base's steps on given gradients, ``[steps, *shape]``: from ``start``, or each from 0."""
    param = torch.nn.Parameter(torch.zeros_like(grads[0]) if start is None else start.clone())
    base = build_base(factory, {"params": [param], **options})
    reason = next((reason for cls, reason in _REASONS.items() if isinstance(base, cls)), None)
    if "lr" not in base.param_groups[0]:
        reason = "it has no learning rate"
    if reason is not None:
        raise ValueError(f"base: {type(base).__name__} cannot be converted: {reason}")
    for group in base.param_groups:
        set_lr(group, lr)
    updates = []
    for grad in grads:
        if start is None:
            param.data.zero_()
        before = param.detach().clone()
        param.grad = grad.clone()
        try:
            base.step()
        except Exception as error:  # of whatever kind: the reason is in the message
            raise ValueError(
                f"base: {type(base).__name__} cannot be converted: its step on a {param.dim()}-dimensional parameter, "
                f"given a gradient and no closure, fails: {error}"
            ) from error
        updates.append(before - param.detach())
    return torch.stack(updates)


def set_lr(base_group: dict[str, Any], lr: float) -> None:
    """Give a base's param group this learning rate, and no weight decay."""
    if isinstance(base_group["lr"], Tensor):  # torchao's optimizers insist on it
        base_group["lr"].fill_(lr)
    else:
        base_group["lr"] = lr
    if "weight_decay" in base_group:
        base_group["weight_decay"] = 0.0


def _trial_device(param: Tensor) -> torch.device:
    return torch.device("cpu") if param.is_meta else param.device
