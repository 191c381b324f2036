"""A job on several hosts: before the processes meet, all of them learn whether one can't train or has something else.

On one host a launcher ends all processes when one fails. On several nobody tells the others, which would wait for half
an hour at torch's rendezvous.
"""

from __future__ import annotations

import ipaddress
import json
import os
import platform
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ibp_deepspeed.commands.training.output import holder
from ibp_deepspeed.errors import HostsError

if TYPE_CHECKING:
    import torch.distributed as dist

_MEETING = timedelta(minutes=30)
"""As long as torch's rendezvous waits for a host."""
_FAILING = timedelta(seconds=20)
"""As long as a process that can't train waits for others to be told."""
_LEAVING = 5.0
"""Seconds for all to read the verdict before the process that keeps it ends."""
_SEEING = 3.0
"""Seconds for a file to be seen on another host of a shared file system."""


def spans_hosts() -> bool:
    """Whether the launcher has started processes of this job on other hosts too, as torchrun and DeepSpeed's say."""
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return local is not None and int(local) < int(os.environ["WORLD_SIZE"])


class RollCall:
    """Of one process of a job, through the job's store; where the job has one host it says and hears nothing.

    Rank 0 says what it has. Each other process answers with a sentence, empty if it has the same and can train. Then
    rank 0 gives the verdict: the first sentence that is not empty.
    """

    def __init__(self) -> None:
        self._needed = spans_hosts()
        self._store: dist.Store | None = None

    def cannot_train(self, problem: Exception) -> str:
        """Tell the others; returns the verdict, empty where nobody else is there."""
        try:
            return self._verdict(str(problem), {}, Path(), _FAILING) if self._needed else ""
        except RuntimeError:  # torch's store: nobody has come
            return ""

    def can_train(self, alike: Mapping[str, str], output: Path) -> None:
        """Return when all processes can.

        Args:
            alike: what all hosts have to have: name in words → value.
            output: the folder that they have to share; rank 0 has claimed it.

        Raises:
            HostsError: a process can't train or be reached, a value differs, or the folder is not shared.
        """
        if not self._needed:
            return
        problem = unreachable()
        verdict = self._verdict(problem, alike, output, _MEETING)
        if verdict:
            raise HostsError(verdict)

    def _verdict(self, problem: str, alike: Mapping[str, str], output: Path, patience: timedelta) -> str:
        rank, host = int(os.environ["RANK"]), platform.node()
        store = self._store = job_store(patience)
        if rank == 0:
            claimed = "" if problem else holder(output)
            store.set("0", json.dumps({"host": host, "problem": problem, "alike": dict(alike), "claimed": claimed}))
            verdict = problem or first_problem(store)
            store.set("verdict", verdict)
            if verdict:
                _wait_until_heard(store)
            return verdict
        first = json.loads(store.get("0"))
        sentence = problem or ("" if first["problem"] else difference(alike, output, first, host))
        store.set(str(rank), sentence and f"rank {rank} on {host}: {sentence}")
        verdict = store.get("verdict").decode()
        store.delete_key(str(rank))
        if store.add("heard", 1) == int(os.environ["WORLD_SIZE"]) - 1:
            for key in ("0", "heard", "verdict"):
                store.delete_key(key)
        return verdict


def job_store(patience: timedelta) -> dist.Store:
    """The store at which the processes will meet, before they do; it lives on as long as rank 0 keeps it.

    torch's own rendezvous finds the same server afterwards (``multi_tenant``), or the one of torchrun's agent.
    """
    import torch.distributed as dist

    from ibp_deepspeed.comm.attempts import agree

    of_the_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=not of_the_agent and os.environ["RANK"] == "0",
        timeout=patience,
        wait_for_workers=False,
        multi_tenant=not of_the_agent,
    )
    ours = dist.PrefixStore("ibp_roll_call", store)
    if not of_the_agent:
        return ours
    # torchrun may have started all again with the same store, which still has what the processes before wrote
    name = agree(ours, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), patience.total_seconds())
    return dist.PrefixStore(name, ours)


def unreachable() -> str:
    """Why gloo would listen where no other host reaches it, in a sentence; empty: it would not, or GPUs use NCCL.

    It listens at the address of the host's own name, which many distributions write into /etc/hosts as 127.0.1.1, and
    a job would stand still in its first collective.
    """
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().communication_backend_name() != "gloo" or os.environ.get("GLOO_SOCKET_IFNAME"):
        return ""
    name = platform.node()
    if _at_home(os.environ["MASTER_ADDR"]) or not _at_home(name):
        return ""
    return (
        f"{name} has its own name at its loopback, where no other host reaches it: set GLOO_SOCKET_IFNAME to the "
        "interface of its network (ip -brief address)."
    )


def _at_home(name: str) -> bool:
    """Whether a name, as gloo resolves it, is only this host's own: at its loopback, or not known."""
    try:
        first = socket.getaddrinfo(name, None)[0][4][0]
    except OSError:
        return True
    return ipaddress.ip_address(str(first).partition("%")[0]).is_loopback


def first_problem(store: dist.Store) -> str:
    """On rank 0: wait for the answers of all others, or for one that can't train; returns its sentence."""
    return next(
        (said for rank in range(1, int(os.environ["WORLD_SIZE"])) if (said := store.get(str(rank)).decode())), ""
    )


def difference(alike: Mapping[str, str], output: Path, first: Mapping[str, object], host: str) -> str:
    """What a host has otherwise than rank 0's, in a sentence; empty: nothing.

    Args:
        alike, output: see :meth:`RollCall.can_train`.
        first: what rank 0 has said.
        host: of this process.
    """
    there, theirs = first["host"], first["alike"]
    assert isinstance(theirs, dict)
    if not _sees(output, str(first["claimed"])):
        return (
            f"--output {output} is not the folder that rank 0 on {there} writes, and a checkpoint needs the files of "
            "all stages in one: give a folder on a file system that the hosts share."
        )
    for name, value in theirs.items():
        if alike.get(name) != value:
            return f"{name}: {alike.get(name)} here, {value} on {there}: make them the same on all hosts."
    return ""


def _sees(output: Path, claimed: str) -> bool:
    """Whether ``output`` is the folder that rank 0 has claimed."""
    made = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)  # asks the file server, which a cached "is not there" would not
    except OSError:
        return False
    end = time.monotonic() + _SEEING
    while (seen := holder(output)) != claimed and time.monotonic() < end:
        time.sleep(0.2)
    if seen != claimed and made and not any(output.iterdir()):
        output.rmdir()
    return seen == claimed


def _wait_until_heard(store: dist.Store) -> None:
    """Of a verdict that ends the job, until the last has removed it: the store may end with this process."""
    end = time.monotonic() + _LEAVING
    while store.check(["verdict"]) and time.monotonic() < end:
        time.sleep(0.1)
