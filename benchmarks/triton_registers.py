"""Registers and instructions of Triton's step, compiled for GPUs that need not be here.

python benchmarks/triton_registers.py                          # the variants that people train with
python benchmarks/triton_registers.py --targets "[90, 100]"

Prints a Markdown table: registers per thread, instructions per value in whole blocks (static count of the whole kernel,
both branches included, over the values that a thread updates), and bytes of memory traffic per value.
"""

import sys
from pathlib import Path

from jsonargparse import auto_cli

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "optim"))

from triton_ahead_of_time import NVIDIA, compile_for, resources, variants  # type: ignore[import-not-found]

from lightning_stosign.optim.kernels.triton_step import VALUES

SHOWN = [
    "update StoSignSGD, float32, float32",
    "update StoSignSGD, bfloat16, bfloat16",
    "update StoSignSGD, float32, fp8",
    "update StoSignSGD, bfloat16, fp8",
    "update StoSignSGD, float32, fp8-block",
    "update StoSignSGDv2, float32, fp8",
    "update in expectation, float32, float32",
    "update SignSGD, float32, float32",
    "largest StoSignSGD, float32, fp8",
    "nonfinite StoSignSGD, float32, float32",
]
THREADS = 128


def main(targets: list[int] = [80, 90, 100]) -> None:  # noqa: B006
    """Print the table.

    Args:
        targets: compute capabilities times ten, e.g. 90.
    """
    known = variants()
    print("| kernel | " + " | ".join(f"sm_{target}: registers, instructions per value" for target in targets) + " |")
    print("| --- |" + " --- |" * len(targets))
    for name in SHOWN:
        cells = []
        for target in targets:
            registers, stack, _, instructions = resources(compile_for(NVIDIA[f"sm_{target}"], *known[name]))
            spilled = f" ({stack} bytes of stack)" if stack else ""
            cells.append(f"{registers}{spilled}, {len(instructions) / (VALUES / THREADS):.0f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    auto_cli(main)
