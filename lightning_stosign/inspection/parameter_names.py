"""Which parameter is number 17? A saved optimizer knows numbers and shapes, the saved weights names and shapes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_stosign.optim.states.storage import SHAPE_SUFFIX, is_packed

Shape = tuple[int, ...]

_BUFFERS = ("running_mean", "running_var")  # torch.nn's batch and instance norms


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
    changed = True
    while changed:
        changed = False
        for number, shapes in enumerate(groups):
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


def candidates_of(weights: Mapping[str, Any]) -> list[tuple[str, Shape]]:
    """Return name and shape of the weights that may be parameters: tied ones once, under their first name."""
    seen: set[tuple[int, Shape]] = set()
    candidates = []
    for name, value in weights.items():
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            continue
        shape = tuple(value.shape)
        if name.rpartition(".")[2] in _BUFFERS:
            continue
        if value.numel() > 0 and type(value) is Tensor:
            key = (value.data_ptr(), shape)
            if key in seen:
                continue
            seen.add(key)
        candidates.append((name, shape))
    return candidates


def parameter_shape(state: Mapping[str, Any]) -> Shape | None:
    """Return the shape of the parameter that a saved state belongs to, None where the state does not tell.

    Four-bit states come with it. Most others have their parameter's shape; factored second moments (Adafactor's)
    broadcast to it; what goes with a quantised state (scales, code books) is smaller than it.

    Example:
        >>> parameter_shape({"step": torch.tensor(3.0), "row_var": torch.ones(4, 1), "col_var": torch.ones(1, 2)})
        (4, 2)
    """
    for name in state:
        shape = state.get(name + SHAPE_SUFFIX)
        if is_packed(state, name) and isinstance(shape, Tensor) and shape.dtype == torch.int64 and shape.dim() == 1:
            return tuple(shape.tolist())
    tensors = [v for v in state.values() if isinstance(v, Tensor) and v.dim() > 0 and _may_hold_values(v)]
    if not tensors:
        return None
    shapes = [tuple(tensor.shape) for tensor in tensors]
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        return max(shapes, key=math.prod)


def _may_hold_values(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.uint8
