"""A step that is none: torch.distributed.checkpoint takes one to see an optimizer's state before there is any.

``get_optimizer_state_dict`` and ``set_optimizer_state_dict`` call ``step()`` at learning rate 0 on gradients of zeros.
The states that it creates are wanted; that it counts is not, as bias corrections and noise go by the count.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stosign.optim.sharding import local_grad, max_over_shards


def is_rehearsal(optimizer: Optimizer, closure: Callable[[], Any] | None) -> bool:
    """Return whether this would be an optimizer's first step, at learning rate 0 and on zeros alone.

    Every process of a sharded model gets the same answer. Costs nothing where there is a state or a learning rate.
    """
    if closure is not None or optimizer.state or any(float(group["lr"]) != 0 for group in optimizer.param_groups):
        return False
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not params or any(param.grad.is_sparse for param in params):
        return False
    flags = [torch.tensor(float(local_grad(param).any()), device="cpu", dtype=torch.float32) for param in params]
    max_over_shards(zip(params, flags, strict=True))
    return not any(bool(flag) for flag in flags)


def rehearse(optimizer: Optimizer, step: Callable[[], Any], count: str) -> None:
    """Take the step, and leave of it nothing but the states, with a count of 0.

    Args:
        optimizer: the optimizer.
        step: takes its step.
        count: the name of the count in the states.
    """
    options = [dict(group) for group in optimizer.param_groups]
    step()
    for group, before in zip(optimizer.param_groups, options, strict=True):
        group.clear()
        group.update(before)
    for state in optimizer.state.values():
        if isinstance(state.get(count), Tensor):
            state[count].zero_()
