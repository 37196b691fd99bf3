"""What an optimizer and the connection between workers tell each other when workers vote on a step."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Entry:
    """One parameter's part in a step that workers vote on.

    Args:
        param: the parameter.
        group: its param group.
        index: its position in the optimizer.
        step: the number of its step, from 1; the same on all workers.
        voted: whether the workers vote on its update; otherwise they average its gradient.
    """

    param: Tensor
    group: dict[str, Any]
    index: int
    step: int
    voted: bool


class Bucket(Protocol):
    """Parameters whose votes and gradients travel together."""

    entries: Sequence[Entry]

    def direction(self, entry: Entry) -> Tensor:
        """Return room for a worker's signs, in the parameter's dtype and shape. What is not positive counts as -1."""

    def gradient(self, entry: Entry) -> Tensor:
        """Return room for the gradient to be averaged, in the parameter's dtype and shape."""

    def start(self) -> None:
        """Start the exchange: what was written has been read when this returns."""

    def finish(self) -> None:
        """Wait for the exchange: from now on :meth:`gradient` returns the mean of all workers."""

    def vote(self, entry: Entry) -> Tensor:
        """Return what the workers decided, float32 in [-1, 1] in the parameter's shape; valid until the next finish."""


class Ballot(Protocol):
    """The connection to the other workers, as an optimizer sees it.

    A strategy hands it to :meth:`VotingOptimizer.vote_by`.
    """

    rank: int
    """This worker's rank; the noise of its signs depends on it."""
    noise: float
    """The range of the noise in its signs, relative to the envelope: in (0, 1]."""

    def agree(self, flags: Tensor) -> Tensor:
        """Return the elementwise maximum of all workers' uint8 flags."""

    def votes_on(self, param: Tensor) -> bool:
        """Return whether the workers vote on a parameter's update in this step."""

    def buckets(self, entries: Iterable[Entry]) -> Sequence[Bucket]:
        """Divide a step's entries into buckets, in the same way on every worker."""


@runtime_checkable
class VotingOptimizer(Protocol):
    """An optimizer whose update is a sign that workers can vote on."""

    def vote_by(self, ballot: Ballot | None) -> None:
        """Decide each step together with other workers; None: alone again.

        Raises:
            ValueError: the optimizer's options make its update no sign.
        """
