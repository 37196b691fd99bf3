"""Puts native libraries into the wheel: ``LIGHTNING_STOSIGN_BUILD_NATIVE=1 python -m build --wheel``.

They are for machines without a C++ compiler, and run on all x86-64-v3 (or 64-bit ARM) processors. Without the variable
the wheel is pure Python, and each machine compiles what it needs.
"""

import importlib
import os
import shutil
import sys
import sysconfig
import tempfile
import types
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SWITCH = "LIGHTNING_STOSIGN_BUILD_NATIVE"
PACKAGE = Path(__file__).parent / "lightning_stosign"


class NativeLibraries(BuildHookInterface):
    """Compiles the common kinds of steps."""

    _folder: str | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, where it is asked for; raises if it fails."""
        if self.target_name != "wheel" or os.environ.get(SWITCH, "0") in ("", "0"):
            return
        self._folder = tempfile.mkdtemp()
        for path in _prebuild_module().compile_prebuilt(Path(self._folder)):
            build_data["force_include"][str(path)] = f"lightning_stosign/optim/kernels/prebuilt/{path.name}"
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what the wheel has now."""
        if self._folder is not None:
            shutil.rmtree(self._folder)


def _prebuild_module() -> Any:
    """Return native_prebuilt.py without the packages above it, which import torch."""
    for name in ("lightning_stosign", "lightning_stosign.optim", "lightning_stosign.optim.kernels"):
        package = types.ModuleType(name)
        package.__path__ = [str(PACKAGE.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    return importlib.import_module("lightning_stosign.optim.kernels.native_prebuilt")
