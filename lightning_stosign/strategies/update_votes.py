"""Workers vote on their updates: what each sends of a bucket of parameters, and what comes back."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from lightning_stosign.optim.numerics.noise import Stream, noise_key
from lightning_stosign.optim.voting import Entry
from lightning_stosign.strategies.compression import Layout, Slice, cast_coins
from lightning_stosign.strategies.launch import Launcher, launcher_for
from lightning_stosign.strategies.packing import pack_signs
from lightning_stosign.strategies.voting_round import VotingRound
from lightning_stosign.strategies.wire import Wire

# Values that travel together: 512 KiB of signs. The signs of a bucket are computed while the one before is on its way.
BUCKET_VALUES = 1 << 22


class UpdateBallot:
    """Exchanges the signs of one optimizer's updates: the :class:`~lightning_stosign.optim.voting.Ballot` of DDP.

    Nothing but the rank differs between workers, so the result is the same on all of them, bit for bit. It does not
    depend on how parameters are grouped into buckets.

    Args:
        is_voted: whether workers vote on a parameter's update; the gradients of the others are averaged.
        wire: the connection to the other workers.
        by_majority: whether the majority decides, or the mean of the signs.
        seed: of the coins that decide ties, the same on all workers.
        warmup_steps: how many steps average all gradients before the first vote.
        watch: whether to measure :meth:`agreement`.
        noise: the range of the noise in the signs, relative to the envelope: in (0, 1].

    Raises:
        ValueError: more than 255 workers and no majority: counts of votes are bytes.
    """

    def __init__(
        self,
        is_voted: Callable[[Tensor], bool],
        wire: Wire,
        *,
        by_majority: bool,
        seed: int,
        warmup_steps: int,
        watch: bool = False,
        noise: float = 1.0,
    ) -> None:
        if not by_majority and wire.workers > 255:
            raise ValueError(f"aggregation='mean' counts the votes of at most 255 workers, got {wire.workers}")
        self.rank = wire.rank
        self.noise = noise
        self.wire = wire
        self.by_majority = by_majority
        self.seed = seed
        self.step = 0  # of the last step that was exchanged, from 1
        self.is_voted = is_voted
        self.watch = watch
        self._warmup_steps = warmup_steps
        self._unanimous: list[Tensor] = []
        self._voted = 0  # coordinates of this step
        self._bytes_before = 0
        self._launcher: Launcher | None = None
        self._rooms: dict[str, Tensor] = {}

    @property
    def bytes_sent(self) -> int:
        """Bytes that this worker sent in the last step."""
        return self.wire.bytes_sent - self._bytes_before

    def agree(self, flags: Tensor) -> Tensor:
        """Begin a step: return the elementwise maximum of all workers' uint8 flags."""
        self.step += 1
        self._bytes_before = self.wire.bytes_sent
        self._unanimous, self._voted = [], 0
        with self._explained():
            self.wire.all_reduce_(flags, dist.ReduceOp.MAX)
        return flags

    def votes_on(self, param: Tensor) -> bool:
        """Return whether the workers vote on a parameter's update in this step."""
        return self.step > self._warmup_steps and self.is_voted(param)

    def buckets(self, entries: Iterable[Entry]) -> list["UpdateBucket"]:
        """Divide a step's entries into buckets, in the same way on every worker."""
        grouped: dict[torch.dtype, list[list[Entry]]] = {}
        for entry in entries:
            of_dtype = grouped.setdefault(entry.param.dtype, [[]])
            if sum(other.param.numel() for other in of_dtype[-1]) >= BUCKET_VALUES:
                of_dtype.append([])
            of_dtype[-1].append(entry)
        return [UpdateBucket(self, bucket) for of_dtype in grouped.values() for bucket in of_dtype]

    def submit(self, job: Callable[[], Tensor], device: torch.device) -> Future[Tensor]:
        """Run an exchange beside the caller, after those that were submitted before."""

        def explained() -> Tensor:
            with torch.no_grad(), self._explained():
                return job()

        if self._launcher is None:
            self._launcher = launcher_for(device)
        return self._launcher.submit(explained)

    def count(self, unanimous: Tensor | None, voted: int) -> None:
        """Take note of how many coordinates of this worker's part of a bucket were unanimous, and how many it has."""
        if unanimous is not None:
            self._unanimous.append(unanimous)
            self._voted += voted

    def agreement(self) -> float:
        """Return the share of the last step's coordinates on which all workers agreed. All workers must call it."""
        if not self._voted:
            return math.nan
        total = torch.stack(self._unanimous).sum()
        self.wire.all_reduce_(total)
        return float(total) / self._voted

    def room(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a work buffer. Kept from bucket to bucket: new memory costs more than the packing."""
        kept = self._rooms.get(name)
        if kept is None or kept.numel() < numel or kept.dtype != dtype or kept.device != device:
            kept = self._rooms[name] = torch.empty(numel, dtype=dtype, device=device)
        return kept[:numel]

    def close(self) -> bool:
        """End the thread; return whether no exchange is stuck in it."""
        launcher, self._launcher = self._launcher, None
        return launcher is None or launcher.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"SignDDPStrategy: worker {self.rank} of {self.wire.workers} could not exchange the updates of step "
                f"{self.step}: {error}\nAnother worker has probably ended: its own output says why. Training can be "
                "resumed from the last checkpoint, with the same or another number of workers."
            ) from error


class UpdateBucket:
    """The :class:`~lightning_stosign.optim.voting.Bucket` of :class:`UpdateBallot`: entries of one dtype and device."""

    def __init__(self, ballot: UpdateBallot, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self._ballot = ballot
        first = entries[0].param
        self._dtype, self._device = first.dtype, first.device
        self._layout = Layout(ballot.wire.workers)
        self._slices: dict[Entry, Slice] = {}
        for number, entry in enumerate(entries):
            self._layout.add(str(number), entry.index, entry.param.numel(), compress=entry.voted)
            self._slices[entry] = (self._layout.compressed if entry.voted else self._layout.exact)[-1]
        self._round = VotingRound(
            ballot.wire,
            self._layout,
            self._dtype,
            self._device,
            by_majority=ballot.by_majority,
            watch=ballot.watch,
        )
        self._votes = torch.empty(0, device="cpu")
        self._future: Future[Tensor] | None = None

    def direction(self, entry: Entry) -> Tensor:
        """Return room for the signs of this worker's update, in the parameter's dtype and shape."""
        return self._slices[entry].of(self._directions()).view(entry.param.shape)

    def gradient(self, entry: Entry) -> Tensor:
        """Return room for the gradient to be averaged, and after :meth:`finish` the mean, in the parameter's shape."""
        return self._slices[entry].of(self._round.exact.view(-1)).view(entry.param.shape)

    def start(self) -> None:
        """Start the exchange: what was written has been read when this returns."""
        directions = self._directions()
        directions[self._layout.n_compressed :].fill_(-1)
        pack_signs(directions.view(self._ballot.wire.workers, -1), out=self._round.signs)
        self._future = self._ballot.submit(self._exchange, self._device)

    def finish(self) -> None:
        """Wait for the exchange."""
        assert self._future is not None
        self._future.wait()
        self._ballot.count(self._round.unanimous, self._layout.n_compressed)
        dtype = torch.promote_types(self._dtype, torch.float32)
        room = self._ballot.room("votes", self._layout.padded, dtype, self._device)
        voters = self._round.voters
        self._votes = self._round.counts(room).sub_(voters / 2).mul_(2 / voters)

    def vote(self, entry: Entry) -> Tensor:
        """Return what the workers decided: in [-1, 1], in the parameter's shape; valid until the next finish."""
        return self._slices[entry].of(self._votes).view(entry.param.shape)

    def _exchange(self) -> Tensor:
        self._round.run(self._tie_coins)
        return self._round.exact

    def _tie_coins(self, out: Tensor) -> Tensor:
        # Two steps in a row share a coin, turned over in the second: where no worker has an update, so that every step
        # is a tie, the parameter stays near where it is.
        steps = [entry.step for entry in self.entries if entry.voted]
        keys = [
            noise_key(self._ballot.seed, (step + 1) // 2, s.index, Stream.TIE)
            for step, s in zip(steps, self._layout.compressed, strict=True)
        ]
        return cast_coins(self._layout, self._ballot.rank, keys, out, [step % 2 == 0 for step in steps])

    def _directions(self) -> Tensor:
        return self._ballot.room("directions", self._layout.padded, self._dtype, self._device)
