"""States that differ between workers: into a checkpoint and back, also to another number of workers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_stosign.optim.states.state_precision import FLOAT32, precision_of
from lightning_stosign.optim.states.storage import SCALE_SUFFIX, SHAPE_SUFFIX, is_packed, read_state, write_state
from lightning_stosign.optim.wrappers.shadow import OUTER_STEP
from lightning_stosign.strategies.wire import Wire

OwnStates = dict[int, dict[str, Tensor]]
"""One worker's state tensors, by the parameter's position in the optimizer and the state's name."""

_ENVELOPE = "exp_inf"


def own_states(optimizer: Optimizer, is_own: Callable[[Tensor], bool]) -> OwnStates:
    """Return the state tensors of the parameters that ``is_own`` says have states of this worker's own."""
    return {
        index: {name: value for name, value in state.items() if _differs(name, value)}
        for index, param, _, state in _with_state(optimizer)
        if is_own(param)
    }


def nbytes(states: OwnStates) -> int:
    """Return how many bytes the state tensors take."""
    return sum(value.nbytes for state in states.values() for value in state.values())


def gather(states: OwnStates, wire: Wire) -> list[OwnStates]:
    """Return every worker's states on worker 0, by rank and on the CPU; an empty list on the others."""
    gathered: list[OwnStates] = [{} for _ in range(wire.workers)] if wire.rank == 0 else []
    for index, state in states.items():
        for name in sorted(state):
            mine = state[name].contiguous()
            for of_worker, data in zip(gathered, wire.gather(mine.reshape(-1).view(torch.uint8)), strict=True):
                of_worker.setdefault(index, {})[name] = data.cpu().view(mine.dtype).view(mine.shape)
    return gathered


def load_own(optimizer: Optimizer, states: OwnStates) -> None:
    """Put one worker's state tensors into an optimizer that has loaded the state_dict of any worker."""
    for index, _, _, state in _with_state(optimizer):
        for name, value in states.get(index, {}).items():
            state[name].copy_(value)


def load_mean(optimizer: Optimizer, states: Sequence[OwnStates]) -> None:
    """Put the mean over workers into an optimizer; envelopes are rounded up, so that they cover the momentum."""
    for index, _, group, state in _with_state(optimizer):
        of_workers = [of_worker[index] for of_worker in states if index in of_worker]
        if not of_workers:
            continue
        precision = precision_of(state, group) or FLOAT32
        for name in filter(partial(_is_average, state), of_workers[0]):
            whole = [{**state, **{key: value.to(state[key].device) for key, value in w.items()}} for w in of_workers]
            mean = torch.stack([read_state(of_worker, name, precision) for of_worker in whole]).mean(0)
            write_state(state, name, mean, precision, rounding="up" if name == _ENVELOPE else "nearest")


def _differs(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and name not in ("step", OUTER_STEP) and not name.endswith(SHAPE_SUFFIX)


def _is_average(state: Mapping[str, Any], name: str) -> bool:
    """Return whether a state tensor holds values of its own, and not the scales of another one."""
    return is_packed(state, name) or (state[name].is_floating_point() and not name.endswith(SCALE_SUFFIX))


def _with_state(optimizer: Optimizer) -> Iterator[tuple[int, Tensor, Mapping[str, Any], dict[str, Any]]]:
    """Yield (position, parameter, group, state) of the parameters that have a state."""
    index = -1
    for group in optimizer.param_groups:
        for param in group["params"]:
            index += 1
            if optimizer.state.get(param):
                yield index, param, group, optimizer.state[param]
