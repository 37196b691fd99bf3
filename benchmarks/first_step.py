"""How long until an optimizer that compiles its step has done the first one: compilation, cold and warm.

python benchmarks/first_step.py "StoSignSGD, fused"

Each measurement is a process of its own. The first finds inductor's cache empty, the second finds what the first left
there. Prints the seconds that the first step took beyond a later one, imports not counted.
"""

import os
import subprocess
import sys
import tempfile

from jsonargparse import auto_cli
from optimizers import BASELINE, OPTIMIZERS, gpt2_shapes, parameters, seconds

_IN_THIS_PROCESS = "--in_this_process=true"


def compile_seconds(optimizer: str, layers: int, width: int, vocabulary: int) -> tuple[float, float]:
    """Return what compilation adds to the first step with inductor's cache empty, and with it filled."""
    command = [sys.executable, __file__, optimizer, _IN_THIS_PROCESS]
    command += [f"--layers={layers}", f"--width={width}", f"--vocabulary={vocabulary}"]
    times = []
    with tempfile.TemporaryDirectory() as cache:
        for _ in ("cold", "warm"):
            process = subprocess.run(
                command,
                check=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
            )
            times.append(float(process.stdout.split()[-1]))
    return times[0], times[1]


def first_step(
    optimizer: str,
    layers: int = 12,
    width: int = 768,
    vocabulary: int = 50257,
    in_this_process: bool = False,
) -> None:
    """Time the first step on GPT-2's shapes.

    Args:
        optimizer: its name in the table of optimizer_step.py.
        layers: blocks of the GPT-2.
        width: its width.
        vocabulary: rows of its embedding.
        in_this_process: print one measurement, with inductor's cache as it is.
    """
    if not in_this_process:
        cold, warm = compile_seconds(optimizer, layers, width, vocabulary)
        print(f"{optimizer}: {cold:.1f} s cold, {warm:.1f} s warm")
        return
    params = parameters(gpt2_shapes(layers, width, vocabulary))
    OPTIMIZERS[BASELINE](params).step()  # what any first step brings: threads, pages
    stepped = OPTIMIZERS[optimizer](params)
    first, _, later = (seconds(stepped.step) for _ in range(3))
    print(first - later)


if __name__ == "__main__":
    auto_cli(first_step)
