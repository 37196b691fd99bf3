"""Takes parameters and their states through an update: natively, compiled, in chunks, or small ones in a batch."""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_stosign.optim.kernels import cpu
from lightning_stosign.optim.kernels.eager import Noise, RowNoise, RunNoise, StoredRows
from lightning_stosign.optim.kernels.fp4_rows import Fp4Rows
from lightning_stosign.optim.kernels.fused import ROW, Rows, compiled_largest, compiled_update
from lightning_stosign.optim.kernels.job import SEGMENT, Job
from lightning_stosign.optim.numerics.noise import hash_words, weyl_sequence
from lightning_stosign.optim.sharding import max_over_shards

# Values that an eager pass goes over at a time: on the CPU 1 MiB of float32, so that the passes stay in the cache.
_CHUNK, _ACCELERATOR_CHUNK = 1 << 18, 1 << 26

# Values up to which parameters are gathered to be updated together: copying them costs less than a call for each.
_SMALL = 1 << 14


class Largest(NamedTuple):
    """What the next scales of some parameters' states are made of."""

    jobs: list[Job]
    values: Tensor
    """float32 ``[jobs, states]``, from :meth:`UpdateSpec.largest`; finite only if all gradients are."""


def find_largest(jobs: Sequence[Job]) -> list[Largest]:
    """Return it for the jobs whose states have a scale that depends on all values; changes nothing."""
    natives, others = _split(filter(_has_next_scales, jobs))
    found = [Largest(members, cpu.largest(members)) for members in natives]
    kinds: dict[Any, list[Job]] = {}
    for job in others:
        kinds.setdefault((id(job.spec), job.param.device), []).append(job)
    return found + [Largest(members, torch.stack([_largest(job) for job in members])) for members in kinds.values()]


def run(jobs: Sequence[Job], largest: Sequence[Largest]) -> None:
    """Update parameters and states in place.

    Communicates where a sharded parameter's states have one scale: the largest value is that of all shards.

    Args:
        jobs: what to do.
        largest: from :func:`find_largest`.
    """
    next_scales = _next_scales(largest)
    natives, others = _split(jobs)
    for members in natives:
        cpu.update(members, next_scales)
    batches: dict[Any, list[Job]] = {}
    for job in others:
        batches.setdefault(_batch_key(job) or id(job), []).append(job)
    for batch in batches.values():
        if len(batch) == 1:
            _run_alone(batch[0], next_scales.get(id(batch[0])))
        else:
            _run_together(batch)
    scaled = [job for members, _ in largest for job in members]
    if scaled:
        scales = [scale for job in scaled for scale in job.tensor_scales]
        torch._foreach_copy_(scales, [scale for job in scaled for scale in next_scales[id(job)].unbind()])


def _split(jobs: Iterable[Job]) -> tuple[list[list[Job]], list[Job]]:
    """Return the jobs that native code does, those of a kind together, and the others."""
    natives: dict[Any, list[Job]] = {}
    others = []
    for job in jobs:
        if cpu.is_native(job):
            natives.setdefault((id(job.spec), id(job.constants), job.param.dtype), []).append(job)
        else:
            others.append(job)
    return list(natives.values()), others


def _has_next_scales(job: Job) -> bool:
    return job.spec.precision.has_tensor_scale and bool(job.spec.rule.states)


def _batch_key(job: Job) -> tuple[Any, ...] | None:
    """Return what parameters must have in common to be updated together; None for one that is updated alone."""
    if not 0 < job.param.numel() <= _SMALL or job.param.dtype == torch.float64:
        return None
    if job.start is None or job.start % SEGMENT + job.param.numel() > SEGMENT:
        return None
    if any(scale is not None for scale in job.scales):
        return None
    tensors = (job.param, job.grad, *job.stored)
    return job.spec, id(job.constants), job.path, job.param.device, *(t.dtype for t in tensors)


def _next_scales(largest: Sequence[Largest]) -> dict[int, Tensor]:
    """Return the scales of the next states, float32 ``[states]``, by the job's id.

    The largest values of all parameters of a kind become scales together: these are a dozen operations on a few bytes.
    """
    max_over_shards((job.whole, row) for jobs, values in largest for job, row in zip(jobs, values, strict=True))
    found: dict[int, Tensor] = {}
    for jobs, values in largest:
        spec = jobs[0].spec
        scales = spec.rule.cover(values.t(), spec.precision)
        found.update(zip((id(job) for job in jobs), scales.t().contiguous().unbind(), strict=True))
    return found


def _run_alone(job: Job, new_scales: Tensor | None) -> None:
    flat = [tensor.contiguous() for tensor in (job.param, job.grad, *job.stored)]
    for rows in _spans(job):
        first, count, row = rows
        if job.numbers is not None and _compiles(job, rows):
            words = torch.tensor([_words(job, first)], dtype=torch.int32, device=job.param.device)
            words = words.expand(count // row, -1).contiguous()
            sequence = _row_sequence(count // row, row, job.param.device)
            scales = _scales(job, first, count)
            compiled_update(job.spec, flat, rows, scales, new_scales, words, sequence, job.numbers)
        else:
            param, grad = _rows(flat[:2], rows)
            states = _states(job, flat[2:], rows, new_scales)
            job.spec.update(param, grad, states, _noise(job, first, param), job.constants)
    for tensor, values in zip((job.param, *job.stored), (flat[0], *flat[2:]), strict=True):
        if values is not tensor:
            tensor.copy_(values)


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
    return RowNoise(job.spec.streams, words, sequence, weyl_sequence(shard.run, device=rows.device))


def _run_together(jobs: list[Job]) -> None:
    """Update small parameters as one, each with its own noise: gathered in rows, padded with zeros, and put back."""
    first = jobs[0]
    device = first.param.device
    sizes = tuple(job.param.numel() for job in jobs)
    owner, sequence = _batch_layout(sizes, device)
    padding = [-size % ROW for size in sizes]
    tensors = zip(*((job.param, job.grad, *job.stored) for job in jobs), strict=True)
    gathered = [_gather(column, padding) for column in tensors]
    words = torch.tensor([_words(job, 0) for job in jobs], dtype=torch.int32, device=device)[owner]
    scales = [None] * len(first.stored)
    if first.numbers is not None and len(owner) > 1:
        rows = Rows(0, len(owner) * ROW, ROW)
        compiled_update(first.spec, gathered, rows, scales, None, words, sequence, first.numbers)
    else:
        noise = RowNoise(first.spec.streams, words, sequence, weyl_sequence(ROW, device=device))
        param, grad, *stored = (values.view(-1, ROW) for values in gathered)
        first.spec.update(param, grad, first.spec.stored(param, stored, scales), noise, first.constants)
    columns = zip(*((job.param, *job.stored) for job in jobs), strict=True)
    split = [length for size, pad in zip(sizes, padding, strict=True) for length in (size, pad)]
    for column, values in zip(columns, (gathered[0], *gathered[2:]), strict=True):
        pieces = values.split(split)[::2]
        shaped = [piece if t.dim() == 1 else piece.view(t.shape) for piece, t in zip(pieces, column, strict=True)]
        torch._foreach_copy_(list(column), shaped)


def _gather(tensors: Sequence[Tensor], padding: Sequence[int]) -> Tensor:
    zeros = tensors[0].new_zeros(ROW)
    by_length = {pad: zeros[:pad] for pad in set(padding)}
    return torch.cat(
        [
            piece
            for tensor, pad in zip(tensors, padding, strict=True)
            for piece in (tensor if tensor.dim() == 1 else tensor.reshape(-1), by_length[pad])
        ]
    )


@lru_cache(maxsize=64)
def _batch_layout(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return each row's parameter and the Weyl sequence at its first element."""
    rows = torch.tensor([-(-size // ROW) for size in sizes], device="cpu")
    owner = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), rows).to(device)
    sequence = torch.cat([weyl_sequence(int(count), step=ROW, device=torch.device("cpu")) for count in rows]).to(device)
    return owner, sequence


def _largest(job: Job) -> Tensor:
    """Return :meth:`Rule.largest` of this process's part."""
    flat = [tensor.contiguous() for tensor in (job.param, job.grad, *job.stored)]
    found = []
    for rows in _spans(job):
        if job.numbers is not None and _compiles(job, rows):
            found.append(compiled_largest(job.spec, flat, rows, job.scales, job.numbers))
        else:
            param, grad = _rows(flat[:2], rows)
            found.append(job.spec.largest(param, grad, _states(job, flat[2:], rows), job.constants))
    if not found:  # a shard without values
        return torch.zeros(len(flat) - 2, dtype=torch.float32, device=job.param.device)
    return found[0] if len(found) == 1 else torch.stack(found).amax(dim=0)


def _rows(flat: Sequence[Tensor], rows: Rows) -> list[Tensor]:
    first, count, row = rows
    return [tensor.view(-1)[first : first + count].view(-1, row) for tensor in flat]


def _states(job: Job, flat: Sequence[Tensor], rows: Rows, new_scales: Tensor | None = None) -> Sequence[StoredRows]:
    """Return the states of rows."""
    first, count, row = rows
    scales = _scales(job, first, count)
    if not job.spec.precision.is_fp4:
        return job.spec.stored(job.param, _rows(flat, rows), scales, new_scales)
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


def _spans(job: Job) -> Iterator[Rows]:
    """Yield the pieces to update one after the other."""
    total = job.param.numel()
    blocks = job.spec.precision.scaling == "block"
    row = job.spec.precision.block_size if blocks else ROW
    if job.start is None:
        assert job.shard is not None
        row = job.shard.run
    chunk = SEGMENT if job.numbers is not None and not blocks else _chunk(job.param.device)
    chunk = max(chunk // row, 1) * row
    whole = total // row * row
    first = 0
    while first < whole:
        of_segment = SEGMENT - ((job.start or 0) + first) % SEGMENT
        count = min(chunk, whole - first, max(of_segment // row, 1) * row)
        yield Rows(first, count, row)
        first += count
    if whole < total:
        yield Rows(whole, total - whole, total - whole)


def _compiles(job: Job, rows: Rows) -> bool:
    # torch.compile treats a size of 1 apart. Four-bit states are not compiled.
    return (
        not job.spec.precision.is_fp4
        and job.start is not None
        and rows.numel >= 2 * rows.length
        and job.param.dtype != torch.float64
    )


def _chunk(device: torch.device) -> int:
    return _CHUNK if device.type == "cpu" else _ACCELERATOR_CHUNK


def _words(job: Job, first: int) -> list[int]:
    assert job.start is not None
    return _words_at(job, job.start + first)


def _words_at(job: Job, index: int) -> list[int]:
    return [word for stream in job.spec.streams for word in hash_words(job.keys[stream], index)]


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
