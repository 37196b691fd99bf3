"""Loads a native library in a process of its own and prints what came of it; without torch, which takes seconds."""

import json
import sys
import time
import types
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path

HOME = Path(__file__).parents[2] / "lightning_stosign"


def without_torch():
    """Import native_build alone: the packages above it import torch."""
    for name, folder in {
        "lightning_stosign": HOME,
        "lightning_stosign.optim": HOME / "optim",
        "lightning_stosign.optim.kernels": HOME / "optim" / "kernels",
    }.items():
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = [str(folder)]
        package.__spec__ = ModuleSpec(name, None, origin=str(folder / "__init__.py"), is_package=True)
    from lightning_stosign.optim.kernels import native_build

    return native_build


def main(compile_seconds="20", *prebuilt):
    native_build = without_torch()
    native_build._COMPILE_SECONDS = float(compile_seconds)
    if prebuilt:
        native_build._PREBUILT = Path(prebuilt[0])
    started = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = [native_build.native_library("finite.cpp", macro) is not None for macro in ("FIRST=1", "SECOND=1")]
    print(
        json.dumps(
            {
                "loaded": loaded,
                "messages": [str(warning.message) for warning in caught],
                "seconds": time.monotonic() - started,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
