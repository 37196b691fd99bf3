"""A saved optimizer, made readable again without its code."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_stosign.health.readers import Moments, read_moments
from lightning_stosign.inspection.layouts import WRAPPER
from lightning_stosign.inspection.messages import printable
from lightning_stosign.inspection.optimizer_signatures import identify
from lightning_stosign.inspection.parameter_names import (
    candidates_of,
    match_names,
    match_unordered_names,
    parameter_shape,
    plain_name,
)
from lightning_stosign.inspection.pickle_reader import Unread
from lightning_stosign.inspection.stored_tensor import (
    Shape,
    StoredTensor,
    WrappedTensor,
    is_file_tensor,
    nbytes,
    numel,
    read_whole,
)
from lightning_stosign.inspection.torchao_states import dequantize, is_torchao
from lightning_stosign.optim.states.storage import SCALE_SUFFIX, is_packed

_LONGEST_RUN = 1 << 22  # values that are read at a time, of states that can be read in runs

# Where bitsandbytes keeps the parts of a quantised state, for the sake of FSDP.
_NESTED_STATE = "__bnb_optimizer_quant_state__"


class SavedParameter:
    """One parameter of a saved optimizer.

    Args:
        number: its number in the optimizer, as the state_dict counts.
        name: its name, None where it is not certain.
        options: of its param group, as plain values.
        state: its state as it was saved.

    Attributes:
        shape: its shape, None where neither its state nor its name tells.
        left_unread: the classes of those values of its state that are not read.
    """

    def __init__(self, number: int, name: str | None, options: dict[str, Any], state: Mapping[Any, Any]) -> None:
        self.number = number
        self.name = name
        self.options = options
        self.state: dict[str, Any] = {}
        self.left_unread: set[str] = set()
        nested = state.get(_NESTED_STATE)
        for key, value in [*state.items(), *(nested.items() if isinstance(nested, dict) else ())]:
            if not isinstance(key, str) or key == _NESTED_STATE:
                continue
            if isinstance(value, Unread):
                self.left_unread.add(value.name)
            elif isinstance(value, WrappedTensor) and not is_torchao(value):
                self.left_unread.add(value.class_name)
            elif is_file_tensor(value) or isinstance(value, (WrappedTensor, int, float, str)):
                self.state[key] = value
        self.shape = parameter_shape(self.state)

    @property
    def label(self) -> str:
        """The name, or ``#<number>``."""
        return f"#{self.number}" if self.name is None else printable(self.name)

    @property
    def nbytes(self) -> int:
        """How many bytes of the file its state is."""
        return sum(map(nbytes, self.state.values()))

    def stored_as(self, state: str) -> str:
        """Return how a state is stored, e.g. ``"float32"`` or ``"float8_e4m3fn with scale"``."""
        value = self.state.get(state)
        if value is None:  # bitsandbytes' have other names
            value = self.state.get("state2" if state == "exp_avg_sq" else "state1")
        if isinstance(value, WrappedTensor):
            return value.class_name.rpartition(".")[2]
        if value is None:
            return "unknown"
        stored = str(value.dtype).removeprefix("torch.")
        if is_packed(self.state, state):
            stored = "float4_e2m1"
        if stored == "uint8" and state not in self.state:
            return "8 bits with code book"
        return f"{stored} with scale" if state + SCALE_SUFFIX in self.state else stored

    def runs(self, multiple: int) -> list[tuple[int, int]]:
        """Return the runs in which the values of the state can be read.

        Args:
            multiple: where a run ends and another begins, the index is a multiple of it.

        Returns:
            Pairs of row-major indices, (begin, end); one pair where the state has to be read as a whole.
        """
        size = math.prod(self.shape or ())
        if size <= _LONGEST_RUN or not self._can_be_cut():
            return [(0, size)]
        step = max(_LONGEST_RUN // multiple, 1) * multiple
        return [(start, min(start + step, size)) for start in range(0, size, step)]

    def _can_be_cut(self) -> bool:
        """Return whether each value of each state belongs to one value of the parameter."""
        return all(
            not isinstance(value, WrappedTensor)
            and (numel(value) == 1 or (value.shape == self.shape and value.dtype != torch.uint8))
            and (not isinstance(value, StoredTensor) or value.is_contiguous)
            for value in self.state.values()
            if is_file_tensor(value) or isinstance(value, WrappedTensor)
        )

    def read(self, start: int, stop: int) -> tuple[Shape, dict[str, Any]]:
        """Read a run of the state; returns the shape of what it belongs to, and the state."""
        shape = self.shape or ()
        if (start, stop) == (0, math.prod(shape)):
            return shape, {name: _in_memory(value) for name, value in self.state.items()}
        run: dict[str, Any] = {}
        for name, value in self.state.items():
            cut = is_file_tensor(value) and numel(value) != 1
            run[name] = value.read_run(start, stop) if cut else _in_memory(value)
        return (stop - start,), run


def _in_memory(value: Any) -> Any:
    """Return what a value of a state was before it was saved."""
    if is_file_tensor(value):
        return read_whole(value)
    if isinstance(value, WrappedTensor):
        return dequantize(value)
    return value


class SavedOptimizer:
    """One optimizer of a checkpoint.

    Args:
        state_dict: as its ``state_dict()`` returned it.
        label: what tells it from the checkpoint's others; empty for the only one.

    Attributes:
        name: which optimizer it was, as far as its options and states tell.
        options: the options of its first param group, as plain values or texts.
        groups: its parameters by param group, in its order.
    """

    def __init__(self, state_dict: Mapping[str, Any], label: str = "") -> None:
        self.label = printable(label)
        states = {key: value if isinstance(value, dict) else {} for key, value in state_dict["state"].items()}
        self.groups: list[list[SavedParameter]] = []
        options_of_groups = []
        number = 0
        for group in state_dict["param_groups"]:
            options = plain_options(group)
            options_of_groups.append(options)
            self.groups.append([])
            for key, name in zip(group["params"], _names_in(group), strict=True):
                self.groups[-1].append(SavedParameter(number, name, options, states.get(key, {})))
                number += 1
        names = {name for parameter in self.parameters for name in parameter.state}
        signature = identify(options_of_groups, names)
        wrapper = state_dict.get(WRAPPER)
        self.name = signature.name if wrapper is None else f"{wrapper} of {signature.name}"
        self.options = {
            key: value
            for key, value in state_dict["param_groups"][0].items()
            if isinstance(key, str) and key not in ("params", "param_names")
        }
        self._class = signature.optimizer_class
        self._attributes = signature.attributes(options_of_groups[0], names)

    @property
    def parameters(self) -> Iterator[SavedParameter]:
        """The parameters, in the optimizer's order."""
        for group in self.groups:
            yield from group

    def read(self, parameter: SavedParameter, start: int, stop: int) -> Moments:
        """Return what a run of a parameter's states holds, in float32; read from disk now."""
        shape, state = parameter.read(start, stop)
        # The readers ask an optimizer for its class, its groups and its states; its constructor would ask for the
        # parameters themselves.
        shell: Optimizer = self._class.__new__(self._class)
        vars(shell).update(defaults=parameter.options, **self._attributes)
        stand_in = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
        shell.state = {stand_in: state}  # type: ignore[assignment]
        return read_moments(shell, stand_in, parameter.options)


def plain_options(group: Mapping[Any, Any]) -> dict[str, Any]:
    """Return those options of a param group that are numbers, texts or tuples of numbers; tensors of one value too."""
    options: dict[str, Any] = {}
    for key, value in group.items():
        if is_file_tensor(value) and numel(value) == 1 and not value.dtype.is_complex:
            value = read_whole(value).item()
        plain = value is None or isinstance(value, (bool, int, float, str))
        if isinstance(value, (tuple, list)):
            value = tuple(value)
            plain = len(value) <= 100 and all(isinstance(each, (bool, int, float)) for each in value)
        if isinstance(key, str) and plain and key not in ("params", "param_names"):
            options[key] = value
    return options


def _names_in(group: Mapping[str, Any]) -> list[str | None]:
    """Return the names that a param group itself has: torch's ``param_names``, or FSDP's names instead of numbers."""
    keys = group["params"]
    names = group.get("param_names")
    if isinstance(names, list) and len(names) == len(keys) and all(isinstance(name, str) for name in names):
        return [plain_name(name) for name in names]
    return [plain_name(key) if isinstance(key, str) else None for key in keys]


def name_parameters(optimizers: Sequence[SavedOptimizer], weights: Mapping[str, Any], ordered: bool = True) -> None:
    """Give the parameters of all optimizers of a checkpoint their names, where these are certain.

    Args:
        optimizers: all of them, since no two share a parameter.
        weights: the model's tensors by name.
        ordered: whether these are in the model's order.
    """
    named = {parameter.name for optimizer in optimizers for parameter in optimizer.parameters}
    candidates = [(name, shape) for name, shape in candidates_of(weights) if name not in named]
    unnamed = [
        [parameter for parameter in group if parameter.name is None]
        for optimizer in optimizers
        for group in optimizer.groups
    ]
    match = match_names if ordered else match_unordered_names
    names = match([[parameter.shape for parameter in group] for group in unnamed], candidates)
    for group, group_names in zip(unnamed, names, strict=True):
        for parameter, name in zip(group, group_names, strict=True):
            parameter.name = name
    for optimizer in optimizers:
        for parameter in optimizer.parameters:
            if parameter.shape is None and parameter.name is not None and parameter.name in weights:
                parameter.shape = tuple(weights[parameter.name].shape)
