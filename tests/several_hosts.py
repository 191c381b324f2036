"""Hosts of their own on this machine: each with a network, processes, a name, /etc, a home and, if asked, other folders
of its own, and with a server for ssh. What a job starts there ends with the host."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.speed import namespaces
from tests.forks import ROOT

# Ends never; bash reaps the processes that lose their parents, as a host's first process does.
_FIRST_PROCESS = "echo ready; while true; do sleep 1000 & wait $!; done"


@dataclass(frozen=True)
class Host:
    """One of them.

    Attributes:
        name: what it calls itself, and the others it.
        address: on the network of the hosts.
        first: the id of its first process, as this machine has it; with it all others end.
        link: the name of the other end of its network cable.
    """

    name: str
    address: str
    first: int
    link: str

    def command(self, *words: object) -> list[str]:
        """A command line that runs there, in the repository."""
        enter = ("nsenter", "--target", str(self.first), "--mount", "--uts", "--pid", "--net", f"--wd={ROOT}")
        return [*enter, *map(str, words)]

    def start(self, *words: object, log: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Start a command there, its output in a file."""
        with log.open("wb") as file:
            return subprocess.Popen(
                self.command(*words), env=environment() | variables, stdout=file, stderr=subprocess.STDOUT
            )

    def run(self, *words: object, timeout: float = 120, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run one to its end."""
        where: dict[str, Any] = {"env": environment() | variables, "timeout": timeout}
        return subprocess.run(self.command(*words), capture_output=True, text=True, **where)

    def ranks(self) -> dict[int, psutil.Process]:
        """Processes of a training that run there, by their rank."""
        found, here = {}, os.readlink(f"/proc/{self.first}/ns/pid")
        for process in psutil.process_iter():
            try:
                if os.readlink(f"/proc/{process.pid}/ns/pid") != here:
                    continue
                words, rank = process.cmdline(), process.environ().get("RANK")
            except (OSError, psutil.Error):  # it has ended meanwhile
                continue
            if rank is not None and "scripts/train_lm.py" in words:
                found[int(rank)] = process
        return found

    def stop(self) -> None:
        """End all that runs there."""
        os.kill(self.first, signal.SIGKILL)

    def unplug(self) -> None:
        """Take the network cable out."""
        subprocess.run(["ip", "link", "set", self.link, "down"], check=True)


def environment() -> dict[str, str]:
    """What a user's shell would have: nothing of the tests' own places, one thread a process."""
    left_out = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE")
    kept = {name: value for name, value in os.environ.items() if name not in left_out and "PYTEST" not in name}
    return kept | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def missing(*programs: str) -> str | None:
    """Why there can be no hosts here, or none with these programs; None if there can."""
    for program in ("nsenter", "unshare", "bash", *programs):
        if shutil.which(program) is None:
            return f"it needs {program}, which is not installed"
    reason = namespaces.missing()
    if reason is not None:
        return reason
    probe = ("unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "bash", "-c")
    script = f"set -e; mount -t tmpfs tmpfs /mnt; {_overlay(Path('/etc'), Path('/mnt'))}"
    done = subprocess.run([*probe, script], capture_output=True, text=True)
    return f"a host can't have files of its own here: {done.stderr.strip()}" if done.returncode else None


@contextmanager
def hosts(folder: Path, count: int = 2, *, private: Sequence[Path] = (), ssh: bool = False) -> Iterator[list[Host]]:
    """``host-a``, ``host-b``, …, all on one network.

    Args:
        folder: for what they need; of this call alone.
        count: how many.
        private: folders of which each host has its own copy; what is written there, the others do not see.
        ssh: whether they can reach each other by ssh.
    """
    with ExitStack() as stack:
        networks = stack.enter_context(namespaces.hosts(count, None))
        names = [f"host-{'abcdefgh'[number]}" for number in range(count)]
        book = [f"{network.address} {name}" for network, name in zip(networks, names, strict=True)]
        if ssh:
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
        made = []
        for network, name in zip(networks, names, strict=True):
            scratch = folder / f".{name}"
            scratch.mkdir()
            begin = [
                "set -e",
                "mount --make-rprivate /",
                f"mount -t tmpfs tmpfs {shlex.quote(str(scratch))}",
                *(_overlay(path, scratch) for path in (Path("/etc"), Path.home(), *private)),
                f"hostname {name}",
                f"printf '%s\\n' '127.0.0.1 localhost' {shlex.join(book)} >/etc/hosts",
                ": >/etc/resolv.conf",  # nobody to ask, so nobody to wait for
                *(_server(folder / "key") if ssh else ()),
                _FIRST_PROCESS,
            ]
            host = stack.enter_context(_running(network, name, "\n".join(begin)))
            made.append(host)
        yield made


def _overlay(path: Path, scratch: Path) -> str:
    """Shell commands that give a host its own copy of a folder, as it is written to."""
    upper, work = (shlex.quote(f"{scratch}/{name}{path}") for name in ("upper", "work"))
    own = shlex.quote(str(path))
    return f"mkdir -p {upper} {work}; mount -t overlay overlay -o lowerdir={own},upperdir={upper},workdir={work} {own}"


def _server(key: Path) -> list[str]:
    """Shell commands that start a server for ssh, and let root go with this key from one host to another."""
    own = shlex.quote(str(key))
    options = f"-o HostKey={own} -o AuthorizedKeysFile={own}.pub -o StrictModes=no -o UsePAM=no -o PidFile=none"
    client = f"IdentityFile {own}\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR"
    return [
        "usermod --password '*' root",  # one that is locked may not come in
        "mount -t tmpfs tmpfs /run; mkdir /run/sshd",
        f"mkdir -p -m 700 ~/.ssh; printf '%s\\n' {shlex.quote(client)} >~/.ssh/config",
        f"/usr/sbin/sshd -f /dev/null {options}",
    ]


@contextmanager
def _running(network: namespaces.Host, name: str, script: str) -> Iterator[Host]:
    """A host, from its first process on."""
    unshare = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", script)
    process = subprocess.Popen(
        network.command(*unshare), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{name} does not start: {process.stderr.read().strip()}")
        first = psutil.Process(process.pid).children()[0].pid
        yield Host(name, network.address, first, network.outside)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
