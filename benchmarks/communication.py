"""What data-parallel training costs on the wire: SignDDPStrategy against DDP's float32, its 16 bit hooks and PowerSGD.

python benchmarks/communication.py traffic             # bytes a step, counted by the kernel, for 2, 4 and 8 workers
python benchmarks/communication.py steps               # step time at 10 Mbit/s, 100 Mbit/s and 1 Gbit/s
python benchmarks/communication.py loss                # loss by step and by bytes, the GPT example on real text
python benchmarks/communication.py quality             # loss after 400 steps, each method at its own best rate
python benchmarks/communication.py report              # tables and figure from what has been measured, as the others do

Each worker is a host of its own: a network namespace whose card `tc` limits to the link's rate. Needs Linux, root and
iproute2, and says so where they are missing. Results go to communication.csv, the tables to communication.md and the
figure to communication.png. What the file has is not measured again: an interrupted command goes on where it was, and
a measurement can be made in parts (`--methods`, `--workers`, `--rates`). To repeat one, remove its rows.
"""

import itertools
import json
import math
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evidence.study import bracket
from jsonargparse import auto_cli
from links import simulate
from links.hosts import NotPossibleError, hosts, run_on
from links.methods import BASELINE, METHODS, POWER_SGD_STARTS, TIMED, Size
from links.report import Report, write
from links.store import Key, Store

RESULTS = Path(__file__).parent / "results"
WORKER = Path(__file__).parent / "links" / "worker.py"
START = 2e-3  # where the search for a learning rate begins


def measure(store: Store, wanted: Iterable[Key], **options: Any) -> None:
    """Measure on as many hosts as are wanted what is not in the store yet, and say so step by step.

    Args:
        store: where to add what is found.
        wanted: the measurements, all of one kind and with the same number of workers.
        **options: of the measurement.
    """
    missing = [key for key in wanted if key not in store]
    if not missing:
        return
    name, size, workers = missing[0][:3]
    methods = list(dict.fromkeys(key.method for key in missing))
    with hosts(workers) as names:
        options |= {"methods": methods, "size": size}
        for mbit, method, values in run_on(names, [sys.executable, str(WORKER), name.split()[0], json.dumps(options)]):
            store.add(next(key for key in missing if (key.mbit, key.method) == (mbit, method)), values)
            at = "" if mbit is None else f" at {mbit:g} Mbit/s"
            last = {quantity: value for _, quantity, value in values}
            print(f"{name}, {workers} workers{at}, {method}: {last}", flush=True)


def traffic(
    methods: list[str] = list(METHODS),  # noqa: B006
    size: Size = "10m",
    workers: list[int] = [2, 4, 8],  # noqa: B006
    steps: int = 3,
    results: Path = RESULTS,
) -> None:
    """Measure the bytes a step that leave a worker's card, headers and acknowledgements included.

    Args:
        methods: which to compare.
        size: of the GPT.
        workers: numbers of workers.
        steps: steps to average over.
        results: folder of the results.
    """
    store = Store(results / "communication.csv")
    for number in workers:
        measure(store, [Key("traffic", size, number, None, method) for method in methods], steps=steps)
    report(results)


def steps(
    methods: list[str] = list(TIMED),  # noqa: B006
    size: Size = "10m",
    steps: int = 5,
    rates: list[float] = [10, 100, 1000],  # noqa: B006
    batch_size: int = 4,
    results: Path = RESULTS,
) -> None:
    """Measure the time of a step on two hosts, and the part of it that communication adds.

    Args:
        methods: which to compare.
        size: of the GPT.
        steps: steps to take the median of.
        rates: the link's rates in Mbit/s.
        batch_size: windows of 128 tokens a worker.
        results: folder of the results.
    """
    store = Store(results / "communication.csv")
    for rate in rates:
        wanted = [Key("steps", size, 2, float(rate), method) for method in methods]
        measure(store, wanted, rates=[rate], steps=steps, batch_size=batch_size)
    report(results)


def loss(
    methods: list[str] = list(METHODS),  # noqa: B006
    size: Size = "10m",
    seconds: float = 120.0,
    rate: float = 100.0,
    at_most: int = 200,
    batch_size: int = 4,
    lr: float = 2e-3,
    warmup: int = 10,
    results: Path = RESULTS,
) -> None:
    """Measure validation loss (nats a byte) and bytes by step, on two hosts, for as many steps as fit into a time.

    The link has no limit here; the report places the steps on the clock by the step times that `steps` measured.

    Args:
        methods: which to compare.
        size: of the GPT.
        seconds: how long each method may train at the rate, by its measured step time.
        rate: the link's rate in Mbit/s.
        at_most: steps, however many fit.
        batch_size: windows of 128 tokens a worker; the same as for `steps`.
        lr: of StoSignSGD, the same for all methods.
        warmup: steps over which the rate grows linearly to it.
        results: folder of the results.
    """
    store = Store(results / "communication.csv")
    shown = Report(store, methods, BASELINE, POWER_SGD_STARTS)
    times = {method: shown.seconds_a_step(size, rate, method) for method in methods}
    if missing := [method for method, time in times.items() if time is None]:
        raise ValueError(f"no step time at {rate:g} Mbit/s of {missing}: run `steps --rates [{rate:g}]` first")
    fit = {method: min(at_most, math.ceil(seconds / time)) for method, time in times.items() if time is not None}
    wanted = [Key("loss", size, 2, None, method) for method in methods]
    measure(store, wanted, steps=fit, batch_size=batch_size, lr=lr, warmup=warmup, looks=30)
    report(results)


def quality(
    methods: list[str] = list(METHODS),  # noqa: B006
    size: Size = "1m",
    workers: list[int] = [4],  # noqa: B006
    steps: list[int] = [400],  # noqa: B006
    seeds: int = 3,
    batch_size: int = 4,
    rates: list[float] | None = None,
    simulated: bool = False,
    results: Path = RESULTS,
) -> None:
    """Measure validation loss (nats per byte) after so many steps of StoSignSGD, each method at its own best rate.

    The learning rate is searched for with one seed, by factors of 2, until the best one has a worse one on either side.
    Replicas are compared bit by bit.

    Args:
        methods: which to compare.
        size: of the GPT.
        workers: numbers of workers.
        steps: with linear warm-up over the first tenth, then linear decay to a tenth.
        seeds: how many seeds at the best rate.
        batch_size: windows of 128 tokens per worker.
        rates: try these learning rates instead, all seeds at each.
        simulated: train in this process, each worker a thread: the same bits in less time. DDP float32, votes mean and
            votes majority alone.
        results: folder of the results.
    """
    store = Store(results / "communication.csv")
    for number, length, method in itertools.product(workers, steps, methods):
        key = Key(f"quality after {length}{', simulated' if simulated else ''}", size, number, None, method)

        def loss_at(lr: float, key: Key = key, seed: int = 0, length: int = length) -> float:
            key = key._replace(lr=lr, seed=seed)
            if not simulated:
                measure(store, [key], steps=length, batch_size=batch_size, lr=lr, seed=seed)
            elif key not in store:
                found = simulate.quality(key.method, size, key.workers, length, batch_size, lr, seed)
                store.add(key, found)
                print(
                    f"{key.measure}, {key.workers} workers, {key.method}, lr {lr:g}, seed {seed}: {found}", flush=True
                )
            value = store.value(key, "validation_loss")
            return math.inf if value is None or math.isnan(value) else value

        for lr, seed in itertools.product(rates or [bracket(loss_at, START)], range(seeds)):
            loss_at(lr, seed=seed)
        report(results)


def report(results: Path = RESULTS) -> None:
    """Write communication.md and communication.png from what has been measured, and print the tables.

    Args:
        results: folder of the results.
    """
    text = write(Store(results / "communication.csv"), results, list(TIMED), BASELINE, POWER_SGD_STARTS)
    print(text)


if __name__ == "__main__":
    # Ended from outside, it still removes its hosts.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        auto_cli([traffic, steps, loss, quality, report])
    except NotPossibleError as reason:
        print(f"skipped: {reason}")
