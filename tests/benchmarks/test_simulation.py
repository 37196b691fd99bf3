"""The communication benchmark's simulated workers, against processes."""

import pytest
import torch
import torch.distributed as dist
from links import simulate
from links.methods import Run
from workers import run_workers

OPTIONS = {"size": "1m", "batch_size": 1, "lr": 1e-3, "seed": 3}


def as_processes(rank, workers, method):
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    run = Run(method, **OPTIONS)
    run.train(3, OPTIONS["lr"])
    run.ballot.close()
    return [param.detach() for param in run.model.parameters()]


@pytest.mark.parametrize(("method", "workers"), [("votes majority", 2), ("votes mean", 3)])
def test_threads_end_with_the_bits_of_processes(method, workers):
    expected = run_workers(as_processes, workers, method)[0]
    for worker in simulate.train(method, workers=workers, steps=3, **OPTIONS):
        for ours, theirs in zip(worker.model.parameters(), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_what_is_simulated_is_said():
    with pytest.raises(ValueError, match="method='sign mean' cannot be simulated; accepted: DDP float32, votes mean"):
        simulate.quality("sign mean", workers=2, steps=1, **OPTIONS)
