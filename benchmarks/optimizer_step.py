"""What an optimizer step costs, as a ratio to torch's fused AdamW, each optimizer taking turns with it.

python benchmarks/optimizer_step.py                             # GPT-2's 148 tensors and one of 20 M: needs 5 GB
python benchmarks/optimizer_step.py --optimizers '["StoSignSGD, fused*"]' --shapes gpt2
python benchmarks/optimizer_step.py --width 256 --compilation false

Prints one table for each set of shapes:
  ms            median time of a step
  ratio         to the fused AdamW's step before it: median, and smallest to largest over the rounds
  bytes         of optimizer state a parameter
  GB/s          achieved, if parameters and states are read and written once and gradients read once; the line above the
                table says what copying a tensor achieves
  cold, warm    seconds that compilation adds to the first step in a fresh process, with inductor's cache empty and
                filled (on GPT-2's shapes; - where nothing is compiled; native code has no cache)
"AdamW, fused, checked" looks at all gradients before it touches anything, as this package's optimizers do.
How it scales, and the memory a step needs: optimizer_scaling.py.
"""

import statistics
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from first_step import compile_seconds
from jsonargparse import auto_cli
from optimizers import BASELINE, OPTIMIZERS, Make, choose, gpt2_shapes, numel, parameters, seconds
from torch import nn

from lightning_stosign import state_bytes

COMPILED = ("StoSignSGD, fused*", "SignSGD, fused*", "torchao*")


def time_in_turn(
    make: Make, params: list[nn.Parameter], rounds: int, device: str
) -> tuple[list[float], list[float], int]:
    """Return the seconds of an optimizer's steps, those of the baseline's before each, and the optimizer's state bytes.

    The first two rounds, in which states are made and kernels compiled, do not count. Then the gradients become
    smaller: as after the first dozens of steps of a run, hardly any momentum is the largest so far.
    """
    baseline, optimizer = OPTIMIZERS[BASELINE](params), make(params)
    of_baseline, of_optimizer = [], []
    for number in range(rounds + 2):
        if number == 2:
            _multiply_gradients(params, 1 / 16)
        of_baseline.append(seconds(baseline.step, device))
        of_optimizer.append(seconds(optimizer.step, device))
    _multiply_gradients(params, 16)
    return of_optimizer[2:], of_baseline[2:], state_bytes(optimizer)


def _multiply_gradients(params: list[nn.Parameter], factor: float) -> None:
    torch._foreach_mul_([param.grad for param in params if param.grad is not None], factor)


def copy_speed(device: str, rounds: int, values: int = 1 << 26) -> float:
    """Return the bytes a second that copying a large float32 tensor reads and writes."""
    source = torch.ones(values, device=device)
    target = torch.zeros_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(rounds + 1)][1:]
    return 2 * source.nbytes / statistics.median(times)


def print_table(
    title: str,
    shapes: Sequence[tuple[int, ...]],
    makes: dict[str, Make],
    compilation: dict[str, tuple[float, float]],
    rounds: int,
    device: str,
) -> None:
    params = parameters(shapes, device)
    size = numel(params)
    print(f"{title}: {len(shapes)} tensors, {size / 1e6:.1f} M parameters")
    print(f"{'':30} {'ms':>8} {'ratio':>6} {'(range)':>15} {'bytes':>6} {'GB/s':>6} {'cold':>6} {'warm':>6}")
    for name, make in makes.items():
        times, of_baseline, states = time_in_turn(make, params, rounds, device)
        ratios = sorted(t / base for t, base in zip(times, of_baseline, strict=True))
        median = statistics.median(times)
        moved = 2 * states + 3 * sum(param.nbytes for param in params)
        cold, warm = (f"{t:.1f}" for t in compilation[name]) if name in compilation else ("-", "-")
        print(
            f"{name:30} {1e3 * median:8.1f} {statistics.median(ratios):6.2f} "
            f"{f'({ratios[0]:.2f} - {ratios[-1]:.2f})':>15} {states / size:6.2f} {moved / median / 1e9:6.1f} "
            f"{cold:>6} {warm:>6}",
            flush=True,
        )


def benchmark(
    optimizers: Sequence[str] = ("*",),
    shapes: Literal["gpt2", "one", "both"] = "both",
    layers: int = 12,
    width: int = 768,
    vocabulary: int = 50257,
    one: int = 20_000_000,
    rounds: int = 9,
    compilation: bool = True,
    device: str = "cpu",
) -> None:
    """Time one step of each optimizer.

    Args:
        optimizers: names, or patterns of names such as `StoSignSGD*`.
        shapes: GPT-2's parameters, one tensor, or both.
        layers: blocks of the GPT-2 whose parameters are updated.
        width: its width.
        vocabulary: rows of its embedding.
        one: values of the one tensor.
        rounds: how often each optimizer takes its turn, after two that do not count.
        compilation: measure what compilation takes, too: two more processes for each optimizer that compiles.
        device: where the parameters are.
    """
    warnings.filterwarnings("ignore", module="torchao|pytorch_optimizer")
    makes = choose(optimizers)
    compiled = [name for name in makes if compilation and name in choose(COMPILED)]
    compile_times = {name: compile_seconds(name, layers, width, vocabulary) for name in compiled}
    print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {rounds} rounds; "
        f"a copy: {copy_speed(device, rounds) / 1e9:.1f} GB/s"
    )
    if shapes != "one":
        print_table("GPT-2", gpt2_shapes(layers, width, vocabulary), makes, compile_times, rounds, device)
    if shapes != "gpt2":
        print_table("One tensor", [(one,)], makes, compile_times, rounds, device)


if __name__ == "__main__":
    auto_cli(benchmark)
