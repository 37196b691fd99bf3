"""How a step's time grows with the number of parameters, and the memory it needs beyond them and its states.

python benchmarks/optimizer_scaling.py                      # 10 M to 350 M parameters: needs 6 GB
python benchmarks/optimizer_scaling.py --sizes '[10, 40]' --optimizers '["StoSignSGD, fused, fp8"]'

Prints, for each optimizer:
  ns a parameter    of a step on GPT-2's shapes of each size (median), and the slope of log time over log size: 1 is
                    linear
  extra MiB         the most memory in use during a step at the largest size, beyond what was in use before it
  growth MiB        of resident memory over many steps of a small model, from a tenth of them to the last
Linux and CPU only: resident memory and its peak come from /proc.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import auto_cli
from optimizers import Make, choose, gpt2_shapes, numel, parameters, seconds

# GPT-2 as (layers, width) by millions of parameters.
SIZES = {1: (1, 16), 10: (2, 192), 40: (5, 512), 124: (12, 768), 350: (24, 1024)}

_PROCESS = Path("/proc/self")


def _resident(field: str) -> int:
    """Return the process's memory in KiB: now (``VmRSS``) or at most (``VmHWM``)."""
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(make: Make, size: int, rounds: int) -> tuple[int, float, float]:
    """Return the number of parameters, the median seconds of a step and the most MiB in use during one beyond before.

    Two steps come first, in which states are made and kernels compiled.
    """
    params = parameters(gpt2_shapes(*SIZES[size]))
    optimizer = make(params)
    times = [seconds(optimizer.step) for _ in range(rounds + 2)][2:]
    (_PROCESS / "clear_refs").write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    optimizer.step()
    return numel(params), statistics.median(times), (_resident("VmHWM") - before) / 1024


def growth(make: Make, size: int, steps: int) -> float:
    """Return by how many MiB resident memory grows over the last nine tenths of the steps."""
    optimizer = make(parameters(gpt2_shapes(*SIZES[size])))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        if step == steps // 10:
            before = _resident("VmRSS")
        optimizer.step()
        scheduler.step()
    return (_resident("VmRSS") - before) / 1024


def slope(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Return the exponent of the power law fitted to times by size."""
    x, y = [math.log(size) for size in sizes], [math.log(t) for t in times]
    return statistics.linear_regression(x, y).slope


def benchmark(
    optimizers: Sequence[str] = ("AdamW, fused", "StoSignSGD, fused", "StoSignSGD, fused, fp8", "StoSignSGD, eager"),
    sizes: Sequence[int] = (10, 40, 124, 350),
    rounds: int = 7,
    steps: int = 2000,
) -> None:
    """Measure time by size, extra memory and its growth.

    Args:
        optimizers: names in the table of optimizer_step.py, or patterns of names.
        sizes: millions of parameters: 1, 10, 40, 124, 350.
        rounds: steps timed at each size, after two that do not count.
        steps: steps over which memory may not grow; 0 leaves that out.
    """
    unknown = [size for size in sizes if size not in SIZES]
    if unknown:
        raise ValueError(f"sizes={unknown} are not among {list(SIZES)}")
    print(f"cpu, {torch.get_num_threads()} threads, torch {torch.__version__}, {rounds} rounds")
    columns = "".join(f"{f'{size} M':>8}" for size in sizes)
    print(f"{'ns a parameter':26}{columns} {'slope':>7} {'extra MiB':>10} {'growth MiB':>11}")
    for name, make in choose(optimizers).items():
        results = [measure(make, size, rounds) for size in sizes]
        counts, times = [count for count, _, _ in results], [t for _, t, _ in results]
        row = "".join(f"{1e9 * t / count:8.2f}" for count, t in zip(counts, times, strict=True))
        exponent = f"{slope(counts, times):.3f}" if len(sizes) > 1 else "-"
        grown = f"{growth(make, min(sizes), steps):.1f}" if steps else "-"
        print(f"{name:26}{row} {exponent:>7} {results[-1][2]:10.1f} {grown:>11}", flush=True)


if __name__ == "__main__":
    auto_cli(benchmark)
