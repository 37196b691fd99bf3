"""Optimizers inside optimizers: Lookahead, schedule-free wrappers, ZeroRedundancyOptimizer, a user's own."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def optimizers_within(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer and those that it holds in attributes (also in lists and dictionaries), outer ones first."""
    found: dict[int, Optimizer] = {id(optimizer): optimizer}
    waiting: list[Any] = [optimizer]
    while waiting:
        for inner in _held(vars(waiting.pop(0)).values()):
            if id(inner) not in found:
                found[id(inner)] = inner
                waiting.append(inner)
    return list(found.values())


def _held(values: Iterable[Any]) -> Iterator[Optimizer]:
    for value in values:
        if isinstance(value, Optimizer):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (item for item in value if isinstance(item, Optimizer))
        elif isinstance(value, dict):
            yield from (item for item in value.values() if isinstance(item, Optimizer))


def keeper_of(optimizer: Optimizer, param: Tensor) -> Optimizer:
    """Return the innermost of an optimizer's optimizers that has a state of a parameter, or the optimizer itself.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.ones(2))
        >>> class Wrapper(torch.optim.Optimizer):
        ...     def __init__(self, inner):
        ...         super().__init__(inner.param_groups, {})
        ...         self.inner = inner
        >>> adam = torch.optim.Adam([x])
        >>> x.grad = torch.ones(2)
        >>> adam.step()
        >>> type(keeper_of(Wrapper(adam), x)).__name__
        'Adam'
    """
    return next((each for each in reversed(optimizers_within(optimizer)) if each.state.get(param)), optimizer)


def group_of(optimizer: Optimizer, param: Tensor) -> dict[str, Any] | None:
    """Return the param group that holds a parameter."""
    return next((g for g in optimizer.param_groups if any(each is param for each in g["params"])), None)
