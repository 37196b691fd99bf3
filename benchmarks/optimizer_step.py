"""What an optimizer step costs, as a ratio to torch's AdamW: all optimizers take turns in one process.

python benchmarks/optimizer_step.py                  # GPT-2's 148 tensors, 124 M parameters: needs 3 GB
python benchmarks/optimizer_step.py --width 256      # a small one

Prints one table: the median time of a step, its ratio to `AdamW(fused=True)` of the same round (median, and smallest to
largest over the rounds), and the bytes of optimizer state a parameter.
"""

import statistics
import time
from collections.abc import Callable

import torch
from jsonargparse import auto_cli
from torch import nn

from lightning_stosign import SignSGD, StoSignSGD, state_bytes

BASELINE = "AdamW(fused=True)"
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    BASELINE: lambda params: torch.optim.AdamW(params, fused=True),
    "AdamW(foreach=True)": lambda params: torch.optim.AdamW(params, foreach=True),
    "AdamW(foreach=False)": lambda params: torch.optim.AdamW(params, foreach=False),
    "StoSignSGD, fused": lambda params: StoSignSGD(params, fused=True),
    "StoSignSGD, fused, bfloat16": lambda params: StoSignSGD(params, fused=True, state_precision="bfloat16"),
    "StoSignSGD, fused, fp8-raw": lambda params: StoSignSGD(params, fused=True, state_precision="fp8-raw"),
    "StoSignSGD, fused, fp8": lambda params: StoSignSGD(params, fused=True, state_precision="fp8"),
    "StoSignSGD, eager": lambda params: StoSignSGD(params, fused=False),
    "StoSignSGD, eager, bfloat16": lambda params: StoSignSGD(params, fused=False, state_precision="bfloat16"),
    "StoSignSGD, eager, fp8-raw": lambda params: StoSignSGD(params, fused=False, state_precision="fp8-raw"),
    "StoSignSGD, eager, fp8": lambda params: StoSignSGD(params, fused=False, state_precision="fp8"),
    "StoSignSGD, eager, fp8-block": lambda params: StoSignSGD(params, fused=False, state_precision="fp8-block"),
    "SignSGD()": lambda params: SignSGD(params),
}


def gpt2_shapes(layers: int, width: int) -> list[tuple[int, ...]]:
    """Return the shapes of GPT-2's parameters: for 12 layers of width 768, 148 tensors with 124 M values."""
    norm = [(width,), (width,)]
    block = [*norm, (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [*norm, (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(50257, width), (1024, width), *block * layers, *norm]


def benchmark(layers: int = 12, width: int = 768, rounds: int = 5, device: str = "cpu") -> None:
    """Time one step of each optimizer in turn.

    Args:
        layers: blocks of the GPT-2 whose parameters are updated.
        width: its width.
        rounds: how often each optimizer takes its turn, after one that does not count.
        device: where the parameters are.
    """
    shapes = gpt2_shapes(layers, width)
    params = [nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    size = sum(param.numel() for param in params)
    optimizers = {name: make(params) for name, make in OPTIMIZERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(rounds + 1):
        for name, optimizer in optimizers.items():
            started = time.perf_counter()
            optimizer.step()
            if device != "cpu":
                torch.accelerator.synchronize()
            if turn > 0:
                seconds[name].append(time.perf_counter() - started)

    print(f"{len(shapes)} tensors, {size / 1e6:.1f} M parameters, {device}, {torch.get_num_threads()} threads")
    print(f"{'optimizer':30} {'ms a step':>10} {'ratio':>7} {'(range)':>15} {'state bytes a parameter':>24}")
    for name, times in seconds.items():
        ratios = sorted(t / base for t, base in zip(times, seconds[BASELINE], strict=True))
        spread = f"({ratios[0]:.2f} - {ratios[-1]:.2f})"
        print(
            f"{name:30} {1e3 * statistics.median(times):10.1f} {statistics.median(ratios):7.2f} {spread:>15} "
            f"{state_bytes(optimizers[name]) / size:24.2f}"
        )


if __name__ == "__main__":
    auto_cli(benchmark)
