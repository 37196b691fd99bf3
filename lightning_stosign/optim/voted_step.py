"""A step by vote: each worker proposes the sign of its own update, and all of them take the one that was voted for."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_stosign.optim.base import StrictOptimizer, Updates, nonfinite, update_param
from lightning_stosign.optim.kernels import dispatch
from lightning_stosign.optim.kernels.job import Job
from lightning_stosign.optim.numerics.noise import Stream, noise_key
from lightning_stosign.optim.voting import Ballot, Bucket, Entry

# Where an update is exactly zero, its sign is that of this number; it turns over from step to step.
_NO_UPDATE = 0.5


class VotedSteps(StrictOptimizer):
    """Gives an optimizer of signs steps that several workers vote on.

    The worker's update goes to a stand-in for the parameter: with learning rate -1 and no decay it becomes the sign
    itself. So votes need no kernels of their own.
    """

    _ballot: Ballot | None = None

    @abstractmethod
    def _jobs(self, updates: Updates) -> list[Job]:
        """Return what to do; it changes nothing but creates missing states."""

    @abstractmethod
    def _steps_taken(self, param: Tensor) -> int:
        """Return how many steps a parameter that has a state has taken."""

    @abstractmethod
    def _advance(self, params: Sequence[Tensor]) -> None:
        """Count a step of these parameters."""

    @abstractmethod
    def _gives_signs(self, group: dict[str, Any]) -> bool:
        """Return whether each value of a group's update is -1, 0 or 1 times the learning rate."""

    def vote_by(self, ballot: Ballot | None) -> None:
        """Decide each step together with other workers; None: alone again.

        Every worker steps by the same votes, so parameters that were equal stay equal bit for bit, while each worker's
        states are those of its own gradients.

        Raises:
            ValueError: a group's update is no sign, but the in-expectation form.
        """
        if not all(self._gives_signs(group) for group in self.param_groups):
            raise ValueError(
                f"{type(self).__name__}(stochastic=False) does not step by signs, so workers cannot vote on its "
                "updates; use stochastic=True, or signs_of='gradients'"
            )
        self._ballot = ballot

    def _step_by_vote(self, ballot: Ballot) -> None:
        entries = self._agreed_entries(ballot)
        buckets = ballot.buckets(entries)
        for bucket in buckets:
            self._propose(bucket, ballot.rank)
            bucket.start()
        for bucket in buckets:
            bucket.finish()
            self._follow(bucket)
        self._run([(entry.index, entry.param, entry.group) for entry in entries if not entry.voted])
        if entries:
            self._advance([entry.param for entry in entries])

    def _agreed_entries(self, ballot: Ballot) -> list[Entry]:
        """Return the parameters for which any worker has a gradient; none if one of these is not finite."""
        updates = list(self._params_with_grad())
        groups = [(param, group) for group in self.param_groups for param in group["params"]]
        if not groups:
            return []
        flags = torch.zeros((2, len(groups)), dtype=torch.uint8, device="cpu")
        broken = nonfinite([param.grad for _, param, _ in updates if param.grad is not None])
        for (index, _, _), is_broken in zip(updates, broken, strict=True):
            flags[:, index] = torch.tensor([1, is_broken], dtype=torch.uint8, device="cpu")
        takes_part, broken = ballot.agree(flags.to(groups[0][0].device)).tolist()
        offending = [groups[index] for index, is_broken in enumerate(broken) if is_broken]
        if offending:
            names = [self._name(param) for param, _ in offending]
            self._report_nonfinite([f"{name} on some worker" for name in names], [group for _, group in offending])
            return []
        entries = []
        for index, (param, group) in enumerate(groups):
            if takes_part[index]:
                if param.grad is None:  # as DDP does where only other workers used a parameter
                    param.grad = torch.zeros_like(param)
                step = 1 + (self._steps_taken(param) if "step" in self.state[param] else 0)
                entries.append(Entry(param, group, index, step, ballot.votes_on(param)))
        return entries

    def _propose(self, bucket: Bucket, rank: int) -> None:
        """Update this worker's states and write the signs of its updates, or the gradients to be averaged."""
        groups: dict[int, dict[str, Any]] = {}
        updates = []
        for entry in bucket.entries:
            if entry.voted:
                group = groups.setdefault(id(entry.group), _of_signs(entry.group, rank))
                updates.append((entry.index, entry.param, group))
            else:
                bucket.gradient(entry).copy_(_grad(entry))
        voted = (entry for entry in bucket.entries if entry.voted)
        stand_ins = [
            bucket.direction(entry).fill_(_NO_UPDATE if (entry.step + rank) % 2 else -_NO_UPDATE) for entry in voted
        ]
        self._run(updates, stand_ins)

    def _run(self, updates: Updates, stand_ins: Sequence[Tensor] | None = None) -> None:
        jobs = self._jobs(updates)
        if stand_ins is not None:
            jobs = [replace(job, whole=room, param=room) for job, room in zip(jobs, stand_ins, strict=True)]
        batches = dispatch.choose(jobs)
        dispatch.look(batches, at_gradients=False)
        dispatch.run(jobs, batches)

    def _follow(self, bucket: Bucket) -> None:
        """Step by the votes, and put the averaged gradients in place of this worker's."""
        for entry in bucket.entries:
            if not entry.voted:
                _grad(entry).copy_(bucket.gradient(entry))
                continue
            group = entry.group
            key = noise_key(group.get("seed", 0), entry.step, entry.index, Stream.ROUND_PARAM)
            rounding = key if group["param_rounding"] == "stochastic" else None
            update_param(entry.param, bucket.vote(entry), group["lr"], group["weight_decay"], rounding)


def _of_signs(group: dict[str, Any], rank: int) -> dict[str, Any]:
    """Return a group's options for a stand-in that is to become the update's sign, with noise of the worker's own."""
    seed = group.get("seed", 0)
    worker_seed = seed if rank == 0 else noise_key(seed, rank, 0, Stream.WORKER)
    return {**group, "lr": -1.0, "weight_decay": 0.0, "param_rounding": "nearest", "seed": worker_seed}


def _grad(entry: Entry) -> Tensor:
    assert entry.param.grad is not None
    return entry.param.grad
