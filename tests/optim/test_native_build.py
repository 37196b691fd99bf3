"""The native library: compiled once per machine, never from a folder that others can write, never at any cost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import native_library_script
import pytest
import torch

from lightning_stosign import SignSGD, StoSignSGD
from lightning_stosign.optim.kernels import cpu, native_prebuilt

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="there is no native code on Windows"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
]

SCRIPT = native_library_script.__file__


@pytest.fixture
def start(tmp_path):
    """Starts the script with a cache folder of the test's own."""
    processes = []

    def start(*arguments, before=(), **environment):
        own = {"XDG_CACHE_HOME": str(tmp_path / "cache"), **environment}
        process = subprocess.Popen(
            [*before, sys.executable, SCRIPT, *map(str, arguments)],
            env={**{k: v for k, v in os.environ.items() if k not in ("CXX", "LIGHTNING_STOSIGN_COMPILE")}, **own},
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def run(start):
    """Runs the script and returns what it printed."""
    return lambda *arguments, **options: result(start(*arguments, **options))


def result(process):
    output, _ = process.communicate(timeout=60)
    return json.loads(output)


@pytest.fixture
def compiler(tmp_path):
    """Makes a compiler of a shell script; each compilation is a line of the log."""

    def make(script='exec c++ "$@"', version="exec c++ --version"):
        path = tmp_path / "compiler"
        path.write_text(f'#!/bin/sh\ncase "$*" in *--version) {version};; esac\n')
        with path.open("a") as file:
            file.write(f'echo "$@" >> {tmp_path / "log"}\n{script}\n')
        path.chmod(0o755)
        return str(path)

    return make


def compilations(tmp_path):
    log = tmp_path / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def libraries(tmp_path):
    return sorted((tmp_path / "cache" / "lightning_stosign").glob("*.so"))


def assert_eager_with_one_message(found, *, within=15):
    assert found["loaded"] == [False, False]
    assert len(found["messages"]) == 1
    assert found["seconds"] < within
    return found["messages"][0]


# ---- compiled once ---------------------------------------------------------------------------------------------------


def test_processes_that_start_together_compile_once(start, compiler, tmp_path):
    cxx = compiler('sleep 0.5; exec c++ "$@"')
    found = [result(process) for process in [start(CXX=cxx) for _ in range(3)]]
    assert all(each["loaded"] == [True, True] and not each["messages"] for each in found)
    assert compilations(tmp_path) == 2  # there are two libraries
    assert result(start(CXX=cxx))["loaded"] == [True, True]
    assert compilations(tmp_path) == 2


def test_another_compiler_or_version_or_option_compiles_anew(run, compiler, tmp_path):
    for options, version in (("", "exec c++ --version"), (" -DOTHER", "exec c++ --version"), ("", "echo 13; exit")):
        before = compilations(tmp_path)
        assert run(CXX=compiler(version=version) + options)["loaded"] == [True, True]
        assert compilations(tmp_path) == before + 2


def test_a_process_that_is_killed_while_it_compiles_does_not_hinder_the_next(start, compiler, tmp_path):
    killed = start(CXX=compiler("sleep 60"))
    while compilations(tmp_path) == 0:
        time.sleep(0.02)
    folder = tmp_path / "cache" / "lightning_stosign"
    assert list(folder.glob("build-*"))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    found = result(start(CXX=compiler()))
    assert found["loaded"] == [True, True] and found["seconds"] < 15
    assert not list(folder.glob("build-*"))


def test_the_folder_and_its_missing_parents_are_the_user_s_alone(start, tmp_path):
    umask = os.umask(0)
    try:
        process = start(XDG_CACHE_HOME=str(tmp_path / "cache" / "deeper"))
    finally:
        os.umask(umask)
    assert result(process)["loaded"] == [True, True]
    for folder in ("cache", "cache/deeper", "cache/deeper/lightning_stosign"):
        assert (tmp_path / folder).stat().st_mode & 0o777 == 0o700


# ---- what is found in the folder -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: os.truncate(path, 0),
        lambda path: path.write_bytes(b"\x7fELF" + bytes(1000)),
        lambda path: path.write_bytes(path.read_bytes().replace(b"nonfinite32", b"nonfinite23")),
    ],
    ids=["half", "empty", "garbage", "other content"],
)
def test_a_damaged_library_is_not_loaded_but_compiled_again(run, tmp_path, damage):
    run()
    before = [path.read_bytes() for path in libraries(tmp_path)]
    for path in libraries(tmp_path):
        damage(path)
    found = run()
    assert found["loaded"] == [True, True] and not found["messages"]
    assert [path.read_bytes() for path in libraries(tmp_path)] == before


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_is_refused(run, tmp_path, mode):
    folder = tmp_path / "cache" / "lightning_stosign"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    assert "is not a folder that only user" in assert_eager_with_one_message(run())
    assert not list(folder.iterdir())


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_someone_else_is_refused(run, tmp_path):
    folder = tmp_path / "cache" / "lightning_stosign"
    folder.mkdir(parents=True, mode=0o700)
    os.chown(folder, 1, 1)
    assert "is not a folder that only user" in assert_eager_with_one_message(run())


def test_a_file_in_the_folder_s_place_is_refused(run, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "lightning_stosign").touch()
    assert_eager_with_one_message(run())


# ---- where nothing can be compiled -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PATH": "/nonexistent"}, "there is no C++ compiler"),
        ({"CXX": "g++ 'x"}, "cannot be parsed"),
        ({"CXX": "/nonexistent/c++"}, "does not exist"),
        ({"CXX": "/dev/null"}, "does not exist"),
        ({"CXX": "cat"}, "failed"),
        ({"CXX": "true"}, "failed"),
        ({"XDG_CACHE_HOME": "/dev/null/cache"}, "the cache folder cannot be made"),
        ({"XDG_CACHE_HOME": "", "HOME": "/dev/null"}, "the cache folder cannot be made"),
        ({"XDG_CACHE_HOME": "/proc/1/cache"}, "the cache folder cannot be made"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_an_environment_in_which_nothing_can_be_compiled_means_eager_with_one_message(run, environment, message):
    assert message in assert_eager_with_one_message(run(**environment))


@pytest.mark.parametrize(
    "script",
    ["exit 1", "exit 0", 'for last; do :; done; echo garbage > "$last"', 'for last; do :; done; : > "$last"'],
    ids=["fails", "makes nothing", "makes garbage", "makes an empty file"],
)
def test_a_compiler_that_does_not_work_means_eager_with_one_message(run, compiler, script):
    assert_eager_with_one_message(run(CXX=compiler(script)))


def test_a_library_without_the_functions_means_eager_with_one_message(run, compiler):
    script = 'for last; do :; done; echo | c++ -x c++ -shared -fPIC - -o "$last"'
    assert "cannot be loaded" in assert_eager_with_one_message(run(CXX=compiler(script)))


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks into /proc")
@pytest.mark.parametrize("when", ["compiling", "asked for its version"])
def test_a_compiler_that_hangs_is_killed_with_all_that_it_started(run, compiler, tmp_path, when):
    hangs = f"sleep 300 & echo $! > {tmp_path / 'child'}; wait"
    cxx = compiler(hangs) if when == "compiling" else compiler(version=hangs)
    assert "did not finish within" in assert_eager_with_one_message(run(1, CXX=cxx))
    assert not is_running(int((tmp_path / "child").read_text()))


def test_processes_that_wait_for_a_compiler_that_hangs_do_not_try_it_in_turn(start, compiler, tmp_path):
    cxx = compiler("sleep 300")
    found = [result(process) for process in [start(3, CXX=cxx) for _ in range(3)]]
    for each in found:
        assert_eager_with_one_message(each, within=8)
    assert compilations(tmp_path) == 1


def test_what_a_compiler_leaves_running_is_not_waited_for(run, compiler):
    found = run(CXX=compiler('sleep 20 & exec c++ "$@"'))
    assert found["loaded"] == [True, True] and found["seconds"] < 15


def in_a_mount(options):
    """Return what runs a command with a file system of its own mounted on $XDG_CACHE_HOME."""
    script = f'mount -t tmpfs -o {options} none "$XDG_CACHE_HOME" && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh"]


def can_mount():
    command = [*in_a_mount("size=64k"), "true"]
    return shutil.which("unshare") is not None and (
        subprocess.run(command, env={**os.environ, "XDG_CACHE_HOME": "/tmp"}, capture_output=True).returncode == 0
    )


@pytest.mark.parametrize("options", ["ro", "noexec", "size=16k", "nr_inodes=3"])
def test_a_file_system_that_does_not_take_it_means_eager_with_one_message(run, tmp_path, options):
    if not can_mount():
        pytest.skip("needs the right to mount")
    (tmp_path / "cache").mkdir()
    assert_eager_with_one_message(run(before=in_a_mount(options)))


def test_the_switch_runs_no_compiler_and_says_nothing(run, compiler, tmp_path):
    found = run(CXX=compiler(version=f"touch {tmp_path / 'asked'}; exit"), LIGHTNING_STOSIGN_COMPILE="0")
    assert found["loaded"] == [False, False] and not found["messages"]
    assert not (tmp_path / "asked").exists() and not (tmp_path / "cache").exists()


def test_a_wheel_s_library_is_used_where_there_is_no_compiler(run, tmp_path, monkeypatch):
    monkeypatch.setattr(native_prebuilt, "prebuilt_kinds", lambda: [("finite.cpp", ("FIRST=1",))])
    native_prebuilt.compile_prebuilt(tmp_path / "prebuilt")
    without = run(20, tmp_path / "prebuilt", PATH="/nonexistent")
    assert without["loaded"] == [True, False]
    assert len(without["messages"]) == 1 and "eager steps" in without["messages"][0]  # of what the wheel does not have
    switched_off = run(20, tmp_path / "prebuilt", LIGHTNING_STOSIGN_COMPILE="0")
    assert switched_off["loaded"] == [True, False] and not switched_off["messages"]


def test_a_wheel_has_the_steps_that_the_optimizers_ask_for():
    asked = []
    kinds = set(native_prebuilt.prebuilt_kinds())
    with patch.object(cpu, "native_library", lambda *kind: asked.append((kind[0], kind[1:]))):
        for options in ({}, {"betas": (0.9, 0.95)}):
            for precision in (None, "bfloat16", "fp8", "fp8-raw", "fp8-block:stochastic_rounding=true"):
                for dtype in (torch.float32, torch.bfloat16):
                    for cls in (StoSignSGD, SignSGD):
                        x = torch.nn.Parameter(torch.ones(5000, dtype=dtype))
                        x.grad = torch.ones_like(x)
                        cpu._library.cache_clear()
                        cls([x], state_precision=precision, fused=True, **options if cls is StoSignSGD else {}).step()
    cpu._library.cache_clear()
    assert len(set(asked)) >= 25 and set(asked) <= kinds
