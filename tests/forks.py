"""Child processes in which everything is imported already: forks of one server, which lives as long as the tests.

The server is Python's own (``multiprocessing``'s forkserver). It computes nothing, so its forks are safe where those
of a testing process, with torch's threads in it, are not.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)):
        forkserver.ensure_running()
    return context


def fork(
    function: Callable[..., None],
    *arguments: Any,
    environment: Mapping[str, str],
    stdout: Path,
    stderr: Path,
    folder: Path = ROOT,
) -> ForkServerProcess:
    """Call ``function`` in a child with this environment, its output in two files (or the same one), in ``folder``."""
    streams = (str(stdout), str(stderr))
    words = (dict(environment), streams, str(folder), function, arguments)
    process = _server().Process(target=_begin, args=words)
    process.start()
    return process


def _begin(
    environment: dict[str, str],
    streams: tuple[str, str],
    folder: str,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    os.setpgid(0, 0)  # it ends together with what it starts
    for number, path in enumerate(streams, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
        os.close(file)
    importlib.import_module("tests.preload")  # done, unless it failed in the server, which would not say so
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    function(*arguments)


def end(
    processes: Sequence[ForkServerProcess], timeout: float, *, with_first_failure: bool = False
) -> list[int | None]:
    """Exit codes of all, None for one that was killed: because time was up, or because another had failed."""
    deadline = time.monotonic() + timeout
    try:
        running = list(processes)
        while running and (left := deadline - time.monotonic()) > 0:
            wait([process.sentinel for process in running], left)
            running = [process for process in running if process.exitcode is None]
            if with_first_failure and any(process.exitcode for process in processes):
                break
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.is_alive():
                _kill(process)
            process.join()


def _kill(process: ForkServerProcess) -> None:
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no group yet
        process.kill()
