"""Takes jobs through a step: which backend does which, what must be known first, and the next scales."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_stosign._torch_private import foreach_copy
from lightning_stosign._user_code import warn_user
from lightning_stosign.optim.kernels import cpu, eager, triton_step
from lightning_stosign.optim.kernels.job import SEGMENT, Job, Kind
from lightning_stosign.optim.numerics.rounding import power_of_two_scale
from lightning_stosign.optim.sharding import max_over_shards
from lightning_stosign.optim.states.storage import largest_as_stored, largest_number


class Backend(Protocol):
    """A module of these names. All backends give the same bits. README.md says how to add one."""

    WORTH: int
    """Values in all the parameters to update from which on the backend is the default."""

    def refusal(self, job: Job) -> str | None:
        """Return why the backend does not take a job, or None if it does; "" if the user has been told already.

        The answer holds for all jobs of its kind, dtypes and device, with a ``start`` or without, that have more than
        ``SEGMENT`` values or not: others of these are not asked about.
        """

    def largest(self, jobs: Sequence[Job]) -> Tensor:
        """Look at jobs of one kind, numbers and dtypes, and change nothing.

        Returns:
            float32 ``[jobs, columns]``, on their device. A row holds inf or NaN if the gradient does. For a kind with a
            tensor scale there is a column per state: the largest ``|m_t|`` before it is stored, and the largest
            ``beta2 G_{t-1}``. For any other there is one, and what else it holds does not matter. On an accelerator the
            row of a finite gradient is finite; on the CPU the host looks again where it is not.
        """

    def update(self, jobs: Sequence[Job], scales: Tensor | None, found_inf: Tensor | None) -> None:
        """Update parameters, states and the scales of blocks in place, for jobs of one kind, numbers and dtypes.

        Args:
            jobs: what to do.
            scales: the tensor scales to store the states with, float32 ``[jobs, states]``, contiguous; None for a kind
                without. The old ones are still in the jobs.
            found_inf: None, or a float32 scalar on the device: where it is not 0, change nothing. The host does not
                know it.
        """


BACKENDS: dict[str, Backend] = {"cpu": cpu, "cuda": triton_step}
"""The backend for each type of device; where there is none, or it refuses, the update is eager."""


@dataclass(eq=False)
class Batch:
    """Jobs that a backend does together: of one kind, numbers, dtypes and device."""

    backend: Backend
    jobs: list[Job]
    largest: Tensor | None = None


def choose(jobs: Sequence[Job]) -> list[Batch]:
    """Return which backend does which of a step's jobs."""
    total = 0
    alike: dict[Any, list[Job]] = {}
    for job in jobs:
        param, numel = job.param, job.param.numel()
        total += numel
        together = id(job.kind), id(job.numbers), param.dtype, job.grad.dtype, param.device
        alike.setdefault((*together, job.fused, job.start is None, numel > SEGMENT), []).append(job)
    batches: dict[Any, Batch] = {}
    for (*key, _, _, _), group in alike.items():
        backend = _backend_for(group[0], total)
        batches.setdefault((id(backend), *key), Batch(backend, [])).jobs.extend(group)
    return list(batches.values())


def _backend_for(job: Job, total: int) -> Backend:
    """Return the backend of a job in a step of ``total`` values."""
    candidate = None if job.fused is False else BACKENDS.get(job.param.device.type)
    if candidate is None or not (job.fused or total >= candidate.WORTH):
        return eager
    refusal = candidate.refusal(job)
    if refusal is None:
        return candidate
    if job.fused and refusal:
        _say_once(refusal)
    return eager


def look(batches: Sequence[Batch], *, at_gradients: bool = True) -> None:
    """Find what must be known before anything changes: whether the gradients are finite, and the largest next states.

    Args:
        batches: of a step.
        at_gradients: False if it is known that they are finite.
    """
    for batch in batches:
        if at_gradients or batch.jobs[0].kind.has_tensor_scale:
            batch.largest = batch.backend.largest(batch.jobs)


def nonfinite_on_host(jobs: Sequence[Job], batches: Sequence[Batch]) -> list[bool]:
    """Return for each job whether this process's part of the gradient holds inf or NaN; waits for the answer."""
    suspects: set[int] = set()
    for batch in batches:
        assert batch.largest is not None
        if not bool(batch.largest.isfinite().all()):
            suspects.update(id(job) for job in batch.jobs)
    # What was looked at may be a sum of finite values, or a state that is broken already.
    return [id(job) in suspects and not bool(job.grad.isfinite().all()) for job in jobs]


def nonfinite_on_device(jobs: Sequence[Job], batches: Sequence[Batch]) -> Tensor:
    """Return the same as a float32 tensor ``[jobs]`` of 0 and 1 on the jobs' device, without waiting for it."""
    flags: dict[int, Tensor] = {}
    for batch in batches:
        assert batch.largest is not None
        of_batch = batch.largest.isfinite().all(dim=1).logical_not().to(torch.float32)
        flags.update(zip((id(job) for job in batch.jobs), of_batch.unbind(), strict=True))
    return torch.stack([flags[id(job)] for job in jobs])


def run(jobs: Sequence[Job], batches: Sequence[Batch], found_inf: Tensor | None = None) -> None:
    """Update parameters and states in place.

    Communicates where a sharded parameter's states have one scale: the largest value is that of all shards.

    Args:
        jobs: of a step, in an order that all processes share.
        batches: the same jobs, after :func:`look`.
        found_inf: as in :meth:`Backend.update`.
    """
    scales = _next_scales(jobs, batches)
    for batch, of_batch in zip(batches, scales, strict=True):
        batch.backend.update(batch.jobs, of_batch, found_inf)
    for batch, of_batch in zip(batches, scales, strict=True):
        if of_batch is not None:
            stored = [scale for job in batch.jobs for scale in job.tensor_scales]
            new = of_batch.flatten()
            if found_inf is not None:
                new = torch.where(found_inf == 0, new, torch.stack(stored))
            foreach_copy(stored, list(new.unbind()))


def cover(largest: Tensor, kind: Kind) -> Tensor:
    """Return the scales of the next states, float32 ``[jobs, states]``, from what :meth:`Backend.largest` has found.

    The envelope's scale covers the momentum as stored, whose largest value is the largest value rounded.
    """
    limit = largest_number(kind.precision)
    scales = power_of_two_scale(largest, limit)
    if kind.envelope and kind.momentum:
        m_scale = scales[:, 0]
        covered = largest_as_stored(largest[:, 0] / m_scale, kind.precision) * m_scale
        scales[:, 1] = power_of_two_scale(torch.maximum(largest[:, 1], covered), limit)
    return scales


def _next_scales(jobs: Sequence[Job], batches: Sequence[Batch]) -> list[Tensor | None]:
    scaled = [batch for batch in batches if batch.jobs[0].kind.has_tensor_scale]
    if not scaled:
        return [None] * len(batches)
    rows: dict[int, Tensor] = {}
    for batch in scaled:
        assert batch.largest is not None
        rows.update(zip((id(job) for job in batch.jobs), batch.largest.unbind(), strict=True))
    # In the order of the jobs: which backend takes a shard may differ between the processes.
    max_over_shards((job.whole, rows[id(job)]) for job in jobs if id(job) in rows)
    return [
        None if batch.largest is None or batch not in scaled else cover(batch.largest, batch.jobs[0].kind).contiguous()
        for batch in batches
    ]


@lru_cache(maxsize=64)
def _say_once(refusal: str) -> None:
    warn_user(f"fused=True has no effect for some parameters: {refusal}; they are updated eagerly", UserWarning)
