"""Takes parameters and their states through an update: in chunks, in batches of small ones, or compiled."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_stosign.optim.fp4_rows import Fp4Rows
from lightning_stosign.optim.fused import ROW, compiled_largest, compiled_update
from lightning_stosign.optim.noise import Stream, hash_words, weyl_sequence
from lightning_stosign.optim.sharding import Shard, local, max_over_shards, shard_of
from lightning_stosign.optim.storage import SCALE_SUFFIX, TENSOR_SCALE_SUFFIX
from lightning_stosign.optim.update import Constants, Noise, RowNoise, RunNoise, StoredRows, UpdateSpec

# Values that an eager pass goes over at a time: on the CPU 1 MiB of float32, so that the passes stay in the cache.
_CHUNK, _ACCELERATOR_CHUNK = 1 << 18, 1 << 26

# Values up to which parameters are gathered to be updated together: copying them costs less than a call for each.
_SMALL = 1 << 14

_SEGMENT = 1 << 32  # elements that share a key


@dataclass
class Job:
    """One parameter's update in this step.

    Args:
        whole: the parameter.
        param: this process's part of it.
        grad: likewise of its gradient.
        state: its entry in ``optimizer.state``.
        spec: the update and how it is stored.
        keys: this step's noise keys.
        constants: the numbers of the step.
        compiled: whether to take the compiled path where it fits.
        largest: :meth:`Rule.largest` of the whole parameter, where its states have a scale each.
    """

    whole: Tensor
    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    spec: UpdateSpec
    keys: dict[Stream, int]
    constants: Constants
    compiled: bool
    largest: Tensor | None = None

    @property
    def stored(self) -> list[Tensor]:
        """This process's parts of the state tensors."""
        return [local(self.state[name]) for name in self.spec.rule.states]

    @property
    def scales(self) -> list[Tensor | None]:
        """The scales of the state tensors."""
        return [self.state.get(name + SCALE_SUFFIX) for name in self.spec.rule.states]

    @property
    def tensor_scales(self) -> list[Tensor]:
        """The scales that depend on all of a state's values, where there are such."""
        suffix = TENSOR_SCALE_SUFFIX if self.spec.precision.is_fp4 else SCALE_SUFFIX
        return [self.state[name + suffix] for name in self.spec.rule.states]

    @property
    def shard(self) -> Shard | None:
        """Which part of the parameter this process has, if not all of it."""
        return shard_of(self.whole)

    @property
    def start(self) -> int | None:
        """The row-major index in the parameter of its first value here; None if they do not follow each other."""
        shard = self.shard
        if shard is None or shard.starts.numel() == 0:
            return 0
        return int(shard.starts) if shard.starts.numel() == 1 else None

    @property
    def batch_key(self) -> tuple[Any, ...] | None:
        """What parameters must have in common to be updated together; None for one that is updated alone."""
        tensors = (self.param, self.grad, *self.stored)
        if not 0 < self.param.numel() <= _SMALL or self.param.dtype == torch.float64:
            return None
        if self.start is None or self.start % _SEGMENT + self.param.numel() > _SEGMENT:
            return None
        if any(scale is not None for scale in self.scales):
            return None
        return self.spec, id(self.constants), self.compiled, self.param.device, *(t.dtype for t in tensors)


def run(jobs: Sequence[Job]) -> None:
    """Update parameters and states in place.

    Communicates where a sharded parameter's states have one scale: the largest value is that of all shards.
    """
    scaled = [job for job in jobs if job.spec.precision.has_tensor_scale and job.spec.rule.states]
    for job in scaled:
        job.largest = _largest(job)
    max_over_shards((job.whole, job.largest) for job in scaled if job.largest is not None)
    batches: dict[Any, list[Job]] = {}
    for job in jobs:
        batches.setdefault(job.batch_key or id(job), []).append(job)
    for batch in batches.values():
        if len(batch) == 1:
            _run_alone(batch[0])
        else:
            _run_together(batch)


def _run_alone(job: Job) -> None:
    new_scales = None
    if job.largest is not None:
        new_scales = job.spec.rule.cover(job.largest, job.spec.precision)
    flat = [_flat(tensor) for tensor in (job.param, job.grad, *job.stored)]
    for first, count, row in _spans(job):
        if _compiles(job, count, row):
            rows = _rows(flat, first, count, row)
            scales = _scales(job, first, count)
            words = torch.tensor([_words(job, first)], dtype=torch.int32, device=job.param.device)
            sequence = _row_sequence(count // row, row, job.param.device)
            words = words.expand(count // row, -1)
            compiled_update(job.spec, rows, scales, new_scales, words, sequence, job.constants)
        else:
            param, grad = _rows(flat[:2], first, count, row)
            states = _states(job, flat[2:], first, count, row, new_scales)
            job.spec.update(param, grad, states, _noise(job, first, param), job.constants)
    if new_scales is not None:
        for scale, new in zip(job.tensor_scales, new_scales, strict=True):
            scale.copy_(new)
    for tensor, values in zip((job.param, *job.stored), (flat[0], *flat[2:]), strict=True):
        if not tensor.is_contiguous():
            tensor.copy_(values.view(tensor.shape))


def _noise(job: Job, first: int, rows: Tensor) -> Noise:
    """Return the noise of eager rows, which begin at value ``first`` of this process's part."""
    if job.start is not None:
        return RunNoise(job.keys, job.start + first, rows)
    # The rows are the shard's runs.
    shard = job.shard
    assert shard is not None
    starts = shard.starts[first // shard.run :][: len(rows)]
    words = torch.tensor([_words_at(job, int(start)) for start in starts], dtype=torch.int32, device=rows.device)
    sequence = torch.zeros(len(rows), dtype=torch.int32, device=rows.device)
    return RowNoise(job.spec.streams(), words, sequence, weyl_sequence(shard.run, device=rows.device))


def _run_together(jobs: list[Job]) -> None:
    """Update small parameters as one, each with its own noise: gathered in rows, padded with zeros, and put back."""
    first = jobs[0]
    device = first.param.device
    sizes = tuple(job.param.numel() for job in jobs)
    owner, sequence, padding = _batch_layout(sizes, device)
    tensors = zip(*((job.param, job.grad, *job.stored) for job in jobs), strict=True)
    gathered = [_gather(column, padding).view(-1, ROW) for column in tensors]
    words = torch.tensor([_words(job, 0) for job in jobs], dtype=torch.int32, device=device)[owner]
    scales = [None] * len(first.stored)
    if first.compiled and len(owner) > 1:
        compiled_update(first.spec, gathered, scales, None, words, sequence, first.constants)
    else:
        noise = RowNoise(first.spec.streams(), words, sequence, weyl_sequence(ROW, device=device))
        param, grad, *stored = gathered
        first.spec.update(param, grad, first.spec.stored(param, stored, scales), noise, first.constants)
    columns = zip(*((job.param, *job.stored) for job in jobs), strict=True)
    for column, values in zip(columns, (gathered[0], *gathered[2:]), strict=True):
        pieces = values.view(-1).split(
            [size for job_size, pad in zip(sizes, padding, strict=True) for size in (job_size, pad)]
        )
        torch._foreach_copy_(list(column), [p.view(t.shape) for p, t in zip(pieces[::2], column, strict=True)])


def _gather(tensors: Sequence[Tensor], padding: Sequence[int]) -> Tensor:
    zeros = tensors[0].new_zeros(ROW)
    pieces = (
        piece for tensor, pad in zip(tensors, padding, strict=True) for piece in (tensor.reshape(-1), zeros[:pad])
    )
    return torch.cat(list(pieces))


@lru_cache(maxsize=64)
def _batch_layout(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, list[int]]:
    """Return each row's parameter, the Weyl sequence at its first element, and the zeros after each parameter."""
    rows = torch.tensor([-(-size // ROW) for size in sizes])
    owner = torch.repeat_interleave(torch.arange(len(sizes)), rows).to(device)
    sequence = torch.cat([weyl_sequence(int(count), step=ROW) for count in rows]).to(device)
    return owner, sequence, [-size % ROW for size in sizes]


def _largest(job: Job) -> Tensor:
    flat = [_flat(tensor) for tensor in (job.param, job.grad, *job.stored)]
    found = []
    for first, count, row in _spans(job):
        if _compiles(job, count, row):
            found.append(compiled_largest(job.spec, _rows(flat, first, count, row), job.scales, job.constants))
        else:
            param, grad = _rows(flat[:2], first, count, row)
            found.append(job.spec.largest(param, grad, _states(job, flat[2:], first, count, row), job.constants))
    if not found:  # a shard without values
        return torch.zeros(len(flat) - 2, dtype=torch.float32, device=job.param.device)
    return torch.stack(found).amax(dim=0)


def _rows(flat: Sequence[Tensor], first: int, count: int, row: int) -> list[Tensor]:
    return [tensor[first : first + count].view(-1, row) for tensor in flat]


def _states(
    job: Job, flat: Sequence[Tensor], first: int, count: int, row: int, new_scales: Tensor | None = None
) -> Sequence[StoredRows]:
    """Return the states of rows of ``row`` values, ``count`` in all, which begin at value ``first``."""
    scales = _scales(job, first, count)
    if not job.spec.precision.is_fp4:
        return job.spec.stored(job.param, _rows(flat, first, count, row), scales, new_scales)
    size = job.spec.precision.block_size
    blocks = slice(first // size, -(-(first + count) // size))
    return [
        Fp4Rows(
            stored.view(-1, size // 2)[blocks],
            job.spec.precision,
            scale,
            tensor_scale,
            None if new_scales is None else new_scales[i],
            torch.promote_types(job.param.dtype, torch.float32),
            row,
        )
        for i, (stored, scale, tensor_scale) in enumerate(zip(flat, scales, job.tensor_scales, strict=True))
        if scale is not None
    ]


def _spans(job: Job) -> Iterator[tuple[int, int, int]]:
    """Yield (first value, number of values, values in a row) of the pieces to update one after the other."""
    total = job.param.numel()
    blocks = job.spec.precision.scaling == "block"
    row = job.spec.precision.block_size if blocks else ROW
    if job.start is None:
        assert job.shard is not None
        row = job.shard.run
    chunk = _SEGMENT if job.compiled and not blocks else _chunk(job.param.device)
    chunk = max(chunk // row, 1) * row
    whole = total // row * row
    first = 0
    while first < whole:
        of_segment = _SEGMENT - ((job.start or 0) + first) % _SEGMENT
        count = min(chunk, whole - first, max(of_segment // row, 1) * row)
        yield first, count, row
        first += count
    if whole < total:
        yield whole, total - whole, total - whole


def _compiles(job: Job, count: int, row: int) -> bool:
    # torch.compile treats a size of 1 apart. Four-bit states are not compiled.
    compiled = job.compiled and not job.spec.precision.is_fp4
    return compiled and job.start is not None and count >= 2 * row and job.param.dtype != torch.float64


def _chunk(device: torch.device) -> int:
    return _CHUNK if device.type == "cpu" else _ACCELERATOR_CHUNK


def _words(job: Job, first: int) -> list[int]:
    assert job.start is not None
    return _words_at(job, job.start + first)


def _words_at(job: Job, index: int) -> list[int]:
    return [word for stream in job.spec.streams() for word in hash_words(job.keys[stream], index)]


def _flat(tensor: Tensor) -> Tensor:
    """Return the values in row-major order: a view where memory is in that order."""
    return tensor.detach().reshape(-1)


def _scales(job: Job, first: int, count: int) -> list[Tensor | None]:
    """Return the states' scales, of blocks those that ``count`` values from ``first`` on are in."""
    size = job.spec.precision.block_size
    blocks = slice(first // size, -(-(first + count) // size))
    return [scale if scale is None or scale.dim() == 0 else scale[blocks] for scale in job.scales]


@lru_cache(maxsize=64)
def _power_of_two_sequence(rows: int, row: int, device: torch.device) -> Tensor:
    return weyl_sequence(rows, step=row, device=device)


def _row_sequence(rows: int, row: int, device: torch.device) -> Tensor:
    """Return the Weyl sequence at the first element of each row, int32 ``[rows]``."""
    capacity = 1 << (rows - 1).bit_length()  # so that a few tensors serve all parameters
    return _power_of_two_sequence(capacity, row, device)[:rows]
