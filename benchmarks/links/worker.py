"""What a host does: train by each method and print what was measured, a line of JSON for each.

A line is ``[mbit, method, [[step, quantity, value], ...]]``; values are means over the workers.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from links.hosts import bytes_out, shape
from links.methods import Run, Size

BEFORE = 4  # steps before anything is measured: DDP regroups its buckets, PowerSGD begins
Found = tuple[float | None, str, list[tuple[int, str, float]]]


def mean_of_workers(*values: float) -> list[float]:
    """Return the means over all workers."""
    of_all = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(of_all)
    return (of_all / dist.get_world_size()).tolist()


def traffic(methods: list[str], size: Size, steps: int) -> Iterator[Found]:
    """Yield each method's bytes a step that left a card."""
    for method in methods:
        run = Run(method, size, batch_size=1, context=8)
        for _ in range(BEFORE):
            run.step()
        dist.barrier()
        before = bytes_out()
        for _ in range(steps):
            run.step()
        sent = (bytes_out() - before) / steps
        dist.barrier()  # what follows is not counted on any card
        yield None, method, [(steps, "bytes_a_step", mean_of_workers(sent)[0])]


def steps(methods: list[str], size: Size, rates: list[float], steps: int, batch_size: int) -> Iterator[Found]:
    """Yield each method's seconds a step, and the seconds that communication adds, at each rate.

    Steps with and without communication take turns; both figures are medians, the second one of the pairs' differences.
    """
    for method in methods:
        run = Run(method, size, batch_size)
        for _ in range(BEFORE):
            run.step()
        for rate in rates:
            dist.barrier()
            shape(rate)
            pairs = []
            for _ in range(steps):
                dist.barrier()
                pairs.append((run.step(communicate=False), run.step()))
            dist.barrier()
            shape(None)
            whole, exposed = mean_of_workers(
                statistics.median(whole for _, whole in pairs),
                statistics.median(whole - alone for alone, whole in pairs),
            )
            yield rate, method, [(steps, "seconds_a_step", whole), (steps, "seconds_exposed", exposed)]


def loss(
    methods: list[str], size: Size, steps: dict[str, int], batch_size: int, lr: float, warmup: int, looks: int
) -> Iterator[Found]:
    """Yield each method's validation loss and bytes sent as steps go by, with no limit to the link."""
    for method in methods:
        run = Run(method, size, batch_size, lr=lr)
        points, sent, every = [], 0, max(1, steps[method] // looks)
        for step in range(1, steps[method] + 1):
            run.optimizer.param_groups[0]["lr"] = lr * min(1, step / warmup)
            before = bytes_out()
            run.step()
            sent += bytes_out() - before
            if step % every == 0 or step == 1:
                dist.barrier()  # an evaluation may take longer than what is left of the others' step
                losses, total = mean_of_workers(run.validation_loss(windows=32), sent)
                points += [(step, "validation_loss", losses), (step, "bytes_sent", total)]
        points.append((steps[method], "replicas_identical", float(run.replicas_are_identical())))
        yield None, method, points


def quality(methods: list[str], size: Size, steps: int, batch_size: int, lr: float, seed: int) -> Iterator[Found]:
    """Yield each method's validation loss after so many steps."""
    for method in methods:
        run = Run(method, size, batch_size, lr=lr, seed=seed)
        run.train(steps, lr)
        (value,) = mean_of_workers(run.validation_loss(windows=128))
        identical = float(run.replicas_are_identical())
        yield None, method, [(steps, "validation_loss", value), (steps, "replicas_identical", identical)]


MEASURES: dict[str, Callable[..., Iterator[Found]]] = {
    "traffic": traffic,
    "steps": steps,
    "loss": loss,
    "quality": quality,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for found in MEASURES[sys.argv[1]](**json.loads(sys.argv[2])):
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()
