"""The update on the CPU as native code: all parameters of a kind in one call, each value read and written once.

It gives the eager path's bits.
"""

from array import array
from collections.abc import Iterable, Sequence
from ctypes import CDLL, Structure, byref, c_float, c_int32
from functools import lru_cache

import torch
from torch import Tensor

from lightning_stosign.optim.kernels.job import SEGMENT, Job, Kind
from lightning_stosign.optim.kernels.native_build import native_library
from lightning_stosign.optim.kernels.native_prebuilt import LONGEST_BLOCK, step_macros
from lightning_stosign.optim.numerics.noise import Stream, hash_words
from lightning_stosign.optim.states.state_precision import StatePrecision

WORTH = 1_000  # below, even the one compilation per machine takes longer than thousands of eager steps

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


def refusal(job: Job) -> str | None:
    """Return why native code does not take a job, or None: :meth:`Backend.refusal`. It is compiled on the way."""
    kind = job.kind
    if not _implements(kind):
        return f"native code does not implement {kind}"
    if job.start is None:
        return "native code does not take a parameter that is sharded along another dimension than its first"
    if job.param.dtype not in _INFINITY or kind.precision.dtype not in _FORMATS:
        return f"native code does not take {job.param.dtype} parameters with states in {kind.precision.dtype}"
    if job.param.dtype != job.grad.dtype:
        return f"native code does not take {job.grad.dtype} gradients of {job.param.dtype} parameters"
    if kind.precision.scaling == "block":
        if kind.precision.block_size > LONGEST_BLOCK:
            return f"native code takes blocks of up to {LONGEST_BLOCK} values, not {kind.precision.block_size}"
        if job.param.numel() > SEGMENT:
            return f"native code does not take states in blocks of a parameter with {job.param.numel()} values"
    return None if _library(kind, job.param.dtype) is not None else ""  # the user has been told why


def largest(jobs: Sequence[Job]) -> Tensor:
    """Look at jobs of one kind: :meth:`Backend.largest`."""
    if not jobs[0].kind.has_tensor_scale:
        flags = nonfinite([job.grad for job in jobs])
        return torch.where(flags, torch.inf, 0.0).unsqueeze(1)
    counts = [len(_segments(job)) for job in jobs]
    found = torch.zeros((sum(counts), len(_STATES)), dtype=torch.float32, device="cpu")
    _call("largest", jobs, [_contiguous(job) for job in jobs], None, found.data_ptr())
    return torch.stack([of_job.amax(dim=0) for of_job in found.split(counts)])[:, : len(jobs[0].kind.states)]


def update(jobs: Sequence[Job], scales: Tensor | None, found_inf: Tensor | None) -> None:
    """Update jobs of one kind: :meth:`Backend.update`."""
    if found_inf is not None and bool(found_inf != 0):
        return
    tensors = [_contiguous(job) for job in jobs]
    _call("update", jobs, tensors, scales)
    for job, (param, _, *states) in zip(jobs, tensors, strict=True):
        for tensor, values in zip((job.param, *job.stored), (param, *states), strict=True):
            if values is not tensor:
                tensor.copy_(values)
    # Autograd does not see what native code writes, and would use a parameter that it saved before the step.
    torch.autograd.graph.increment_version([job.param for job in jobs])


def nonfinite(tensors: Sequence[Tensor]) -> Tensor:
    """Return for each float32, bfloat16 or float16 tensor whether it holds inf or NaN: bool, on the CPU."""
    library = native_library("finite.cpp")
    dense = [tensor.contiguous() for tensor in tensors]
    flags = torch.zeros(len(dense), dtype=torch.bool, device="cpu")
    if library is None:  # though that of the step was compiled
        return torch.tensor([not bool(tensor.isfinite().all()) for tensor in dense], dtype=torch.bool, device="cpu")
    for dtype in {tensor.dtype for tensor in dense}:
        numbers = [i for i, tensor in enumerate(dense) if tensor.dtype == dtype]
        addresses = array("Q", [dense[i].data_ptr() for i in numbers])
        numel = array("Q", [dense[i].numel() for i in numbers])
        found = array("B", bytes(len(numbers)))
        look = library.nonfinite32 if dtype.itemsize == 4 else library.nonfinite16
        look(_address(addresses), _address(numel), len(numbers), _INFINITY[dtype], _address(found), _threads(numel))
        flags[torch.tensor(numbers, device="cpu")] = torch.frombuffer(found, dtype=torch.bool)
    return flags


def _call(
    function: str,
    jobs: Sequence[Job],
    tensors: Sequence[Sequence[Tensor]],
    scales: Tensor | None,
    *more: int,
) -> None:
    """Call a function of csrc/step.cpp on jobs of a kind, with each job's :func:`_contiguous` tensors."""
    library = _library(jobs[0].kind, jobs[0].param.dtype)
    table, constants = _table(jobs, tensors, scales), _constants(jobs[0])
    threads = _threads(job.param.numel() for job in jobs)
    getattr(library, function)(_address(table), len(table) // _COLUMNS, byref(constants), threads, *more)


def _contiguous(job: Job) -> list[Tensor]:
    return [tensor.contiguous() for tensor in (job.param, job.grad, *job.stored)]


def _segments(job: Job) -> list[tuple[int, int]]:
    """Return (first value, values) of the pieces whose noise has one key."""
    start, total = job.start or 0, job.param.numel()
    if start % SEGMENT + total <= SEGMENT:
        return [(0, total)]
    ends = [*range(SEGMENT - start % SEGMENT, total, SEGMENT), total]
    return [(first, end - first) for first, end in zip([0, *ends], ends, strict=False)]


def _table(jobs: Sequence[Job], tensors: Sequence[Sequence[Tensor]], scales: Tensor | None) -> "array[int]":
    """Return what csrc/step.cpp calls a Run for each segment of each job: addresses, and the noise's words."""
    kind = jobs[0].kind
    streams = [stream if stream in kind.streams else None for stream in _STREAMS]
    missing = _NO_STATE * (len(_STATES) - len(kind.states))
    new_scales = 0 if scales is None else scales.data_ptr()
    table: list[int] = []
    for job, (param, grad, *states) in zip(jobs, tensors, strict=True):
        for first, count in _segments(job):
            at = first * param.element_size()
            table += (param.data_ptr() + at, grad.data_ptr() + at, count)
            for i, (stored, scale) in enumerate(zip(states, job.scales, strict=True)):
                table.append(stored.data_ptr() + first * stored.element_size())
                table.append(0 if scale is None else scale.data_ptr())
                table.append(new_scales and new_scales + 4 * i)
            table += missing
            for stream in streams:
                origin, key = (0, 0) if stream is None else hash_words(job.keys[stream], (job.start or 0) + first)
                table.append((origin & _MASK32) | (key & _MASK32) << 32)
        new_scales = new_scales and new_scales + 4 * len(kind.states)
    return array("Q", table)


def _constants(job: Job) -> _Constants:
    precision = job.kind.precision
    row = precision.block_size if precision.scaling == "block" else _ROW
    lr, decay, weight, beta2 = job.numbers
    return _Constants(float(lr), float(decay), float(weight), float(beta2), precision.static_scale, row)


@lru_cache(maxsize=256)
def _implements(kind: Kind) -> bool:
    """Return whether csrc/step.cpp has the kind's formulas: not those of an option that it has never heard of."""
    known = Kind(
        momentum=kind.momentum,
        envelope=kind.envelope,
        stochastic=kind.stochastic,
        maximize=kind.maximize,
        decays=kind.decays,
        precision=kind.precision,
        round_param=kind.round_param,
    )
    return kind == known and (kind.momentum or not kind.envelope)


@lru_cache(maxsize=256)
def _library(kind: Kind, dtype: torch.dtype) -> CDLL | None:
    """Return the step for a kind that this module takes and a parameter's dtype."""
    precision, streams = kind.precision, kind.streams
    choices = {
        "MOMENTUM": kind.momentum,
        "ENVELOPE": kind.envelope,
        "MAXIMIZE": kind.maximize,
        "STOCHASTIC": kind.stochastic,
        "DECAYS": kind.decays,
        "ROUND_STATE": Stream.ROUND_STATE in streams,
        "ROUND_DECAYED": Stream.ROUND_ENVELOPE in streams,
        "ROUND_PARAM": Stream.ROUND_PARAM in streams,
    }
    formats = _FORMATS[dtype], _FORMATS[precision.dtype], _scaling(precision)
    return native_library("step.cpp", *step_macros(*formats, choices))


def _scaling(precision: StatePrecision) -> str:
    return "fixed" if precision.static_scale != 1 else precision.scaling


def _threads(numel: Iterable[int]) -> int:
    return max(1, min(torch.get_num_threads(), sum(numel) // _GRAIN))


def _address(values: "array[int]") -> int:
    return values.buffer_info()[0]
