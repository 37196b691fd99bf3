"""Which native libraries a wheel has, and how they are made; without torch, since a build has none."""

from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning_stosign.optim.kernels.native_build import baseline, compile_library, find_compiler, prebuilt_name
from lightning_stosign.optim.kernels.native_cache import Unavailable

LONGEST_BLOCK = 2048
"""The longest block that csrc/step.cpp is compiled for."""

_STORAGES = (
    ("Float32", "none"),
    ("BFloat16", "none"),
    ("Float8E4M3", "none"),
    ("Float8E4M3", "tensor"),
    ("Float8E4M3", "block"),
)


def step_macros(param: str, state: str, scaling: str, choices: Mapping[str, bool]) -> tuple[str, ...]:
    """Return the macros of csrc/step.cpp, which says what they mean.

    Args:
        param: the parameter's format.
        state: the states' format.
        scaling: their scaling.
        choices: the others, by name.
    """
    formats = f"PARAM={param}", f"STATE={state}", f"SCALING={scaling}", f"LONGEST_ROW={LONGEST_BLOCK}"
    return *formats, *(f"{name}={int(choices[name])}" for name in sorted(choices))


def prebuilt_kinds() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield source and macros of what a wheel has: StoSignSGD and SignSGD with the usual options and formats."""
    yield "finite.cpp", ()
    for param, (state, scaling), envelope in product(("Float32", "BFloat16"), _STORAGES, (True, False)):
        is_narrow = state != "Float32"
        for decays, round_state in product((False, True), (False, True)):
            if (decays and not envelope) or (round_state and not is_narrow):
                continue
            choices = {
                "MOMENTUM": True,
                "ENVELOPE": envelope,
                "MAXIMIZE": False,
                "STOCHASTIC": envelope,
                "DECAYS": decays,
                "ROUND_STATE": round_state,
                "ROUND_DECAYED": decays and is_narrow,
                "ROUND_PARAM": param != "Float32",
            }
            yield "step.cpp", step_macros(param, state, scaling, choices)


def compile_prebuilt(folder: Path) -> list[Path]:
    """Compile the libraries of a wheel for this kind of machine.

    Raises:
        Unavailable: the machine's kind is unknown, or a compilation fails.
    """
    processor = baseline()
    if processor is None:
        raise Unavailable("there is no baseline for this kind of processor")
    compiler = find_compiler()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for source, macros in prebuilt_kinds():
        path = folder / prebuilt_name(source, macros, processor)
        with TemporaryDirectory(dir=folder) as build:
            compile_library(source, macros, processor, compiler, Path(build)).replace(path)
        paths.append(path)
    return paths
