"""Compiles the C++ in csrc/ with the machine's compiler, when it is first wanted."""

import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from ctypes import CDLL, c_int, c_int64, c_uint32, c_void_p
from functools import cache
from pathlib import Path

_SOURCES = Path(__file__).parent / "csrc"

# The rounding of each operation is part of the result; nobody looks at floating point exceptions or errno.
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno")

_ARGUMENTS = {
    "nonfinite32": (c_void_p, c_void_p, c_int64, c_uint32, c_void_p, c_int),
    "nonfinite16": (c_void_p, c_void_p, c_int64, c_uint32, c_void_p, c_int),
    "update": (c_void_p, c_int64, c_void_p, c_int),
    "largest": (c_void_p, c_int64, c_void_p, c_int, c_void_p),
}


@cache
def native_library(source: str, *macros: str) -> CDLL | None:
    """Return a source as a library, for this process alone: it takes a third of a second, too little to need a cache.

    Args:
        source: name of a file in csrc/.
        macros: definitions, such as ``"MOMENTUM=1"``.

    Returns:
        None where it cannot be compiled or loaded: without a compiler, or where temporary files cannot be executed.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        return None
    processor = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    command = [*shlex.split(compiler), *_FLAGS, processor, *(f"-D{macro}" for macro in macros), str(_SOURCES / source)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = str(Path(folder, "library.so"))
        for threads in ("-fopenmp", "-fopenmp-simd"):  # the latter where there is no OpenMP: one thread
            try:
                subprocess.run([*command, threads, "-o", path], check=True, capture_output=True)
                return _declared(CDLL(path))
            except (OSError, subprocess.CalledProcessError):
                continue
    return None


def _declared(library: CDLL) -> CDLL:
    for name, types in _ARGUMENTS.items():
        if hasattr(library, name):
            function = getattr(library, name)
            function.argtypes, function.restype = types, None
    return library
