"""Where the exchange of a bucket runs while backward goes on: a thread on the CPU, a stream on CUDA."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from queue import SimpleQueue

import torch
from torch import Tensor
from torch.futures import Future

Job = Callable[[], Tensor]


class Launcher(ABC):
    """Runs jobs one after the other, beside the caller, in the order of submission.

    The order matters: a job is a sequence of collectives, and all workers must issue all collectives in one order.
    """

    @abstractmethod
    def submit(self, job: Job) -> Future[Tensor]:
        """Start a job, or put it in line, and return the future of its result."""

    @abstractmethod
    def close(self) -> bool:
        """Release what the launcher holds and return whether no job is running any more."""


class ThreadLauncher(Launcher):
    """Runs jobs on a thread. Both torch's kernels and gloo's waiting release the interpreter's lock."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Future[Tensor], Job] | None] = SimpleQueue()
        # A daemon: a job that waits for a worker that is gone must not keep this process from ending.
        self._thread = threading.Thread(target=self._work, name="sign-exchange", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Future[Tensor]:
        """Put a job in line."""
        promise: Future[Tensor] = Future()
        self._jobs.put((promise, job))
        # An exception set in Python reaches DDP, which waits in C++, only through a callback that raises it.
        return promise.then(lambda done: done.value())

    def close(self) -> bool:
        """End the thread, unless its job is stuck."""
        self._jobs.put(None)
        self._thread.join(timeout=1.0)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (entry := self._jobs.get()) is not None:
            promise, job = entry
            try:
                result = job()
            except Exception as error:
                promise.set_exception(error)  # type: ignore[arg-type]  # annotated as a result
            else:
                promise.set_result(result)


class StreamLauncher(Launcher):
    """Issues jobs at once, on a CUDA stream of their own: the host does not wait for any of it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def submit(self, job: Job) -> Future[Tensor]:
        """Issue a job."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            promise: Future[Tensor] = Future(devices=[self._device])
            promise.set_result(job())  # records the stream: who waits for the future waits for the job
        return promise

    def close(self) -> bool:
        """Wait for the stream."""
        self._stream.synchronize()
        return True


def launcher_for(device: torch.device) -> Launcher:
    """Return the launcher for exchanges of tensors on a device."""
    return ThreadLauncher() if device.type == "cpu" else StreamLauncher(device)
