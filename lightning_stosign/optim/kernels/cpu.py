"""The update on the CPU as native code: all parameters of a kind in one call, each value read and written once.

It gives the eager path's bits.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from ctypes import CDLL, Structure, byref, c_float, c_int32
from functools import lru_cache

import torch
from torch import Tensor

from lightning_stosign.optim.kernels.eager import UpdateSpec
from lightning_stosign.optim.kernels.job import SEGMENT, Job
from lightning_stosign.optim.kernels.native_build import native_library
from lightning_stosign.optim.numerics.noise import Stream, hash_words
from lightning_stosign.optim.states.state_precision import StatePrecision

LONGEST_BLOCK = 2048

_FORMATS = {
    torch.float32: "Float32",
    torch.bfloat16: "BFloat16",
    torch.float16: "Float16",
    torch.float8_e4m3fn: "Float8E4M3",
    torch.float8_e5m2: "Float8E5M2",
}
_INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}  # its bits, a parameter's dtype

_ROW = 512  # values
_GRAIN = 1 << 15  # values that are worth a thread

_STATES = ("exp_avg", "exp_inf")
_STREAMS = (Stream.UPDATE, Stream.ROUND_STATE, Stream.ROUND_PARAM, Stream.ROUND_ENVELOPE)
_NO_STATE = (0, 0, 0)
_COLUMNS = 3 + 3 * len(_STATES) + len(_STREAMS)
_MASK32 = (1 << 32) - 1


class _Constants(Structure):
    _fields_ = (*((name, c_float) for name in ("lr", "decay", "weight", "beta2", "fixed_scale")), ("row", c_int32))


@lru_cache(maxsize=1)
def has_native() -> bool:
    """Return whether this machine compiles C++, by compiling the check of gradients."""
    return native_library("finite.cpp") is not None


def which_are_nonfinite(tensors: Sequence[Tensor]) -> list[bool] | None:
    """Return for each tensor whether it holds inf or NaN; None where native code cannot tell."""
    library = native_library("finite.cpp")
    if library is None or not all(t.device.type == "cpu" and t.dtype in _INFINITY for t in tensors):
        return None
    dense = [tensor.contiguous() for tensor in tensors]
    flags = [False] * len(dense)
    for dtype in {tensor.dtype for tensor in dense}:
        numbers = [i for i, tensor in enumerate(dense) if tensor.dtype == dtype]
        addresses = array("Q", [dense[i].data_ptr() for i in numbers])
        numel = array("Q", [dense[i].numel() for i in numbers])
        found = array("B", bytes(len(numbers)))
        look = library.nonfinite32 if dtype.itemsize == 4 else library.nonfinite16
        look(_address(addresses), _address(numel), len(numbers), _INFINITY[dtype], _address(found), _threads(numel))
        for i, flag in zip(numbers, found, strict=True):
            flags[i] = bool(flag)
    return flags


def is_native(job: Job) -> bool:
    """Return whether there is native code for a job; it is compiled on the way."""
    if job.path != "native" or job.start is None or job.param.dtype != job.grad.dtype:
        return False
    if job.constants.finite is not True:  # the host does not know yet
        return False
    if job.spec.precision.scaling == "block" and job.param.numel() > SEGMENT:
        return False
    return _library(job) is not None


def update(jobs: Sequence[Job], new_scales: Mapping[int, Tensor]) -> None:
    """Run :meth:`UpdateSpec.update` on jobs of a kind.

    Args:
        jobs: for which :func:`is_native`, with the same spec, constants and dtype of the parameter.
        new_scales: of the states under ``scaling="tensor"``, float32 ``[states]``, by the job's id.
    """
    tensors = [_contiguous(job) for job in jobs]
    _call("update", jobs, tensors, new_scales)
    for job, (param, _, *states) in zip(jobs, tensors, strict=True):
        for tensor, values in zip((job.param, *job.stored), (param, *states), strict=True):
            if values is not tensor:
                tensor.copy_(values)


def largest(jobs: Sequence[Job]) -> Tensor:
    """Run :meth:`UpdateSpec.largest` on jobs of a kind, as above: float32 ``[jobs, states]``."""
    counts = [len(_segments(job)) for job in jobs]
    found = torch.zeros(sum(counts), len(_STATES), dtype=torch.float32, device="cpu")
    _call("largest", jobs, [_contiguous(job) for job in jobs], {}, found.data_ptr())
    return torch.stack([of_job.amax(dim=0) for of_job in found.split(counts)])[:, : len(jobs[0].spec.rule.states)]


def _call(
    function: str,
    jobs: Sequence[Job],
    tensors: Sequence[Sequence[Tensor]],
    new_scales: Mapping[int, Tensor],
    *more: int,
) -> None:
    """Call a function of csrc/step.cpp on jobs of a kind, with each job's :func:`_contiguous` tensors."""
    table, constants = _table(jobs, tensors, new_scales), _constants(jobs[0])
    threads = _threads(job.param.numel() for job in jobs)
    run = getattr(_library(jobs[0]), function)
    run(_address(table), len(table) // _COLUMNS, byref(constants), threads, *more)


def _contiguous(job: Job) -> list[Tensor]:
    return [tensor.contiguous() for tensor in (job.param, job.grad, *job.stored)]


def _segments(job: Job) -> list[tuple[int, int]]:
    """Return (first value, values) of the pieces whose noise has one key."""
    start, total = job.start or 0, job.param.numel()
    ends = [*range(SEGMENT - start % SEGMENT, total, SEGMENT), total]
    return [(first, end - first) for first, end in zip([0, *ends], ends, strict=False)]


def _table(jobs: Sequence[Job], tensors: Sequence[Sequence[Tensor]], new_scales: Mapping[int, Tensor]) -> "array[int]":
    """Return what csrc/step.cpp calls a Run for each segment of each job: addresses, and the noise's words."""
    streams = [stream if stream in jobs[0].spec.streams else None for stream in _STREAMS]
    missing = _NO_STATE * (len(_STATES) - len(jobs[0].spec.rule.states))
    table: list[int] = []
    for job, (param, grad, *states) in zip(jobs, tensors, strict=True):
        new = new_scales.get(id(job))
        for first, count in _segments(job):
            at = first * param.element_size()
            table += (param.data_ptr() + at, grad.data_ptr() + at, count)
            for i, (stored, scale) in enumerate(zip(states, job.scales, strict=True)):
                table.append(stored.data_ptr() + first * stored.element_size())
                table.append(0 if scale is None else scale.data_ptr())
                table.append(0 if new is None else new.data_ptr() + 4 * i)
            table += missing
            for stream in streams:
                origin, key = (0, 0) if stream is None else hash_words(job.keys[stream], (job.start or 0) + first)
                table.append((origin & _MASK32) | (key & _MASK32) << 32)
    return array("Q", table)


def _constants(job: Job) -> _Constants:
    precision = job.spec.precision
    row = precision.block_size if precision.scaling == "block" else _ROW
    lr, decay, weight, beta2, _ = job.constants
    return _Constants(float(lr), float(decay), float(weight), float(beta2), precision.static_scale, row)


def _library(job: Job) -> CDLL | None:
    return _library_of(job.spec, job.param.dtype, job.constants.beta2 != 1)


@lru_cache(maxsize=256)
def _library_of(spec: UpdateSpec, dtype: torch.dtype, decays: bool) -> CDLL | None:
    precision, streams = spec.precision, spec.streams
    if dtype not in _INFINITY or precision.dtype not in _FORMATS:
        return None
    if precision.scaling == "block" and precision.block_size > LONGEST_BLOCK:
        return None
    choices = {
        "MOMENTUM": "exp_avg" in spec.rule.states,
        "ENVELOPE": "exp_inf" in spec.rule.states,
        "MAXIMIZE": spec.rule.maximize,
        "STOCHASTIC": Stream.UPDATE in streams,
        "DECAYS": decays,
        "ROUND_STATE": Stream.ROUND_STATE in streams,
        "ROUND_DECAYED": Stream.ROUND_ENVELOPE in streams,
        "ROUND_PARAM": Stream.ROUND_PARAM in streams,
    }
    formats = f"PARAM={_FORMATS[dtype]}", f"STATE={_FORMATS[precision.dtype]}", f"SCALING={_scaling(precision)}"
    longest = f"LONGEST_ROW={LONGEST_BLOCK}"
    return native_library("step.cpp", *formats, longest, *(f"{name}={int(choice)}" for name, choice in choices.items()))


def _scaling(precision: StatePrecision) -> str:
    return "fixed" if precision.static_scale != 1 else precision.scaling


def _threads(numel: Iterable[int]) -> int:
    return max(1, min(torch.get_num_threads(), sum(numel) // _GRAIN))


def _address(values: "array[int]") -> int:
    return values.buffer_info()[0]
