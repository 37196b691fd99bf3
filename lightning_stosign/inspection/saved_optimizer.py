"""A saved optimizer, made readable again without its code."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_stosign.health.readers import Moments, read_moments
from lightning_stosign.inspection.checkpoint import printable
from lightning_stosign.inspection.optimizer_signatures import identify
from lightning_stosign.inspection.parameter_names import candidates_of, match_names, parameter_shape
from lightning_stosign.optim.states.storage import SCALE_SUFFIX, is_packed


class SavedParameter:
    """One parameter of a saved optimizer.

    Attributes:
        number: its number in the optimizer, as the state_dict counts.
        name: its name, None where it is not certain.
        shape: its shape, None where neither its state nor its name tells.
    """

    def __init__(self, number: int, name: str | None, group: dict[str, Any], state: dict[str, Any]) -> None:
        self.number = number
        self.name = name
        self.group = group
        self.state = state
        self.shape = parameter_shape(state)

    @property
    def label(self) -> str:
        """The name, or ``#<number>``."""
        return f"#{self.number}" if self.name is None else printable(self.name)

    def stored_as(self, state: str) -> str:
        """Return how a state is stored, e.g. ``"float32"`` or ``"float8_e4m3fn with scale"``."""
        value: Tensor = self.state[state]
        stored = str(value.dtype).removeprefix("torch.") if type(value) is Tensor else type(value).__name__
        if is_packed(self.state, state):
            stored = "float4_e2m1"
        return f"{stored} with scale" if state + SCALE_SUFFIX in self.state else stored


class SavedOptimizer:
    """One optimizer of a checkpoint.

    Args:
        state_dict: as its ``state_dict()`` returned it.

    Attributes:
        name: which optimizer it was, as far as its options and states tell.
        options: the options of its first param group.
        parameters: its parameters, in its order.
    """

    def __init__(self, state_dict: Mapping[str, Any]) -> None:
        groups, states = state_dict["param_groups"], state_dict["state"]
        signature = identify(groups, {name for state in states.values() for name in state})
        self.name = signature.name
        self.options = {key: value for key, value in groups[0].items() if key not in ("params", "param_names")}
        self.groups: list[list[SavedParameter]] = []
        number = 0
        for group in groups:
            names = _names_in(group)
            self.groups.append([])
            for key, name in zip(group["params"], names, strict=True):
                self.groups[-1].append(SavedParameter(number, name, group, states.get(key, {})))
                number += 1
        # The readers ask an optimizer for its class, its groups and its states; its constructor would ask for the
        # parameters themselves.
        self._shell: Optimizer = signature.optimizer_class.__new__(signature.optimizer_class)
        self._shell.state = {}  # type: ignore[assignment]

    @property
    def parameters(self) -> Iterator[SavedParameter]:
        """The parameters, in the optimizer's order."""
        for group in self.groups:
            yield from group

    def read(self, parameter: SavedParameter) -> Moments:
        """Return what a parameter's states hold, in float32; read from disk now."""
        stand_in = nn.Parameter(torch.empty(parameter.shape or (), device="meta"), requires_grad=False)
        self._shell.state = {stand_in: parameter.state}  # type: ignore[assignment]
        return read_moments(self._shell, stand_in, parameter.group)


def _names_in(group: Mapping[str, Any]) -> list[str | None]:
    """Return the names that a param group itself has: torch's ``param_names``, or FSDP's names instead of numbers."""
    keys = group["params"]
    names = group.get("param_names")
    if isinstance(names, list) and len(names) == len(keys) and all(isinstance(name, str) for name in names):
        return names
    return [key if isinstance(key, str) else None for key in keys]


def name_parameters(optimizers: Sequence[SavedOptimizer], weights: Mapping[str, Any]) -> None:
    """Give the parameters of all optimizers of a checkpoint their names, where these are certain.

    Args:
        optimizers: all of them, since no two share a parameter.
        weights: the checkpoint's state_dict.
    """
    named = {parameter.name for optimizer in optimizers for parameter in optimizer.parameters}
    candidates = [(name, shape) for name, shape in candidates_of(weights) if name not in named]
    unnamed = [
        [parameter for parameter in group if parameter.name is None]
        for optimizer in optimizers
        for group in optimizer.groups
    ]
    names = match_names([[parameter.shape for parameter in group] for group in unnamed], candidates)
    for group, group_names in zip(unnamed, names, strict=True):
        for parameter, name in zip(group, group_names, strict=True):
            parameter.name = name
    for optimizer in optimizers:
        for parameter in optimizer.parameters:
            if parameter.shape is None and parameter.name is not None and parameter.name in weights:
                parameter.shape = tuple(weights[parameter.name].shape)
