"""One round of voting on a bucket: signs up, votes counted in equal parts by all workers, the result down."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_stosign.strategies.compression import Layout
from lightning_stosign.strategies.counts import counts_width, pack_counts, unpack_counts
from lightning_stosign.strategies.message import Message
from lightning_stosign.strategies.packing import count_unanimous, count_votes, majority, pack_signs
from lightning_stosign.strategies.wire import Wire


class VotingRound:
    """The messages of one bucket. Fill :attr:`exact` and :attr:`signs`, run, then read :attr:`exact` and the votes.

    Of the ``W`` workers each collects the votes on one part of the coordinates. A bucket's ``n`` voted values cost a
    worker ``n (W - 1) / 8 W`` bytes up and as many down for a majority; the number of votes takes 1.6 times as many
    down with 2 workers, 2.67 times with 4, 3.2 times with 8. The values that are averaged travel in the same messages.

    Args:
        wire: the connection to the other workers.
        layout: the bucket's.
        dtype: of the values that are averaged.
        device: of all tensors.
        by_majority: whether the result is the majority's sign, or the number of votes.
        watch: whether to count the coordinates on which all workers agree.
    """

    def __init__(
        self,
        wire: Wire,
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        *,
        by_majority: bool,
        watch: bool = False,
    ) -> None:
        self._wire, self._layout, self._by_majority = wire, layout, by_majority
        self._up = Message(layout.exact_width, dtype, layout.width)
        self._down = Message(layout.exact_width, dtype, counts_width(layout.width, self.voters))
        self._mine = self._up.empty(wire.workers, device)
        self._results = self._mine
        self.unanimous: Tensor | None = None
        """How many coordinates of this worker's part all workers agreed on, if watched: int64, 0-dimensional."""
        self._watch = watch
        self.exact = torch.empty((wire.workers, layout.exact_width), dtype=dtype, device=device)
        """This worker's values to be averaged, in equal parts; after :meth:`run` their means over all workers."""

    @property
    def voters(self) -> int:
        """How many votes the result of a coordinate counts: 1 once a majority has decided."""
        return 1 if self._by_majority else self._wire.workers

    @property
    def signs(self) -> Tensor:
        """Where this worker's packed signs go: uint8, shape ``[workers, layout.width]``."""
        return self._up.packed_of(self._mine)

    def run(self, tie_breaker: Callable[[Tensor], Tensor]) -> None:
        """Exchange the bucket with all other workers.

        Args:
            tie_breaker: writes one more voter for this worker's part to an int8 tensor of shape ``[8 * width]`` and
                returns it: called for a majority of an even number of workers, and the same for each part on whichever
                worker collects it.
        """
        workers, layout, device = self._wire.workers, self._layout, self._mine.device
        self._up.exact_of(self._mine).copy_(self.exact)
        breaks_ties = self._by_majority and workers % 2 == 0
        theirs = self._up.empty(workers + breaks_ties, device)
        self._wire.all_to_all(self._mine, theirs[:workers])
        signs = self._up.packed_of(theirs)
        if self._watch:
            part = 8 * layout.width
            voted = min(max(layout.n_compressed - self._wire.rank * part, 0), part)
            self.unanimous = count_unanimous(signs[:workers]) - (part - voted)  # all agree on the padding
        if breaks_ties:
            coins = tie_breaker(torch.empty(8 * layout.width, dtype=torch.int8, device=device))
            pack_signs(coins.view(1, -1), zero_is_positive=True, out=signs[workers:])
        result = self._down.empty(1, device)
        dtype = torch.promote_types(self.exact.dtype, torch.float32)
        # Divided first: the sum of large gradients would not be finite where their mean is.
        self._down.exact_of(result)[0] = self._up.exact_of(theirs)[:workers].to(dtype).div_(workers).sum(0)
        votes = majority(signs) if self._by_majority else count_votes(signs)
        pack_counts(votes, self.voters, out=self._down.packed_of(result)[0])
        self._results = self._wire.all_gather(result[0])
        self.exact.copy_(self._down.exact_of(self._results))

    def counts(self, out: Tensor) -> Tensor:
        """Write how many of the voters are positive for each voted value.

        Args:
            out: float32 or float64, shape ``[layout.padded]``.

        Returns:
            ``out``.
        """
        unpack_counts(self._down.packed_of(self._results), self.voters, out=out.view(self._wire.workers, -1))
        return out
