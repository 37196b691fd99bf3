"""The step on CUDA and ROCm: a table of all parameters of a kind, and one launch of a Triton kernel for them.

The host uploads the table and goes on: it reads nothing back. Triton is imported by the first job that might go here.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_stosign.optim.kernels.job import SEGMENT, Job, Kind
from lightning_stosign.optim.numerics.noise import Stream, hash_words

WORTH = 0

VALUES = 1024
"""What a program updates; a block of states that is longer is one program's."""

LONGEST_BLOCK = 4096

_FORMATS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
}
_UNSCALED, _FIXED, _BY_TENSOR, _BY_BLOCK = range(4)
_STREAMS = (Stream.UPDATE, Stream.ROUND_STATE, Stream.ROUND_PARAM, Stream.ROUND_ENVELOPE)
_MASK32 = (1 << 32) - 1
_ALIGNMENT = 16  # bytes

# No fused multiply-add: it rounds once where the reference rounds twice.
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


@cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return find_spec("triton") is not None


def refusal(job: Job) -> str | None:
    """Return why Triton does not take a job, or None: :meth:`Backend.refusal`."""
    kind = job.kind
    precision = kind.precision
    if not has_triton():
        return "Triton is not installed (pip install 'lightning-stosign[triton]')"
    if not _implements(kind):
        return f"Triton's kernel does not implement {kind}"
    if job.start is None:
        return "Triton's kernel does not take a parameter that is sharded along another dimension than its first"
    if job.param.dtype not in _FORMATS or job.param.dtype.itemsize < 2 or precision.dtype not in _FORMATS:
        return f"Triton's kernel does not take {job.param.dtype} parameters with states in {precision.dtype}"
    if job.param.dtype != job.grad.dtype:
        return f"Triton's kernel does not take {job.grad.dtype} gradients of {job.param.dtype} parameters"
    if precision.scaling == "block":
        size = precision.block_size
        if size > LONGEST_BLOCK or size & (size - 1):
            return f"Triton's kernel takes blocks of a power of two up to {LONGEST_BLOCK} values, not {size}"
        if job.param.numel() > SEGMENT:
            return f"Triton's kernel does not take states in blocks of a parameter with {job.param.numel()} values"
    return None


def largest(jobs: Sequence[Job]) -> Tensor:
    """Look at jobs of one kind: :meth:`Backend.largest`."""
    _refuse_capture(jobs[0].param.device)
    kind, table = jobs[0].kind, _table(jobs)
    columns = len(kind.states) if kind.has_tensor_scale else 1
    found = torch.zeros((len(jobs), columns), dtype=torch.int32, device=table.runs.device)
    blocks = block_map(table.sizes, VALUES, table.runs.device)
    if len(blocks) > 0:
        constants = looking_constants(kind, jobs[0].param.dtype, aligned=table.aligned)
        if kind.has_tensor_scale:
            _kernels().largest[(len(blocks),)](table.runs, blocks, found, table.numbers, **constants, **OPTIONS)
        else:
            _kernels().nonfinite[(len(blocks),)](table.runs, blocks, found, **constants, **OPTIONS)
    return found.view(torch.float32)


def update(jobs: Sequence[Job], scales: Tensor | None, found_inf: Tensor | None) -> None:
    """Update jobs of one kind: :meth:`Backend.update`."""
    _refuse_capture(jobs[0].param.device)
    kind, table = jobs[0].kind, _table(jobs)
    _tables.pop(id(jobs), None)
    device = table.runs.device
    values = values_of(kind)
    blocks = block_map(table.sizes, values, device)
    if len(blocks) > 0:
        flag = torch.zeros((), dtype=torch.float32, device=device) if found_inf is None else found_inf
        _kernels().update[(len(blocks),)](
            table.runs,
            blocks,
            flag,
            table.numbers if scales is None else scales,  # read under tensor scales alone
            table.numbers,
            **updating_constants(kind, jobs[0].param.dtype, aligned=table.aligned),
            **OPTIONS,
        )
    for job, (param, _, *states) in zip(jobs, table.tensors, strict=True):
        for tensor, updated in zip((job.param, *job.stored), (param, *states), strict=True):
            if updated is not tensor:
                tensor.copy_(updated)
    # Autograd does not see what the kernel writes, and would use a parameter that it saved before the step.
    torch.autograd.graph.increment_version([job.param for job in jobs])


def values_of(kind: Kind) -> int:
    """Return how many values a program updates."""
    return max(VALUES, kind.precision.block_size) if kind.precision.scaling == "block" else VALUES


def updating_constants(kind: Kind, dtype: torch.dtype, *, aligned: bool) -> dict[str, Any]:
    """Return what ``update`` is compiled for: a kind and a parameter's dtype."""
    precision, values = kind.precision, values_of(kind)
    row = precision.block_size if precision.scaling == "block" else 128
    scaling = {"none": _UNSCALED, "tensor": _BY_TENSOR, "block": _BY_BLOCK}[precision.scaling]
    return {
        "HAS_MOMENTUM": kind.momentum,
        "HAS_ENVELOPE": kind.envelope,
        "STOCHASTIC_SIGN": kind.stochastic,
        "MAXIMIZE": kind.maximize,
        "DECAYS": kind.decays,
        "ROUND_STATE": Stream.ROUND_STATE in kind.streams and precision.dtype.itemsize < 4,
        "ROUND_PARAM": kind.round_param,
        "PARAM_FORMAT": _FORMATS[dtype],
        "STATE_FORMAT": _FORMATS[precision.dtype],
        "SCALING": _FIXED if precision.scaling == "none" and precision.static_scale != 1 else scaling,
        "ROWS": values // row,
        "ROW": row,
        "ALIGNED": aligned,
    }


def looking_constants(kind: Kind, dtype: torch.dtype, *, aligned: bool) -> dict[str, Any]:
    """Return what ``largest``, or ``nonfinite`` where there is no tensor scale, is compiled for."""
    common = {"PARAM_FORMAT": _FORMATS[dtype], "VALUES": VALUES, "ALIGNED": aligned}
    if not kind.has_tensor_scale:
        return common
    return {
        "HAS_MOMENTUM": kind.momentum,
        "HAS_ENVELOPE": kind.envelope,
        "MAXIMIZE": kind.maximize,
        "STATE_FORMAT": _FORMATS[kind.precision.dtype],
        **common,
    }


class Table(NamedTuple):
    """Jobs of one kind, as the kernels read them.

    Attributes:
        runs: int64 ``[runs, COLUMNS]`` on the device, as triton_kernels.py describes the columns.
        sizes: the runs' numbers of values.
        numbers: float32 ``[6]`` on the device: of the step, and the states' constant scale and its inverse.
        aligned: whether every address is a multiple of 16 bytes.
        tensors: each job's parameter, gradient and states, contiguous; kept until the kernel is launched.
    """

    runs: Tensor
    sizes: tuple[int, ...]
    numbers: Tensor
    aligned: bool
    tensors: list[list[Tensor]]


# From a step's look at the jobs to their update: the jobs' list is kept, so its id is not another's.
_tables: "OrderedDict[int, tuple[Sequence[Job], Table]]" = OrderedDict()
_KEPT = 16


def _table(jobs: Sequence[Job]) -> Table:
    known = _tables.get(id(jobs))
    if known is not None and known[0] is jobs:
        return known[1]
    table = _build_table(jobs)
    _tables[id(jobs)] = jobs, table
    if len(_tables) > _KEPT:
        _tables.popitem(last=False)
    return table


def _build_table(jobs: Sequence[Job]) -> Table:
    kind, device = jobs[0].kind, jobs[0].param.device
    words: list[int] = []
    sizes, tensors = [], []
    for number, job in enumerate(jobs):
        dense = [tensor.contiguous() for tensor in (job.param, job.grad, *job.stored)]
        tensors.append(dense)
        for first, count in _segments(job):
            sizes.append(count)
            at = [tensor.data_ptr() + first * tensor.element_size() for tensor in dense]
            words += (at[0], at[1], count, number)
            for name in ("exp_avg", "exp_inf"):
                if name in kind.states:
                    i = kind.states.index(name)
                    scale = job.scales[i]
                    words += (at[2 + i], 0 if scale is None else scale.data_ptr())
                else:
                    words += (0, 0)
            for stream in _STREAMS:
                origin, key = hash_words(job.keys[stream], (job.start or 0) + first) if stream in job.keys else (0, 0)
                word = (origin & _MASK32) | (key & _MASK32) << 32
                words.append(word - (1 << 64) if word >> 63 else word)
    columns = 8 + len(_STREAMS)
    static = kind.precision.static_scale
    numbers = [*jobs[0].numbers, static, 1 / static]
    on_host = torch.tensor(words, dtype=torch.int64, device="cpu")
    if any(isinstance(number, Tensor) for number in numbers):
        of_step = torch.stack([torch.as_tensor(n, dtype=torch.float32, device=device) for n in numbers])
        runs = _upload(on_host, device)
    else:
        floats = torch.tensor(numbers, dtype=torch.float32, device="cpu")
        whole = _upload(torch.cat([on_host, floats.view(torch.int64)]), device)
        runs, of_step = whole[: len(words)], whole[len(words) :].view(torch.float32)
    aligned = all(tensor.data_ptr() % _ALIGNMENT == 0 for dense in tensors for tensor in dense)
    return Table(runs.view(-1, columns), tuple(sizes), of_step, aligned, tensors)


def _upload(values: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":  # Triton's interpreter
        return values
    return values.pin_memory().to(device, non_blocking=True)


def _segments(job: Job) -> list[tuple[int, int]]:
    """Return (first value, values) of the pieces whose noise has one key."""
    start, total = job.start or 0, job.param.numel()
    ends = [*range(SEGMENT - start % SEGMENT, total, SEGMENT), total]
    return [(first, end - first) for first, end in zip([0, *ends], ends, strict=False)]


@lru_cache(maxsize=64)
def block_map(sizes: tuple[int, ...], values: int, device: torch.device) -> Tensor:
    """Return each program's run and which block of it, int32 ``[programs, 2]``: it depends on sizes alone."""
    counts = torch.tensor([-(-size // values) for size in sizes], dtype=torch.int64, device="cpu")
    run = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int64, device="cpu"), counts)
    first = torch.cumsum(counts, 0) - counts
    position = torch.arange(len(run), dtype=torch.int64, device="cpu") - first[run]
    return torch.stack([run, position], dim=1).to(torch.int32).contiguous().to(device)


def _implements(kind: Kind) -> bool:
    """Return whether the kernels have the kind's formulas: not those of an option that they have never heard of."""
    known = Kind(
        momentum=kind.momentum,
        envelope=kind.envelope,
        stochastic=kind.stochastic,
        maximize=kind.maximize,
        decays=kind.decays,
        precision=kind.precision,
        round_param=kind.round_param,
    )
    return kind == known and not kind.precision.is_fp4


@cache
def _kernels() -> ModuleType:
    from lightning_stosign.optim.kernels import triton_kernels

    return triton_kernels


def _refuse_capture(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the step of this optimizer cannot be captured in a CUDA graph: its noise keys are computed on the host "
            "for each step, and every replay would draw the same noise. Capture forward and backward, and step outside"
        )
