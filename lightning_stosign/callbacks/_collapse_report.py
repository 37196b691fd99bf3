"""StateCollapseGuard's report: why a state has collapsed, layer by layer, after the paper's Table 12."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_stosign.callbacks._collapse_look import Look
from lightning_stosign.health.snapshot import Snapshot
from lightning_stosign.optim.emulation import as_stored, is_moment, state_degree
from lightning_stosign.optim.numerics.fp4 import E2M1_MAX
from lightning_stosign.optim.promotion import state_precision_of
from lightning_stosign.optim.states.state_precision import StatePrecision

MOST_ROWS = 20


def table(optimizer: Optimizer, look: Look, since: Mapping[str, int]) -> str:
    """Return a table of layers in Markdown: since when they are sick, zeros, gradients, and what the storage can hold.

    Args:
        optimizer: the optimizer.
        look: what has been seen of its states.
        since: the step of the first look at which a layer was sick, for each sick layer, the worst ones first.
    """
    shown = list(since)[:MOST_ROWS]
    gradients = Snapshot()
    for layer in shown:
        grad = look.params[layer].grad
        if grad is not None:
            gradients.add_gradient(layer, grad)
    numbers, _ = gradients.records(per_layer=True)
    titles = ["layer", "since step", "stored in"]
    titles += [f"zeros of {state}" for state in look.states] + ["max abs g", "max g*g"]
    titles += [f"smallest {state}" for state in look.watched]
    rows = []
    for layer in shown:
        precision = _storage(optimizer, look.params[layer])
        row = [layer, str(since[layer]), "-" if precision is None else str(precision)]
        row += [_percent(look.number(f"zero_fraction/{state}", layer)) for state in look.states]
        row += [_number(numbers.get(f"{tag}/{layer}")) for tag in ("grad_abs_max", "grad_square_max")]
        for state in look.watched:
            largest = look.number(f"abs_max/{state}", layer)
            if precision is None or largest is None:
                row.append("-")
            else:
                row.append(_number(smallest_number(precision, state_degree(state), largest)))
        rows.append(row)
    text = "\n".join(_markdown([titles, ["---"] * len(titles), *rows]))
    if len(since) > len(shown):
        text += f"\n\n... and {len(since) - len(shown)} more layers"
    return f"{text}\n\nRounded to nearest, a value below half of the smallest number that its storage holds becomes 0."


def smallest_number(precision: StatePrecision, degree: int, largest: float) -> float:
    """Return the smallest nonzero number that a stored state can hold; below half of it a value becomes 0.

    Args:
        precision: how the state is stored.
        degree: its :func:`state_degree`.
        largest: the largest magnitude in it, which its scale is made of; under block scaling that of the block with
            the largest values is returned.

    Example:
        >>> smallest_number(StatePrecision.parse("fp8-raw"), degree=2, largest=1.0)  # E4M3: 2**-9
        0.001953125
        >>> smallest_number(StatePrecision.parse("fp8"), degree=2, largest=448 / 1024) * 1024
        0.001953125
    """
    if precision.is_fp4:
        value = torch.tensor([largest], dtype=torch.float32, device="cpu")
        stored = as_stored(value, precision).item()  # as 6 times the scale of its block
        return 0.5 * stored / E2M1_MAX
    info = torch.finfo(precision.dtype)
    smallest = info.smallest_normal * info.eps
    if precision.scaling == "none":
        return smallest / precision.static_scale**degree
    if largest == 0 or not math.isfinite(largest):
        return smallest
    mantissa, exponent = math.frexp(largest / info.max)
    return math.ldexp(smallest, max(exponent - (mantissa == 0.5), -126))


def _storage(optimizer: Optimizer, param: Tensor) -> StatePrecision | None:
    """Return how a parameter's states are stored, or None for a storage that only the optimizer knows."""
    precision = state_precision_of(optimizer, param)
    if precision is not None:
        return precision
    values = [v for name, v in optimizer.state[param].items() if is_moment(name, v, param)]
    plain = all(type(v) in (Tensor, DTensor) and v.dtype in (torch.float32, torch.bfloat16) for v in values)
    return StatePrecision(values[0].dtype) if plain else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        fill = "-" if row[0] == "---" else " "
        lines.append("| " + " | ".join(cell.ljust(w, fill) for cell, w in zip(row, widths, strict=True)) + " |")
    return lines
