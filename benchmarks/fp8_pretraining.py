"""The paper's pretraining experiment at laptop scale: which optimizer survives FP8 states, and who is there first?

python benchmarks/fp8_pretraining.py            # hours on 2 cores; an interrupted study goes on where it was
python benchmarks/fp8_pretraining.py --quick    # minutes: four short runs, and whether the claim holds of them
python benchmarks/fp8_pretraining.py --report   # seconds: only writes RESULTS.md, of the runs that there are

The example's GPT, FP8 matrix products (E4M3 forward, E5M2 gradients), optimizer states in float32 and in FP8; each
method at the learning rate that is best for it, found on a grid that has a worse one on either side; several seeds.
Writes the raw numbers as CSV, figures, and RESULTS.md.
"""

import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from jsonargparse import ArgumentParser

sys.path.insert(0, str(Path(__file__).parent))

from evidence.report import write
from evidence.store import Store
from evidence.study import FP8, OURS, Scale, Study
from evidence.tables import Tables

COMMAND = "python benchmarks/fp8_pretraining.py"

# What the short runs must show, in nats a byte: margins several times as wide as seeds differ.
QUICK = Scale(steps=120, seeds=1)
QUICK_LR = 1e-3
WORSE, AS_GOOD = 0.3, 0.2


def check_claim(workers: int) -> None:
    """Print a table of AdamW and StoSignSGD, each with float32 and FP8 states.

    Raises:
        SystemExit: FP8 states cost AdamW less than 0.3 nats, or StoSignSGD more than 0.2.
    """
    with tempfile.TemporaryDirectory() as folder, pool_of(workers) as pool:
        store = Store(Path(folder))
        study = Study(store, pool, workers, Path(folder), QUICK, compiled=False)
        study.results("quick", study.pairs({"AdamW": QUICK_LR, OURS: QUICK_LR}))
        tables = Tables(store, QUICK)
        print(tables.pairs([("AdamW", QUICK_LR), (OURS, QUICK_LR)]))
        costs = {m: tables.fp8(m, QUICK_LR, states=FP8).mean - tables.fp8(m, QUICK_LR).mean for m in ("AdamW", OURS)}
    if not (costs["AdamW"] > WORSE and abs(costs[OURS]) < AS_GOOD):
        raise SystemExit(
            f"FP8 states cost {costs}: expected more than {WORSE} for AdamW, less than {AS_GOOD} for {OURS}"
        )
    print(f"FP8 states cost AdamW more than {WORSE} nats and {OURS} less than {AS_GOOD}")


def benchmark(
    steps: int = 400,
    task: str = "gpt-1m",
    seeds: int = 3,
    corpus: str | None = None,
    workers: int | None = None,
    out: str = "benchmarks/results",
    work: str = "runs/fp8_pretraining",
    report: bool = False,
) -> None:
    """Carry out the study.

    Args:
        steps: optimizer steps of a run, of 1,024 tokens each.
        task: "gpt-1m" or "gpt-10m".
        seeds: runs at each method's best learning rate.
        corpus: a second text, the path of a file.
        workers: runs side by side, a thread each; by default as many as there are cores.
        out: folder of the results.
        work: folder for the checkpoints of unfinished runs.
        report: train nothing, only write RESULTS.md.
    """
    workers = workers or cores()
    store, scale = Store(Path(out)), Scale(steps, task, seeds)
    if report:
        print(write(store, scale, COMMAND))
        return
    with pool_of(workers) as pool:
        study = Study(store, pool, workers, Path(work), scale, compiled=True, corpus=corpus)
        for part in study.everything():
            print(f"{part}: done; {write(store, scale, COMMAND)}", flush=True)


def cores() -> int:
    return len(os.sched_getaffinity(0))


def pool_of(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="only check the claim, by four short runs")
    parser.add_argument("--report", action="store_true", help="only write RESULTS.md, of the runs that there are")
    parser.add_function_arguments(benchmark, skip={"report"})
    settings = vars(parser.parse_args())
    if settings.pop("quick"):
        check_claim(settings["workers"] or cores())
    else:
        benchmark(**settings)
