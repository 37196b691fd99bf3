"""What gradients cost on the wire: SignDDPStrategy's exchange against DDP's float32, its 16 bit hooks and PowerSGD.

python benchmarks/communication.py traffic             # bytes a step, counted by the kernel, for 2, 4 and 8 workers
python benchmarks/communication.py steps               # step time at 10 Mbit/s, 100 Mbit/s and 1 Gbit/s
python benchmarks/communication.py loss                # loss against time and bytes, the GPT example on real text
python benchmarks/communication.py quality             # loss after 200 steps with 4 workers, whatever they take

Each worker is a host of its own: a network namespace whose card `tc` limits to the link's rate. Needs Linux, root and
iproute2, and says so where they are missing. Prints one table.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from hosts import NotPossibleError, bytes_out, hosts, run_on, shape
from jsonargparse import auto_cli
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from gpt import GPT, SIZES  # noqa: E402
from text_data import BYTES, TextDataModule, inputs_and_targets  # noqa: E402

from lightning_stosign import StoSignSGD  # noqa: E402
from lightning_stosign.strategies.exchange import BUCKET_CAP_MB, Aggregation, SignExchange, sign_hook  # noqa: E402
from lightning_stosign.strategies.launch import ThreadLauncher  # noqa: E402
from lightning_stosign.strategies.wire import Wire  # noqa: E402

BASELINE = "DDP float32"
CONTEXT = 128
Size = Literal["1m", "10m"]


def sign(aggregation: Aggregation, *, stochastic: bool) -> Callable[[DistributedDataParallel], None]:
    """Return what puts the exchange of SignDDPStrategy, with its defaults, into a DDP model."""

    def register(ddp: DistributedDataParallel) -> None:
        params = dict(ddp.module.named_parameters())
        exchange = SignExchange(
            params,
            {name for name, param in params.items() if param.ndim > 1},
            Wire(dist.new_group()),
            aggregation=aggregation,
            stochastic=stochastic,
            error_feedback=False,
            warmup_steps=WARMUP,
            seed=0,
        )
        ddp.register_comm_hook(exchange, sign_hook)

    return register


def power_sgd(rank: int) -> Callable[[DistributedDataParallel], None]:
    """Return what puts torch's PowerSGD of a rank into a DDP model."""
    # Its later collectives start as its earlier ones end, so that gloo mixes up those of two buckets: one by one.
    launcher = ThreadLauncher()

    def in_order(state: powerSGD_hook.PowerSGDState, bucket: dist.GradBucket) -> Future[Tensor]:
        return launcher.submit(lambda: powerSGD_hook.powerSGD_hook(state, bucket).wait())

    def register(ddp: DistributedDataParallel) -> None:
        ddp.register_comm_hook(powerSGD_hook.PowerSGDState(None, rank, start_powerSGD_iter=WARMUP), in_order)

    return register


def bfloat16_hook(state: dist.ProcessGroup, bucket: dist.GradBucket) -> Future[Tensor]:
    """Be torch's hook under another name: by its own, DDP refuses it without NCCL, though gloo can sum bfloat16."""
    return default_hooks.bf16_compress_hook(state, bucket)


WARMUP = 3  # uncompressed steps; PowerSGD needs some, and DDP regroups its buckets after the first
METHODS: dict[str, Callable[[DistributedDataParallel], None]] = {
    BASELINE: lambda ddp: None,
    "float16 hook": lambda ddp: ddp.register_comm_hook(None, default_hooks.fp16_compress_hook),
    "bfloat16 hook": lambda ddp: ddp.register_comm_hook(dist.group.WORLD, bfloat16_hook),
    "PowerSGD rank 1": power_sgd(1),
    "PowerSGD rank 4": power_sgd(4),
    "sign mean": sign("mean", stochastic=True),
    "sign majority": sign("majority", stochastic=True),
    "sign majority, plain": sign("majority", stochastic=False),
}


class Run:
    """One worker's training of a GPT by one method.

    Args:
        method: a name of :data:`METHODS`.
        size: of the GPT.
        batch_size: windows a worker and step.
        context: tokens in a window.
        lr: of StoSignSGD.
    """

    def __init__(self, method: str, size: Size, batch_size: int, context: int, lr: float = 2e-3) -> None:
        torch.manual_seed(0)
        bucket_cap_mb = BUCKET_CAP_MB if method.startswith("sign") else None  # SignDDPStrategy's and DDP's default
        self.model = DistributedDataParallel(GPT(BYTES, CONTEXT, *SIZES[size]), bucket_cap_mb=bucket_cap_mb)
        METHODS[method](self.model)
        self.optimizer = StoSignSGD(self.model.parameters(), lr=lr)
        data = TextDataModule(context=context)
        data.setup("fit")
        self.windows, self.held_out = data.train_windows, data.val_windows
        self.batch_size = batch_size
        self.numbers = count(dist.get_rank(), dist.get_world_size())

    def step(self, *, communicate: bool = True) -> float:
        """Take a step and return the seconds it took."""
        start = next(self.numbers) * self.batch_size
        batch = inputs_and_targets(self.windows.__getitems__(list(range(start, start + self.batch_size))))
        began = time.perf_counter()
        with nullcontext() if communicate else self.model.no_sync():
            self.loss(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def validation_loss(self, windows: int = 32) -> float:
        tokens, targets = inputs_and_targets(self.held_out.__getitems__(list(range(windows))))
        return F.cross_entropy(self.model.module(tokens).flatten(0, 1), targets.flatten()).item()


def measure_traffic(methods: list[str], size: Size, steps: int) -> dict[str, float]:
    """Return each method's bytes a step that left this worker's card."""
    sent = {}
    for method in methods:
        run = Run(method, size, batch_size=1, context=8)
        for _ in range(WARMUP + 1):
            run.step()
        dist.barrier()
        before = bytes_out()
        for _ in range(steps):
            run.step()
        sent[method] = (bytes_out() - before) / steps
    return sent


def measure_steps(
    methods: list[str], size: Size, steps: int, rates: list[float], batch_size: int
) -> dict[str, list[tuple[float, float]]]:
    """Return each method's (seconds a step, seconds that communication adds) at each rate.

    Steps with and without communication take turns; both figures are medians, the second one of the pairs' differences.
    """
    seconds: dict[str, list[tuple[float, float]]] = {}
    for method in methods:
        run = Run(method, size, batch_size, CONTEXT)
        for _ in range(WARMUP + 1):
            run.step()
        seconds[method] = []
        for rate in rates:
            shape(rate)
            pairs = []
            for _ in range(steps):
                dist.barrier()
                pairs.append((run.step(communicate=False), run.step()))
            shape(None)
            exposed = statistics.median(whole - alone for alone, whole in pairs)
            seconds[method].append((statistics.median(whole for _, whole in pairs), exposed))
    return seconds


def measure_loss(
    methods: list[str], size: Size, seconds: float, rate: float, batch_size: int
) -> dict[str, list[tuple[float, int, float]]]:
    """Return each method's (seconds, bytes sent, validation loss) until its time is over; evaluation does not count."""
    curves = {}
    for method in methods:
        run = Run(method, size, batch_size, CONTEXT)
        curve: list[tuple[float, int, float]] = []
        dist.barrier()
        shape(rate)
        passed, sent, goes_on = 0.0, 0, torch.ones(())
        while goes_on:
            before = bytes_out()
            passed += run.step()
            sent += bytes_out() - before
            goes_on.fill_(passed < seconds)
            dist.broadcast(goes_on, 0)
            if len(curve) < passed / seconds * 10 or not goes_on:
                curve.append((passed, sent, run.validation_loss()))
        shape(None)
        curves[method] = curve
    return curves


def measure_quality(
    methods: list[str], size: Size, steps: int, batch_size: int, lrs: list[float]
) -> dict[str, list[float]]:
    """Return each method's validation loss after so many steps, at each learning rate."""
    losses: dict[str, list[float]] = {}
    for method in methods:
        for lr in lrs:
            run = Run(method, size, batch_size, CONTEXT, lr)
            for step in range(steps):
                run.optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 20, 1 - 0.9 * step / steps)
                run.step()
            losses.setdefault(method, []).append(run.validation_loss(windows=128))
    return losses


MEASURES: dict[str, Callable[..., Any]] = {
    "traffic": measure_traffic,
    "steps": measure_steps,
    "loss": measure_loss,
    "quality": measure_quality,
}


def worker(measure: str, options: str) -> None:
    """Be one of the workers: print what was measured as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = MEASURES[measure](**json.loads(options))
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(result))


def measured(measure: str, workers: int, timeout: float, **options: Any) -> list[Any]:
    """Measure on so many hosts and return what each found."""
    with hosts(workers) as names:
        return run_on(names, [sys.executable, __file__, "worker", measure, json.dumps(options)], timeout)


def traffic(
    methods: list[str] = list(METHODS),  # noqa: B006
    size: Size = "10m",
    workers: list[int] = [2, 4, 8],  # noqa: B006
    steps: int = 5,
) -> None:
    """Print the bytes a step that leave a worker's card, headers and acknowledgements included.

    Args:
        methods: which to compare.
        size: of the GPT.
        workers: numbers of workers.
        steps: steps to average over.
    """
    if BASELINE not in methods:
        raise ValueError(f"methods={methods} must name {BASELINE!r}, which the others are compared with")
    sent = []
    for number in workers:
        of_workers = measured("traffic", number, timeout=600, methods=methods, size=size, steps=steps)
        sent.append({method: statistics.mean(result[method] for result in of_workers) for method in methods})
    print(f"GPT of size {size}: kB a step and worker, and DDP float32's over it")
    print(f"{'method':22}" + "".join(f"{f'{number} workers':>20}" for number in workers))
    for method in methods:
        cells = (f"{of[method] / 1e3:10.0f} ({of[BASELINE] / of[method]:5.1f}x)" for of in sent)
        print(f"{method:22}" + "".join(f"{cell:>20}" for cell in cells))


def steps(
    methods: list[str] = list(METHODS),  # noqa: B006
    size: Size = "10m",
    steps: int = 3,
    rates: list[float] = [10, 100, 1000],  # noqa: B006
    batch_size: int = 4,
) -> None:
    """Print the time of a step on two hosts, and the part of it that communication adds.

    Args:
        methods: which to compare.
        size: of the GPT.
        steps: steps to take the median of.
        rates: the link's rate in Mbit/s.
        batch_size: windows of 128 tokens a worker.
    """
    first, second = measured(
        "steps", 2, 3600, methods=methods, size=size, steps=steps, rates=rates, batch_size=batch_size
    )
    print(
        f"GPT of size {size}, two hosts, {batch_size} x {CONTEXT} tokens each: seconds a step (exposed communication)"
    )
    print(f"{'method':22}" + "".join(f"{f'{rate:g} Mbit/s':>20}" for rate in rates))
    for method in methods:
        of_workers = zip(first[method], second[method], strict=True)
        cells = (f"{(a[0] + b[0]) / 2:.2f} ({(a[1] + b[1]) / 2:.3f})" for a, b in of_workers)
        print(f"{method:22}" + "".join(f"{cell:>20}" for cell in cells))


def loss(
    methods: list[str] = list(METHODS),  # noqa: B006
    size: Size = "10m",
    seconds: float = 90.0,
    rate: float = 100.0,
    batch_size: int = 4,
) -> None:
    """Print validation loss (nats a byte) as time passes, on two hosts, with StoSignSGD at one learning rate.

    Args:
        methods: which to compare.
        size: of the GPT.
        seconds: how long each method trains.
        rate: the link's rate in Mbit/s.
        batch_size: windows of 128 tokens a worker.
    """
    curves, _ = measured("loss", 2, 3600, methods=methods, size=size, seconds=seconds, rate=rate, batch_size=batch_size)
    marks = [seconds * part / 5 for part in range(1, 6)]
    print(f"GPT of size {size}, two hosts at {rate:g} Mbit/s: validation loss after so many seconds; MB sent in all")
    print(f"{'method':22}" + "".join(f"{f'{mark:.0f} s':>8}" for mark in marks) + f"{'MB':>10}")
    for method, curve in curves.items():
        # The last one evaluated by then; at the end, the step that was under way counts.
        by_then = [[value for passed, _, value in curve if passed <= mark] for mark in marks[:-1]]
        values = [f"{values[-1]:.3f}" if values else "-" for values in by_then] + [f"{curve[-1][2]:.3f}"]
        print(f"{method:22}" + "".join(f"{value:>8}" for value in values) + f"{curve[-1][1] / 1e6:10.1f}")


def quality(
    methods: list[str] = list(METHODS),  # noqa: B006
    size: Size = "1m",
    workers: int = 4,
    steps: int = 200,
    batch_size: int = 4,
    lrs: list[float] = [1e-3, 2e-3, 4e-3],  # noqa: B006
) -> None:
    """Print validation loss (nats a byte) after so many steps of StoSignSGD, by method and peak learning rate.

    Args:
        methods: which to compare.
        size: of the GPT.
        workers: number of workers.
        steps: with linear warm-up over the first 20, then linear decay to a tenth.
        batch_size: windows of 128 tokens a worker.
        lrs: peak learning rates.
    """
    losses = measured(
        "quality", workers, 3600, methods=methods, size=size, steps=steps, batch_size=batch_size, lrs=lrs
    )[0]
    print(f"GPT of size {size}, {workers} workers, {batch_size} x {CONTEXT} tokens each: loss after {steps} steps")
    print(f"{'method':22}" + "".join(f"{f'lr {lr:g}':>12}" for lr in lrs))
    for method, values in losses.items():
        print(f"{method:22}" + "".join(f"{value:12.3f}" for value in values))


if __name__ == "__main__":
    try:
        auto_cli({"traffic": traffic, "steps": steps, "loss": loss, "quality": quality, "worker": worker})
    except NotPossibleError as reason:
        print(f"skipped: {reason}")
