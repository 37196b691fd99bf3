"""The whole update as one compiled kernel: one pass over parameter, gradient and states, noise included.

A kernel sees a tensor as rows of :data:`ROW` values. The number of rows is dynamic and the length of a row is not, so
that one compilation serves all shapes and the inner loop is vectorised, the element index made within it. Each function
is written in the operations, and the order of operations, of the eager path: both give the same bits on the CPU.
"""

import warnings
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from lightning_stosign.optim.noise import hash_bits, noise_from_bits, segment_key, signed32
from lightning_stosign.optim.state_precision import StatePrecision
from lightning_stosign.optim.storage import SCALE_SUFFIX, power_of_two_scale, round_to_nearest

ROW = 256

# Below so many values in all, an eager step is a matter of milliseconds and a compilation of seconds.
WORTH_COMPILING = 10_000_000

# Inductor would go on with the unrounded value where a rounded one is converted back to float32, and would cut a chain
# of this many operations in two, with a buffer as large as the parameter between them.
_OPTIONS: dict[str, Any] = {"emulate_precision_casts": True, "realize_opcount_threshold": 1000}

_SEGMENT = 1 << 32  # elements that share a key


def can_fuse(param: Tensor, state: dict[str, Any], precision: StatePrecision) -> bool:
    """Return whether a parameter with a gradient and a state can take the compiled path.

    It takes float32 values in row-major order, a multiple of :data:`ROW` of them, at least two rows (torch.compile
    treats a size of 1 apart), and states with one scale or none that are rounded to nearest.
    """
    grad = param.grad
    return (
        grad is not None
        and param.dtype == grad.dtype == torch.float32
        and param.numel() % ROW == 0
        and param.numel() >= 2 * ROW
        and all(t.is_contiguous() for t in (param, grad, *state.values()) if isinstance(t, Tensor) and t.dim() > 0)
        and precision.scaling != "block"
        and not precision.stochastic_rounding
    )


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


def stosign_step(
    param: Tensor,
    state: dict[str, Any],
    key: int,
    precision: StatePrecision,
    betas: tuple[float, float],
    lr: float | Tensor,
    weight_decay: float,
    *,
    stochastic: bool,
    maximize: bool,
) -> None:
    """Update one parameter and its states ``exp_avg`` and ``exp_inf`` in place; see :class:`StoSignSGD`.

    Args:
        param: with its gradient; :func:`can_fuse` must hold.
        state: its state.
        key: the noise key of this step's update.
        precision: how the states are stored.
        betas: momentum and decay of the envelope.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        stochastic: whether to add the noise, or divide by the envelope instead.
        maximize: whether to ascend.
    """
    assert param.grad is not None
    sign = -1.0 if maximize else 1.0
    constants = _constants(param.device, lr, weight_decay, sign, 1 - betas[0], betas[1])
    m, envelope = state["exp_avg"], state["exp_inf"]
    scales = _new_scales(param, m, envelope, state, precision, constants)
    for fixed in (constants, scales):  # else a parameter of as many rows as one of them has values is compiled apart
        torch._dynamo.mark_static(fixed)
    kernel = _compiled(_stosign_rows, m.dtype, stochastic)
    rows_in_segment = _SEGMENT // ROW
    total = param.numel() // ROW
    for first in range(0, total, rows_in_segment):
        count = min(rows_in_segment, total - first)
        part = segment_key(key, first // rows_in_segment)
        keys = torch.tensor([signed32(part), signed32(part >> 32)], dtype=torch.int32, device=param.device)
        tensors = (_rows(tensor, first, count) for tensor in (param, param.grad, m, envelope))
        kernel(*tensors, keys.expand(count, 2), _row_starts(count, param.device), constants, scales, stochastic)


def _stosign_rows(
    param: Tensor,
    grad: Tensor,
    m_stored: Tensor,
    envelope_stored: Tensor,
    keys: Tensor,
    index: Tensor,
    constants: Tensor,
    scales: Tensor,
    stochastic: bool,
) -> None:
    """Algorithm 3 on rows: ``[n, ROW]`` tensors, ``[n, 2]`` keys, ``[n]`` index of each row's first element."""
    lr, decay, beta2 = constants[0], constants[1], constants[4]
    m = _next_momentum(grad, m_stored, constants, scales)
    if m_stored.dtype == torch.float32:
        envelope = torch.maximum(envelope_stored * beta2, m.abs())
        m_stored.copy_(m)
        envelope_stored.copy_(envelope)
    else:
        m_rounded = round_to_nearest(m * scales[4], m_stored.dtype)
        m = m_rounded.float() * scales[2]
        envelope = torch.maximum(envelope_stored.float() * scales[1] * beta2, m.abs())
        envelope_rounded = _round_up(envelope * scales[5], envelope_stored.dtype)
        envelope = envelope_rounded * scales[3]
        m_stored.copy_(m_rounded)
        envelope_stored.copy_(envelope_rounded.to(envelope_stored.dtype))
    if stochastic:
        bits = index.unsqueeze(1) + torch.arange(ROW, dtype=torch.int32, device=index.device)
        direction = torch.sign(noise_from_bits(hash_bits(bits, keys[:, :1], keys[:, 1:])) * envelope + m)
    else:
        direction = torch.where(envelope == 0, 0.0, m / envelope)
    param.copy_(param * decay - direction * lr)


def _amax_rows(grad: Tensor, m: Tensor, envelope: Tensor, constants: Tensor, scales: Tensor) -> Tensor:
    """Return the largest magnitudes of the next momentum and of the decayed envelope, as ``[2]``."""
    next_m = _next_momentum(grad, m, constants, scales)
    decayed = envelope.float() * scales[1] * constants[4]
    return torch.stack([next_m.abs().amax(), decayed.amax()])


def _next_momentum(grad: Tensor, m: Tensor, constants: Tensor, scales: Tensor) -> Tensor:
    old = m if m.dtype == torch.float32 else m.float() * scales[0]
    return old + (grad * constants[2] - old) * constants[3]


def _new_scales(
    param: Tensor, m: Tensor, envelope: Tensor, state: dict[str, Any], precision: StatePrecision, constants: Tensor
) -> Tensor:
    """Return the scales of (m, G) as they are stored, as they will be stored, and the inverses of the latter: ``[6]``.

    Under ``scaling="tensor"`` a first pass finds the largest magnitudes, and the new scales are written to the state.
    """
    if precision.scaling == "none":
        scale = 1 / precision.static_scale
        return torch.tensor([scale] * 4 + [precision.static_scale] * 2, dtype=torch.float32, device=param.device)
    old = torch.stack([state["exp_avg" + SCALE_SUFFIX], state["exp_inf" + SCALE_SUFFIX]])
    largest = torch.finfo(precision.dtype).max
    count = param.numel() // ROW
    assert param.grad is not None
    tensors = (_rows(tensor, 0, count) for tensor in (param.grad, m, envelope))
    amax = _compiled(_amax_rows, m.dtype)(*tensors, constants, old)
    m_scale = power_of_two_scale(amax[0], largest)
    # The envelope covers the momentum as stored, whose largest magnitude is the largest one rounded.
    covered = round_to_nearest(amax[0] / m_scale, precision.dtype).float() * m_scale
    envelope_scale = power_of_two_scale(torch.maximum(amax[1], covered), largest)
    state["exp_avg" + SCALE_SUFFIX].copy_(m_scale)
    state["exp_inf" + SCALE_SUFFIX].copy_(envelope_scale)
    new = torch.stack([m_scale, envelope_scale])
    return torch.cat([old, new, 1 / new])


def _constants(
    device: torch.device, lr: float | Tensor, weight_decay: float, sign: float, weight: float, beta2: float
) -> Tensor:
    """Return lr, 1 - lr * weight_decay, sign, 1 - beta1 and beta2 as a tensor: a change of one does not recompile."""
    if not isinstance(lr, Tensor):
        return torch.tensor([lr, 1 - lr * weight_decay, sign, weight, beta2], dtype=torch.float32, device=device)
    lr = lr.to(device).reshape(())
    rest = torch.tensor([sign, weight, beta2], dtype=torch.float32, device=device)
    return torch.cat([torch.stack([lr, 1 - lr * weight_decay]).to(torch.float32), rest])


def _round_up(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round values >= 0 up to a number of ``dtype``, saturating; returns float32.

    Like the eager path's, but without a view of 8-bit numbers as integers, which would not be vectorised.
    """
    info = torch.finfo(dtype)
    value = value.clamp(max=info.max)
    dropped = round(2**23 * info.eps) - 1  # float32's mantissa bits beyond dtype's
    normal = ((value.view(torch.int32) + dropped) & ~dropped).view(torch.float32)
    if dtype == torch.bfloat16:  # has float32's subnormal numbers
        return normal
    smallest = info.smallest_normal * info.eps
    return torch.where(value < info.smallest_normal, torch.ceil(value * (1 / smallest)) * smallest, normal)


@lru_cache(maxsize=64)
def _compiled(function: Callable[..., Any], dtype: torch.dtype, stochastic: bool = True) -> Callable[..., Any]:
    """Return the function, compiled on its first call, for states of a dtype."""
    # With a code object of its own: torch.compile limits the number of compilations of one, and each dtype needs one.
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, dynamic=True, fullgraph=True, options=_OPTIONS)


@lru_cache(maxsize=16)
def _all_row_starts(rows: int, device: torch.device) -> Tensor:
    return (torch.arange(rows, dtype=torch.int64, device=device) * ROW).to(torch.int32)


def _row_starts(rows: int, device: torch.device) -> Tensor:
    """Return the index of each row's first element, modulo 2**32, as int32."""
    capacity = 1 << (rows - 1).bit_length()  # so that a few tensors serve all parameters
    return _without_base(_all_row_starts(capacity, device), 0, (rows,), (1,))


def _rows(tensor: Tensor, first: int, count: int) -> Tensor:
    """Return rows ``first`` to ``first + count`` of a contiguous tensor."""
    return _without_base(tensor, tensor.storage_offset() + first * ROW, (count, ROW), (ROW, 1))


def _without_base(tensor: Tensor, offset: int | torch.SymInt, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Return a tensor that shares storage but is no view: torch.compile would specialise on the shape of its base."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage(), offset, size, stride)
