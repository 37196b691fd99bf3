"""The whole update as one kernel of torch.compile's: on accelerators, and where native.py finds no compiler it can use.

A kernel sees a tensor as rows of :data:`ROW` values (of a block, under block scaling). The number of rows is dynamic
and the length of a row is not, so that one compilation serves all shapes and the inner loop is vectorised. FP8 states
are seen as their bits. What is compiled is :class:`UpdateSpec`, which the eager path runs as it is: both give the same
bits on the CPU.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_stosign.optim.kernels.eager import Constants, RowNoise, UpdateSpec
from lightning_stosign.optim.numerics.noise import weyl_sequence
from lightning_stosign.optim.states.state_precision import FP8_DTYPES

ROW = 256

# Inductor would go on with the unrounded value where a rounded one is converted back to float32, and would cut a chain
# of many operations in two, with a buffer as large as the parameter between them.
_OPTIONS: dict[str, Any] = {"emulate_precision_casts": True, "realize_opcount_threshold": 1000}


class Rows(NamedTuple):
    """Values ``first`` to ``first + numel`` of a tensor in row-major order, as rows of ``length`` values."""

    first: int
    numel: int
    length: int


@lru_cache(maxsize=1)
def has_compiler() -> bool:
    """Return whether torch.compile works on this machine, by trying it once; warns if it does not."""
    try:
        torch.compile(_trial, dynamic=True, fullgraph=True)(torch.zeros(2))
    except RuntimeError as error:  # no compiler, no Python headers, a compiler that fails
        reason = str(error).strip().splitlines()[0]
        warnings.warn(f"No compiler for the fused step, falling back to the eager one: {reason}", stacklevel=2)
        return False
    return True


def _trial(x: Tensor) -> Tensor:
    return x + 1


def compiled_update(
    spec: UpdateSpec,
    tensors: Sequence[Tensor],
    rows: Rows,
    scales: Sequence[Tensor | None],
    new_scales: Tensor | None,
    words: Tensor,
    sequence: Tensor,
    constants: Tensor,
) -> None:
    """Run :meth:`UpdateSpec.update` compiled.

    Args:
        spec: the update.
        tensors: parameter, gradient and states, contiguous.
        rows: which of their values, at least two rows.
        scales: of the states, as in :class:`StoredRows`.
        new_scales: likewise.
        words: as in :class:`RowNoise`; contiguous: an expanded tensor would be compiled apart.
        sequence: likewise.
        constants: the numbers of the step, from :func:`as_tensor`.
    """
    device = tensors[0].device
    kernel = _compiled(_update, spec, tuple(tensor.dtype for tensor in tensors), device)
    kernel(
        [_rows(tensor, rows) for tensor in tensors],
        [_operand(scale) for scale in scales],
        None if new_scales is None else _static(new_scales),
        _without_base(words),
        _without_base(sequence),
        _row_sequence(rows.length, device),
        constants,
        spec,
    )


def compiled_largest(
    spec: UpdateSpec, tensors: Sequence[Tensor], rows: Rows, scales: Sequence[Tensor | None], constants: Tensor
) -> Tensor:
    """Run :meth:`UpdateSpec.largest` compiled; arguments as above."""
    kernel = _compiled(_largest, spec, tuple(tensor.dtype for tensor in tensors), tensors[0].device)
    operands = [_rows(tensor, rows) for tensor in tensors]
    return kernel(operands, [_operand(scale) for scale in scales], constants, spec)


def _update(
    rows: list[Tensor],
    scales: list[Tensor | None],
    new_scales: Tensor | None,
    words: Tensor,
    sequence: Tensor,
    row: Tensor,
    constants: Tensor,
    spec: UpdateSpec,
) -> None:
    param, grad, *stored = rows
    noise = RowNoise(spec.streams, words, sequence, row)
    spec.update(param, grad, spec.stored(param, stored, scales, new_scales), noise, _from_tensor(constants))


def _largest(rows: list[Tensor], scales: list[Tensor | None], constants: Tensor, spec: UpdateSpec) -> Tensor:
    param, grad, *stored = rows
    return spec.largest(param, grad, spec.stored(param, stored, scales), _from_tensor(constants))


def as_tensor(constants: Constants, device: torch.device) -> Tensor:
    """Return the numbers of a step as a float32 tensor: a change of one does not recompile."""
    numbers = constants if constants.finite is not True else constants[:-1]
    if any(isinstance(number, Tensor) for number in numbers):
        tensors = [torch.as_tensor(number, dtype=torch.float32, device=device) for number in numbers]
        return _static(torch.stack(tensors))
    return _static(torch.tensor(numbers, dtype=torch.float32, device=device))


def _from_tensor(constants: Tensor) -> Constants:
    lr, decay, weight, beta2, *finite = constants.unbind()
    return Constants(lr, decay, weight, beta2, finite[0] != 0 if finite else True)


def _static(tensor: Tensor) -> Tensor:
    # Else a parameter of as many rows as this has values would be compiled apart.
    torch._dynamo.mark_static(tensor)
    return tensor


@lru_cache(maxsize=32)
def _row_sequence(numel: int, device: torch.device) -> Tensor:
    return _static(weyl_sequence(numel, device=device))


def _rows(tensor: Tensor, rows: Rows) -> Tensor:
    """View the values of a contiguous tensor as ``[rows, values]``, FP8 as int8, without a base."""
    size, stride = (rows.numel // rows.length, rows.length), (rows.length, 1)
    view = torch.empty(0, dtype=torch.int8 if tensor.dtype in FP8_DTYPES else tensor.dtype, device=tensor.device)
    view.set_(tensor.untyped_storage(), tensor.storage_offset() + rows.first, size, stride)
    torch._dynamo.mark_static(view, 1)
    return view


def _operand(scale: Tensor | None) -> Tensor | None:
    return scale if scale is None or scale.dim() == 0 else _without_base(scale)


@lru_cache(maxsize=256)
def _compiled(
    function: Callable[..., Any],
    spec: UpdateSpec,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> Callable[..., Any]:
    """Return the function, compiled on its first call, for one kind of update."""
    # With a code object of its own: torch.compile limits the number of compilations of one, and each kind needs one.
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, dynamic=True, fullgraph=True, options=_OPTIONS)


def _without_base(tensor: Tensor) -> Tensor:
    """Return a tensor that shares storage but is no view: torch.compile would specialise on the shape of its base."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
