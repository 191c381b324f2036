"""What a process does to itself at a moment of its training, through the engine's debug hook."""

from __future__ import annotations

import os
import signal
import socket
import stat
from collections.abc import Callable
from typing import Any

from ibp_deepspeed.engine.moment import Hook, Moment


def kill() -> None:
    """As the kernel does to a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    """In the middle of a batch, as if all were well."""
    os._exit(0)


def close_sockets() -> None:
    """Shut every connection of this process but those to the job's store, as a firewall or a broken link would."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.stat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                if one.getpeername()[1] != int(os.environ["MASTER_PORT"]):
                    one.shutdown(socket.SHUT_RDWR)
        except (OSError, IndexError):  # it listens, or is gone, or has no port
            continue


ACTS: dict[str, Callable[[], None]] = {"kill": kill, "leave": leave, "close": close_sockets}


def at(act: Callable[[], None], **where: Any) -> Hook:
    """A hook that acts at the first moment that has these attributes."""
    done: list[bool] = []

    def hook(moment: Moment) -> None:
        if not done and all(getattr(moment, name) == value for name, value in where.items()):
            done.append(True)
            act()

    return hook
