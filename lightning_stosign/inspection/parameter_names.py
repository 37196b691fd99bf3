"""Which parameter is number 17? A saved optimizer knows numbers and shapes, the saved weights names and shapes."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_stosign.inspection.stored_tensor import Shape, StoredTensor, WrappedTensor, is_file_tensor
from lightning_stosign.optim.states.storage import SHAPE_SUFFIX, is_packed

_BUFFERS = ("running_mean", "running_var")  # torch.nn's batch and instance norms
_WRAPPERS = ("_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_MOST_STEPS = 5_000_000  # of a search for names, which many param groups would make long


def plain_name(name: str) -> str:
    """Return a parameter's name without what torch.compile, DDP, FSDP and Lightning's Fabric put into it.

    Example:
        >>> plain_name("_forward_module.module._orig_mod.layers.0._checkpoint_wrapped_module.weight")
        'layers.0.weight'
    """
    first, _, rest = name.partition(".")
    while rest and first in _WRAPPERS:
        name = rest
        first, _, rest = name.partition(".")
    # "module" is a name that models use themselves; the others are not.
    return ".".join(part for part in name.split(".") if part == "module" or part not in _WRAPPERS) or name


def match_names(
    groups: Sequence[Sequence[Shape | None]], candidates: Sequence[tuple[str, Shape]]
) -> list[list[str | None]]:
    """Name the parameters of param groups, each where only one name is possible.

    A group lists its parameters in the order of the weights, with any left out (``named_parameters()`` filtered), and
    no parameter is in two groups. A parameter's name is certain if the first and the last place it can take agree.

    Args:
        groups: for each group the shape of each parameter, None where unknown.
        candidates: name and shape of each of the weights, in order.

    Returns:
        For each group the name of each parameter, None where it is not certain.

    Example:
        >>> weights = [("a.weight", (2, 2)), ("a.bias", (2,)), ("b.weight", (2, 2)), ("b.bias", (2,))]
        >>> match_names([[(2, 2), (2, 2)], [(2,)]], weights)
        [['a.weight', 'b.weight'], [None]]
    """
    owner: dict[int, int] = {}  # the group that a candidate certainly belongs to
    places: list[list[int | None]] = [[None] * len(shapes) for shapes in groups]
    changed, steps = True, 0
    while changed:
        changed = False
        for number, shapes in enumerate(groups):
            steps += len(candidates)
            if steps > _MOST_STEPS:
                return [[None if i is None else candidates[i][0] for i in group] for group in places]
            free = [i for i in range(len(candidates)) if owner.get(i, number) == number]
            first = _first_fit(shapes, [candidates[i][1] for i in free])
            last = _first_fit(shapes[::-1], [candidates[i][1] for i in reversed(free)])
            if first is None or last is None:
                continue
            for position, (low, high) in enumerate(zip(first, reversed(last), strict=True)):
                place = free[low]
                if low == len(free) - 1 - high and places[number][position] is None:
                    places[number][position], owner[place] = place, number
                    changed = True
    return [[None if place is None else candidates[place][0] for place in group] for group in places]


def _first_fit(shapes: Sequence[Shape | None], candidates: Sequence[Shape]) -> list[int] | None:
    """Place each shape on the first candidate that is left and fits, in order; None if one finds no place."""
    remaining = iter(enumerate(candidates))
    places = []
    for shape in shapes:
        place = next((i for i, candidate in remaining if shape is None or shape == candidate), None)
        if place is None:
            return None
        places.append(place)
    return places


def match_unordered_names(
    groups: Sequence[Sequence[Shape | None]], candidates: Sequence[tuple[str, Shape]]
) -> list[list[str | None]]:
    """Name the parameters of param groups by the names of weights in no known order, each where only one is possible.

    The parameters of one shape have certain names if as many weights have the shape, and these are one layer's weight,
    or one weight in each of the numbered layers. Arguments and result as of :func:`match_names`.

    Example:
        >>> weights = [("h.10.fc.weight", (8, 2)), ("h.9.fc.weight", (8, 2)), ("norm.a", (2,)), ("norm.b", (2,))]
        >>> match_unordered_names([[(8, 2), (8, 2), (2,), (2,)]], weights)
        [['h.9.fc.weight', 'h.10.fc.weight', None, None]]
    """
    by_shape: dict[Shape, list[str]] = defaultdict(list)
    for name, candidate in candidates:
        by_shape[candidate].append(name)
    wanted: dict[Shape, list[tuple[int, int]]] = defaultdict(list)
    for number, shapes in enumerate(groups):
        for position, shape in enumerate(shapes):
            if shape is not None:
                wanted[shape].append((number, position))
    result: list[list[str | None]] = [[None] * len(shapes) for shapes in groups]
    for wanted_shape, places in wanted.items():
        names = by_shape[wanted_shape]
        one_kind = len({_NUMBER.sub(".#.", name, count=1) for name in names}) == 1
        if len(names) == len(places) and one_kind and len({number for number, _ in places}) == 1:
            for (number, position), weight in zip(places, sorted(names, key=_layer_number), strict=True):
                result[number][position] = weight
    return result


_NUMBER = re.compile(r"\.(\d{1,9})\.")


def _layer_number(name: str) -> int:
    found = _NUMBER.search(name)
    return int(found[1]) if found else 0


def candidates_of(weights: Mapping[str, Any]) -> list[tuple[str, Shape]]:
    """Return name and shape of the weights that may be parameters: tied ones once, under their first name."""
    seen: set[tuple[Any, ...]] = set()
    candidates = []
    for name, value in weights.items():
        if not is_file_tensor(value) and not isinstance(value, WrappedTensor):
            continue
        if not (value.dtype.is_floating_point or value.dtype.is_complex) or name.rpartition(".")[2] in _BUFFERS:
            continue
        if math.prod(value.shape) > 0 and isinstance(value, StoredTensor):
            place = (value.storage.file.path, value.storage.offset, value.offset, value.shape)
            if place in seen:
                continue
            seen.add(place)
        candidates.append((name, value.shape))
    return candidates


def parameter_shape(state: Mapping[str, Any]) -> Shape | None:
    """Return the shape of the parameter that a saved state belongs to, None where the state does not tell.

    Four-bit states come with it. Most others have their parameter's shape; factored second moments (Adafactor's)
    broadcast to it; what goes with a quantised state (scales, code books) is smaller than it.

    Example:
        >>> step, row, column = (torch.empty(shape, device="meta") for shape in [(), (4, 1), (1, 2)])
        >>> parameter_shape({"step": step, "row_var": row, "col_var": column})
        (4, 2)
    """
    shape: Any
    for name in state:
        shape = state.get(name + SHAPE_SUFFIX)
        if is_packed(state, name) and is_file_tensor(shape) and shape.dtype == torch.int64 and len(shape.shape) == 1:
            return tuple(shape.read_run(0, math.prod(shape.shape)).tolist())
    shapes: list[Shape] = [
        tuple(value.shape) for value in state.values() if _may_hold_values(value) and len(value.shape) > 0
    ]
    if not shapes:
        return None
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        return max(shapes, key=math.prod)


def _may_hold_values(value: Any) -> bool:
    return (is_file_tensor(value) or isinstance(value, (WrappedTensor, torch.Tensor))) and (
        value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.uint8
    )
