"""Several hosts on one machine: network namespaces on a bridge, links limited in rate. Needs root and iproute2."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

_SEGMENT = 16_384  # bytes


@dataclass(frozen=True)
class Host:
    """A namespace with one interface.

    Attributes:
        name: of the namespace.
        address: of its interface.
        outside: the name of the other end of its cable.
        interface: its name inside.
    """

    name: str
    address: str
    outside: str
    interface: str = "eth0"

    def command(self, *words: str) -> list[str]:
        """A command line that runs there."""
        return ["ip", "netns", "exec", self.name, *words]


def missing() -> str | None:
    """Why this machine can't do it; None if it can."""
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "it needs iproute2 (ip and tc), which is not installed"
    if os.geteuid() != 0:
        return "it needs root, to make network namespaces"
    probe = subprocess.run(["ip", "netns", "add", _name("probe")], capture_output=True, text=True)
    if probe.returncode:
        return f"network namespaces can't be made here: {probe.stderr.strip()}"
    _run("ip", "netns", "delete", _name("probe"))
    return None


@contextmanager
def hosts(count: int, megabits: float | None) -> Iterator[list[Host]]:
    """``count`` hosts on one bridge; what each sends is limited to ``megabits`` a second (None: as fast as it goes)."""
    with ExitStack() as stack:
        bridge = _name("br")
        _run("ip", "link", "add", bridge, "type", "bridge")
        stack.callback(_run, "ip", "link", "delete", bridge)
        _run("ip", "link", "set", bridge, "up")
        made = []
        for index in range(count):
            outside = _name(f"v{index}")
            host = Host(_name(f"h{index}"), f"10.213.{os.getpid() % 250}.{index + 1}", outside)
            _run("ip", "netns", "add", host.name)
            stack.callback(_run, "ip", "netns", "delete", host.name)
            _connect(host, bridge, megabits)
            # a deleted namespace gives its interfaces back some time later: the next hosts would find the name taken
            stack.callback(_run, "ip", "link", "delete", outside)
            made.append(host)
        yield made


def _connect(host: Host, bridge: str, megabits: float | None) -> None:
    _run("ip", "link", "add", host.outside, "type", "veth", "peer", "name", host.interface, "netns", host.name)
    _run("ip", "link", "set", host.outside, "master", bridge, "up")
    _run(*host.command("ip", "address", "add", f"{host.address}/24", "dev", host.interface))
    for interface in ("lo", host.interface):
        _run(*host.command("ip", "link", "set", interface, "up"))
    if megabits is not None:
        # a bucket of 2 ms at the rate, and a queue that never drops; segments that fit the bucket, else the kernel
        # cuts them up and wakes for each packet
        burst = max(2 * _SEGMENT, int(megabits * 1e6 / 8 * 0.002))
        limits = ("rate", f"{megabits}mbit", "burst", f"{burst}", "limit", "64mb")
        _run(*host.command("ip", "link", "set", host.interface, "gso_max_size", f"{_SEGMENT}"))
        _run(*host.command("tc", "qdisc", "add", "dev", host.interface, "root", "tbf", *limits))


def _name(part: str) -> str:
    return f"ibp{os.getpid() % 100_000}{part}"  # interfaces have 15 letters at most


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
