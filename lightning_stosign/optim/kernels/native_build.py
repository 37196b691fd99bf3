"""Makes libraries of the C++ in csrc/: compiled once per machine, or taken from the wheel.

A library is looked for in the user's cache folder, where it is compiled if it is missing. Where that is impossible, the
wheel may have one that was compiled for all recent processors. Else there is none, and steps are eager.
"""

import contextlib
import hashlib
import os
import platform
import select
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from ctypes import CDLL, c_int, c_int64, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lightning_stosign._user_code import warn_user
from lightning_stosign.optim.kernels.native_cache import LibraryCache, Unavailable

SWITCH = "LIGHTNING_STOSIGN_COMPILE"
"""The environment variable that switches compilation off: ``0``."""

_SOURCES = Path(__file__).parent / "csrc"
_PREBUILT = Path(__file__).parent / "prebuilt"

# The rounding of each operation is part of the result; nobody looks at floating point exceptions or errno.
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno")
_THREADS = ("-fopenmp", "-fopenmp-simd")  # the latter where there is no OpenMP: one thread

_VERSION_SECONDS, _COMPILE_SECONDS = 5.0, 20.0
_POLL = 0.02  # seconds

# What the wheel's libraries need of a processor: the option, and the names in /proc/cpuinfo.
_BASELINES: dict[str, tuple[str, set[str]]] = {
    "x86_64": ("-march=x86-64-v3", {"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}),
    "aarch64": ("-march=armv8-a", set()),
}

_FUNCTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "finite.cpp": {
        "nonfinite32": (c_void_p, c_void_p, c_int64, c_uint32, c_void_p, c_int),
        "nonfinite16": (c_void_p, c_void_p, c_int64, c_uint32, c_void_p, c_int),
    },
    "step.cpp": {
        "update": (c_void_p, c_int64, c_void_p, c_int),
        "largest": (c_void_p, c_int64, c_void_p, c_int, c_void_p),
    },
}


_NO_COMPILER = "there is no C++ compiler (c++, g++ or clang++)"


class Compiler(NamedTuple):
    """A C++ compiler.

    Attributes:
        command: how to call it.
        identity: its path and what it says of its version.
    """

    command: tuple[str, ...]
    identity: str


_given_up: list[str] = []  # why nothing more is compiled in this process
_told: set[str] = set()


@cache
def native_library(source: str, *macros: str) -> CDLL | None:
    """Return a source as a library, compiled for this machine unless it has been before.

    Args:
        source: name of a file in csrc/.
        macros: definitions, such as ``"MOMENTUM=1"``.

    Returns:
        None where there is none; a warning says why, once and unless compilation is switched off.
    """
    if not _given_up:
        try:
            return _loaded(_compiled(source, macros), source)
        except (Unavailable, OSError) as error:
            _given_up.append(str(error))
    library = _prebuilt(source, macros)
    if library is None:
        _tell("eager steps, several times slower, are used instead")
    elif _given_up[0] != _NO_COMPILER:
        _tell("a prebuilt library for all recent processors is used instead")
    return library


def _tell(consequence: str) -> None:
    if consequence in _told or _is_switched_off():
        return
    _told.add(consequence)
    message = f"No native code could be compiled: {_given_up[0]}; {consequence}. Set {SWITCH}=0 to skip compilation."
    warn_user(message, RuntimeWarning)


def compile_library(source: str, macros: Sequence[str], processor: str, compiler: Compiler, folder: Path) -> Path:
    """Compile a source of csrc/ to a library in a folder.

    Raises:
        Unavailable: the compiler fails, makes nothing, or takes more than 20 seconds.
    """
    path = folder / "library.so"
    deadline = time.monotonic() + _COMPILE_SECONDS
    for threads in _THREADS:
        definitions = [f"-D{macro}" for macro in macros]
        options = [*_FLAGS, processor, *definitions, threads, str(_SOURCES / source), "-o", str(path)]
        code, output = _run([*compiler.command, *options], deadline - time.monotonic(), folder)
        if code == 0:
            break
    if code != 0 or not path.exists():
        lines = [line for line in output.splitlines() if "error" in line or "No space" in line] or output.splitlines()
        raise Unavailable(f"{compiler.command[0]} failed: {lines[0].strip() if lines else f'exit code {code}'}")
    return path


@cache
def find_compiler() -> Compiler:
    """Return the machine's compiler: the one that ``CXX`` names, else the first of c++, g++ and clang++.

    Raises:
        Unavailable: there is none, or it does not say its version within 5 seconds.
    """
    given = os.environ.get("CXX", "")
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise Unavailable(f"CXX={given!r} cannot be parsed ({error})") from error
    words = words or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not words:
        raise Unavailable(_NO_COMPILER)
    path = shutil.which(words[0])
    if path is None:
        raise Unavailable(f"CXX={given!r}: the command {words[0]} does not exist")
    command = os.path.abspath(path), *words[1:]
    code, output = _run([*command, "--version"], _VERSION_SECONDS)
    if code != 0:
        raise Unavailable(f"{shlex.join(command)} --version failed")
    return Compiler(command, f"{os.path.realpath(path)} {output}")


def prebuilt_name(source: str, macros: Sequence[str], processor: str) -> str:
    """Return the file name of a library of the wheel."""
    return f"{_key(source, macros, processor)}.so"


def baseline() -> str | None:
    """Return the option that compiles for all recent processors of this machine's kind; None for an unknown kind."""
    return _BASELINES[platform.machine()][0] if platform.machine() in _BASELINES else None


def _compiled(source: str, macros: Sequence[str]) -> Path:
    if _is_switched_off():
        raise Unavailable(f"{SWITCH}=0 is set")
    compiler = find_compiler()
    processor = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    key = _key(source, macros, processor, *compiler.command, compiler.identity, _processor())
    libraries = LibraryCache()
    found = libraries.find(key)
    if found is not None:
        return found
    with libraries.building(key) as folder:
        return libraries.find(key) or libraries.store(key, compile_library(source, macros, processor, compiler, folder))


def _key(source: str, macros: Sequence[str], *more: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.iterdir()):
        digest.update(path.read_bytes())
    digest.update("\n".join([source, *_FLAGS, *_THREADS, *macros, *more]).encode())
    return digest.hexdigest()[:32]


@cache
def _processor() -> str:
    """Return what tells kinds of processors apart."""
    wanted = ("flags", "Features", "model name", "cpu family", "CPU implementer", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _is_switched_off() -> bool:
    return os.environ.get(SWITCH, "").lower() in ("0", "false", "off", "no")


def _prebuilt(source: str, macros: Sequence[str]) -> CDLL | None:
    option, needed = _BASELINES.get(platform.machine(), ("", set()))
    path = _PREBUILT / prebuilt_name(source, macros, option)
    if not path.exists() or not needed <= set(_processor().split()):
        return None
    with contextlib.suppress(Unavailable):
        return _loaded(path, source)
    return None


def _loaded(path: Path, source: str) -> CDLL:
    try:
        library = CDLL(str(path))
        for name, types in _FUNCTIONS[source].items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, None
    except (OSError, AttributeError) as error:  # for instance a file system without execution
        raise Unavailable(f"the library cannot be loaded ({error})") from error
    return library


def _run(command: Sequence[str], seconds: float, folder: Path | None = None) -> tuple[int, str]:
    """Run a command, with its temporary files in a folder, and return its exit code and output.

    Raises:
        Unavailable: it cannot be run, or takes longer; then it is killed with all that it has started.
    """
    environment = {**os.environ, "LC_ALL": "C", **({"TMPDIR": str(folder)} if folder else {})}
    deadline = time.monotonic() + seconds
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise Unavailable(f"{command[0]} cannot be run ({error})") from error
    with process:
        try:
            output = _output(process, deadline)
            return process.wait(max(0.0, deadline - time.monotonic())), output
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{command[0]} did not finish within {seconds:.0f} s") from None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)


def _output(process: "subprocess.Popen[bytes]", deadline: float) -> str:
    """Return what a command writes until it ends; what it leaves running may keep the pipe open."""
    assert process.stdout is not None
    pipe, output = process.stdout.fileno(), b""
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        if select.select([pipe], [], [], 0.0 if ended else _POLL)[0]:
            part = os.read(pipe, 1 << 16)
            output += part
            if not part:
                break
        elif ended:
            break
    return output.decode(errors="replace")
