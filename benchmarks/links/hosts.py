"""Hosts on one machine: network namespaces, each with one network card, plugged into one switch."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

CARD = "eth0"


class NotPossibleError(RuntimeError):
    """This machine does not let us make network namespaces; the message says why."""


@contextmanager
def hosts(count: int) -> Iterator[list[str]]:
    """Make hosts 10.77.0.1, 10.77.0.2, ... and return the names of their namespaces; all is gone at the end.

    Raises:
        NotPossibleError: not on Linux as root, or without iproute2.
    """
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        raise NotPossibleError("network namespaces need Linux and root")
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        raise NotPossibleError(f"{' and '.join(missing)} not found: install iproute2")
    prefix = f"sign{os.getpid()}"
    switch, names = f"{prefix}-switch", [f"{prefix}-{i}" for i in range(count)]
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        for i, name in enumerate(names):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "add", CARD, "type", "veth", "peer", "name", f"port{i}", "netns", switch)
            _ip("-n", switch, "link", "set", f"port{i}", "master", "switch", "up")
            _ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", CARD)
            _ip("-n", name, "link", "set", CARD, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in (*names, switch):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def shape(mbits: float | None) -> None:
    """Limit what this host sends; call it on the host.

    Args:
        mbits: the rate in Mbit/s, None for no limit.
    """
    subprocess.run(["tc", "qdisc", "delete", "dev", CARD, "root"], capture_output=True)
    if mbits is not None:
        burst = max(16_384, round(mbits * 1e6 / 8 * 0.005))  # 5 ms: more would let a step's first bytes go unlimited
        limit = ["rate", f"{mbits}mbit", "burst", str(burst), "latency", "100ms"]
        subprocess.run(["tc", "qdisc", "add", "dev", CARD, "root", "tbf", *limit], check=True, capture_output=True)


def bytes_out() -> int:
    """Return how many bytes this host's card has sent, by the kernel's count, headers and all; call it on the host."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        card, _, counters = line.partition(":")
        if card.strip() == CARD:
            return int(counters.split()[8])
    raise NotPossibleError(f"this process runs on no host: it has no card {CARD}")


def run_on(names: Sequence[str], command: Sequence[str]) -> Iterator[Any]:
    """Run a command on each host, rank by rank, and yield what the first prints, a line of JSON at a time.

    It may take as long as it takes: a worker that loses another one ends by itself.

    Raises:
        RuntimeError: one failed; the end of its output is in the message.
    """
    address = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": CARD}
    with ExitStack() as stack:
        errors = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in names]
        processes = []
        for rank, (name, error) in enumerate(zip(names, errors, strict=True)):
            env = os.environ | address | {"RANK": str(rank), "WORLD_SIZE": str(len(names))}
            on_host = ["ip", "netns", "exec", name, *command]
            out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            process = stack.enter_context(subprocess.Popen(on_host, env=env, stdout=out, stderr=error, text=True))
            stack.callback(process.kill)
            processes.append(process)
        assert processes[0].stdout is not None
        yield from map(json.loads, processes[0].stdout)
        for rank, (process, error) in enumerate(zip(processes, errors, strict=True)):
            if process.wait() != 0:
                error.seek(0)
                raise RuntimeError(f"worker {rank} failed: {error.read()[-2000:]}")


def _ip(*arguments: str) -> None:
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if result.returncode != 0:
        raise NotPossibleError(f"`ip {' '.join(arguments)}` failed: {result.stderr.strip()}")
