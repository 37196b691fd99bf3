"""A step by vote: each worker proposes the sign of its own update, and all of them take the one that was voted for."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_stosign.optim.base import StrictOptimizer, Updates, nonfinite, update_param
from lightning_stosign.optim.numerics.noise import Stream, noise_key
from lightning_stosign.optim.voting import Ballot, Bucket, Entry

# Where an update is exactly zero, its sign is that of this number; it turns over from step to step.
_NO_UPDATE = 0.5


class VotedSteps(StrictOptimizer):
    """Gives an optimizer of signs steps that several workers vote on."""

    _ballot: Ballot | None = None

    def _begin_vote(self, entries: Sequence[Entry]) -> None:
        """Do what a step on parameters that are voted on must do for all of them at once."""

    @abstractmethod
    def _write_signs(self, entries: Sequence[Entry], rooms: Sequence[Tensor], ballot: Ballot) -> None:
        """Update this worker's states and write the signs of its updates, with noise of its own.

        Args:
            entries: parameters that are voted on.
            rooms: where the signs go, one tensor per entry. An update of exactly zero leaves its value as it is.
            ballot: says this worker's rank and the range of its noise.
        """

    @abstractmethod
    def _step_together(self, updates: Updates) -> None:
        """Step by gradients that are the same on all workers, and count the step."""

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
        self._begin_vote([entry for entry in entries if entry.voted])
        buckets = ballot.buckets(entries)
        for bucket in buckets:
            self._propose(bucket, ballot)
            bucket.start()
        for bucket in buckets:
            bucket.finish()
            self._follow(bucket)
        self._advance([entry.param for entry in entries if entry.voted])
        self._step_together([(entry.index, entry.param, entry.group) for entry in entries if not entry.voted])

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
                step = 1 + (self._steps_taken(param) if self._count in self.state[param] else 0)
                entries.append(Entry(param, group, index, step, ballot.votes_on(param)))
        return entries

    def _propose(self, bucket: Bucket, ballot: Ballot) -> None:
        """Write the signs of this worker's updates, and the gradients to be averaged."""
        voted = [entry for entry in bucket.entries if entry.voted]
        for entry in bucket.entries:
            if not entry.voted:
                bucket.gradient(entry).copy_(_grad(entry))
        rooms = [
            bucket.direction(entry).fill_(_NO_UPDATE if (entry.step + ballot.rank) % 2 else -_NO_UPDATE)
            for entry in voted
        ]
        self._write_signs(voted, rooms, ballot)

    def _follow(self, bucket: Bucket) -> None:
        """Step by the votes, and put the averaged gradients in place of this worker's."""
        for entry in bucket.entries:
            if not entry.voted:
                _grad(entry).copy_(bucket.gradient(entry))
                continue
            group = entry.group
            key = noise_key(group.get("seed", 0), entry.step, entry.index, Stream.ROUND_PARAM)
            rounding = key if group.get("param_rounding", "stochastic") == "stochastic" else None
            update_param(entry.param, bucket.vote(entry), group["lr"], group["weight_decay"], rounding)


def worker_seed(group: dict[str, Any], rank: int) -> int:
    """Return the seed of a worker's own noise: that of the param group on worker 0."""
    seed: int = group.get("seed", 0)
    return seed if rank == 0 else noise_key(seed, rank, 0, Stream.WORKER)


def _grad(entry: Entry) -> Tensor:
    assert entry.param.grad is not None
    return entry.param.grad
