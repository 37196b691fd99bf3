"""Worker processes for tests: forked from a server that has imported torch once, joined by gloo."""

import multiprocessing
import os
import socket
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "lightning.pytorch", "lightning_stosign"])


def run_workers(function, workers, *args, timeout=120):
    """Call ``function(rank, workers, *args)`` in each worker and return their results, by rank; None for one killed."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        processes = [
            _CONTEXT.Process(target=_work, args=(folder, function, rank, workers, port, args))
            for rank in range(workers)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        hung = [process for process in processes if process.is_alive()]
        for process in hung:
            process.kill()
        failed = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert not failed and not hung, f"{len(hung)} workers did not end; errors: {failed}"
        results = [Path(folder) / f"{rank}.pt" for rank in range(workers)]
        return [torch.load(path, weights_only=True) if path.exists() else None for path in results]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _work(folder, function, rank, workers, port, args):
    torch.set_num_threads(1)
    # LOCAL_RANK tells Lightning that the processes have been started for it.
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(workers)
    )
    try:
        torch.save(function(rank, workers, *args), Path(folder) / f"{rank}.pt")
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
