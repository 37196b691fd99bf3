"""What the package does on this machine's GPU, as one Markdown file: its tests, and what a step costs.

python benchmarks/gpu_report.py                     # or: make gpu-report
python benchmarks/gpu_report.py --out report.md --rounds 50

Runs the tests marked `gpu`, then times a step of each optimizer on GPT-2's 148 tensors, in turn with fused AdamW.
Where there is no GPU it says so and exits with 2.
"""

import platform
import statistics
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import auto_cli
from optimizer_step import copy_speed, time_in_turn
from optimizers import BASELINE, OPTIMIZERS, Make, gpt2_shapes, numel, parameters
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightning_stosign import SignSGD, StoSignSGD

ROOT = Path(__file__).parents[1]
NO_GPU = 2  # the exit code

STATES = ("float32", "bfloat16", "fp8", "fp8-raw", "fp8-block", "fp4-block")


def compared() -> dict[str, Make]:
    """Return the optimizers to time: ours in every format, torch's, and those of libraries that are installed."""
    makes = {name: OPTIMIZERS[name] for name in (BASELINE, "AdamW, foreach", "torchao AdamWFp8", "torchao AdamW8bit")}
    for states in STATES:

        def make(params: list[nn.Parameter], states: str = states) -> torch.optim.Optimizer:
            return StoSignSGD(params, state_precision=None if states == "float32" else states)

        makes[f"StoSignSGD, {states}"] = make
    makes["StoSignSGD, eager"] = OPTIMIZERS["StoSignSGD, eager"]
    makes["StoSignSGD in expectation, fp8"] = lambda params: StoSignSGD(params, stochastic=False, state_precision="fp8")
    makes["SignSGD, fp8"] = lambda params: SignSGD(params, state_precision="fp8")
    try:
        import bitsandbytes
    except ImportError:
        return makes
    makes["bitsandbytes AdamW8bit"] = lambda params: bitsandbytes.optim.AdamW8bit(params)
    return makes


def launches(make: Make, params: list[nn.Parameter], device: str) -> int:
    """Return how many kernels and copies a step launches, as the profiler counts them; 0 on the CPU."""
    optimizer = make(params)
    for _ in range(3):
        optimizer.step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiled:
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events() or [])


def rows(
    makes: dict[str, Make], shapes: Sequence[tuple[int, ...]], rounds: int, device: str
) -> list[tuple[str, float, float, float, float, int, float]]:
    """Return for each optimizer: ms, ratio to the baseline, GB/s, state bytes per parameter, launches, peak MiB."""
    found = []
    for name, make in makes.items():
        params = parameters(shapes, device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        times, of_baseline, states = time_in_turn(make, params, rounds, device)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if device == "cuda" else 0.0
        median = statistics.median(times)
        ratio = statistics.median(t / base for t, base in zip(times, of_baseline, strict=True))
        moved = 2 * states + 3 * sum(param.nbytes for param in params)
        count = launches(make, params, device)
        found.append((name, 1e3 * median, ratio, moved / median / 1e9, states / numel(params), count, peak))
    return found


def table(found: Sequence[tuple[str, float, float, float, float, int, float]]) -> str:
    """Return what :func:`rows` found as Markdown."""
    head = "| optimizer | ms | ratio to fused AdamW | GB/s | state bytes per parameter | launches per step | peak MiB |"
    lines = [head, "| --- |" + " --- |" * 6]
    for name, ms, ratio, speed, states, count, peak in found:
        lines.append(f"| {name} | {ms:.3f} | {ratio:.2f} | {speed:.0f} | {states:.2f} | {count} | {peak:.0f} |")
    return "\n".join(lines)


def machine(device: str) -> str:
    """Describe what the figures come from."""
    what = f"Python {platform.python_version()}, torch {torch.__version__}"
    if device != "cuda":
        return f"{platform.processor() or platform.machine()}, {what}"
    properties = torch.cuda.get_device_properties(0)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, driver {driver}, {runtime}, {what}"


def run_tests() -> str:
    """Run the tests marked gpu and return pytest's last lines."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header"]
    return "\n".join(subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()[-15:])


def main(out: Path = Path("gpu_report.md"), rounds: int = 30, tests: bool = True) -> None:
    """Write the report.

    Args:
        out: the Markdown file.
        rounds: steps of each optimizer that count.
        tests: run the tests marked gpu, too.
    """
    if not torch.cuda.is_available():
        print("no CUDA or ROCm GPU: nothing to report", file=sys.stderr)
        sys.exit(NO_GPU)
    warnings.filterwarnings("ignore", module="torchao|pytorch_optimizer")
    parts = ["# GPU report", machine("cuda"), f"A copy achieves {copy_speed('cuda', rounds) / 1e9:.0f} GB/s."]
    if tests:
        parts += ["## Tests marked gpu", f"```\n{run_tests()}\n```"]
    found = rows(compared(), gpt2_shapes(), rounds, "cuda")
    parts += ["## One step of GPT-2's 148 tensors (124 M parameters), float32", table(found)]
    out.write_text("\n\n".join(parts) + "\n")
    print(out.read_text())


if __name__ == "__main__":
    auto_cli(main)
