"""The same training in one process: each worker is a thread, and what they send each other stays in memory.

Everything but the wire is the package's own, so that a run ends with the same bits as with processes; a test compares
the two. DDP is one worker with the batch of all, which differs from it by rounding.
"""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_stosign.strategies.wire import Wire
from links.methods import BASELINE, VOTES, Size, Worker, ballot, gpt


class Memory:
    """What the wires of one process share.

    Args:
        workers: number of threads.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._barrier = Barrier(workers)
        self._slots: list[Tensor] = [torch.empty(0)] * workers

    def give_up(self) -> None:
        """Let nobody wait for a worker that has failed."""
        self._barrier.abort()

    def exchange(self, rank: int, mine: Tensor) -> list[Tensor]:
        """Return copies of what each worker has given, by rank."""
        self._slots[rank] = mine
        self._barrier.wait()
        of_all = [slot.clone() for slot in self._slots]
        self._barrier.wait()
        return of_all


class MemoryWire(Wire):
    """A wire between threads."""

    def __init__(self, memory: Memory, rank: int) -> None:
        self.group, self.rank, self.workers, self.bytes_sent = None, rank, memory.workers, 0
        self._memory = memory

    def all_reduce_(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        of_all = torch.stack(self._memory.exchange(self.rank, tensor))
        tensor.copy_(of_all.amax(0) if op == dist.ReduceOp.MAX else of_all.sum(0))

    def all_to_all(self, rows: Tensor, out: Tensor) -> None:
        out.copy_(torch.stack([theirs[self.rank] for theirs in self._memory.exchange(self.rank, rows)]))

    def all_gather(self, mine: Tensor) -> Tensor:
        return torch.stack(self._memory.exchange(self.rank, mine))


def quality(
    method: str, size: Size, workers: int, steps: int, batch_size: int, lr: float, seed: int
) -> list[tuple[int, str, float]]:
    """Return the validation loss of a simulated run, as the measurement of the same name with processes does.

    Raises:
        ValueError: the method cannot be simulated.
    """
    if method not in (BASELINE, *VOTES):
        raise ValueError(f"method={method!r} cannot be simulated; accepted: {', '.join((BASELINE, *VOTES))}")
    trained = train(method, size, workers, steps, batch_size, lr, seed)
    first = [param.detach() for param in trained[0].model.parameters()]
    identical = all(
        torch.equal(param.detach(), other)
        for worker in trained[1:]
        for param, other in zip(worker.model.parameters(), first, strict=True)
    )
    found = {"validation_loss": trained[0].validation_loss(windows=128), "replicas_identical": float(identical)}
    return [(steps, quantity, value) for quantity, value in found.items()]


def train(method: str, size: Size, workers: int, steps: int, batch_size: int, lr: float, seed: int) -> list[Worker]:
    """Train by a method and return the workers."""
    if method == BASELINE:
        together = Worker(gpt(size, seed), None, 0, 1, batch_size=workers * batch_size, lr=lr, seed=seed)
        together.train(steps, lr)
        return [together]
    memory = Memory(workers)
    threads = [
        Worker(
            gpt(size, seed),
            ballot(VOTES[method], MemoryWire(memory, rank)),
            rank,
            workers,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
        )
        for rank in range(workers)
    ]

    def work(worker: Worker) -> None:
        torch.set_num_threads(1)
        try:
            worker.train(steps, lr)
        except BaseException:
            memory.give_up()
            raise

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, threads))
    for worker in threads:
        assert worker.ballot is not None
        worker.ballot.close()
    return threads
