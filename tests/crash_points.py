"""Every operation by which a process changes a folder, in their order: to list them, or to be killed at one.

As in SQLite's crash tests. Python tells of most operations itself (``sys.addaudithook``); a file that torch writes, and
a flush to the device, are seen by functions in the place of torch's and Python's. A file's content has two points:
before it is written, and when half of it is.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch(folder: Path, reached: Callable[[str], None]) -> None:
    """From now on until this process ends, call ``reached`` before each operation, in words: ``rename a to b``."""
    root, own = str(folder), _OwnWork()

    def tell(verb: str, *paths: str) -> None:
        if not own.busy and any(path.startswith(root) for path in paths):
            reached(" ".join([verb, *(os.path.relpath(path, root) for path in paths)]))

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event == "os.rename":
            tell("rename", _absolute(given[0]), _absolute(given[1]))
        elif event in ("os.remove", "os.rmdir", "os.mkdir"):
            tell(event.removeprefix("os."), _absolute(given[0], given[-1]))
        elif event == "open" and isinstance(given[0], str) and given[2] & _WRITING:
            tell("open", _absolute(given[0]))

    sys.addaudithook(hook)
    for owner, name in ((torch, "save"), (Path, "write_text")):
        mock.patch.object(owner, name, _halved(getattr(owner, name), tell, own)).start()
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        tell("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        flush(descriptor)

    mock.patch.object(os, "fsync", fsync).start()


def _absolute(path: Any, descriptor: int | None = -1) -> str:
    """Of a name, which may be one in an open folder (``shutil.rmtree`` works with those)."""
    if descriptor in (-1, None) or os.path.isabs(path):
        return os.path.abspath(os.fspath(path))
    return os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), os.fspath(path))


class _OwnWork:
    """Whether the process does what only this test makes it do."""

    busy = False


def _halved(write: Callable[..., Any], tell: Callable[..., None], own: _OwnWork) -> Callable[..., Any]:
    """A function that writes a file as torch's or Path's does, and tells when half of it is there."""

    def written(*given: Any, **more: Any) -> Any:
        path = Path(given[0] if isinstance(given[0], Path) else given[1])  # torch's takes what it writes first
        result = write(*given, **more)
        own.busy = True
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        own.busy = False
        tell("half of", str(path))
        own.busy = True
        path.write_bytes(whole)
        own.busy = False
        return result

    return written


def killer(at: int | str) -> Callable[[str], None]:
    """What ``watch`` is to call: kill this process at the operation of that number, from 0, or of those words."""
    count = 0

    def reached(words: str) -> None:
        nonlocal count
        if at in (count, words):
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    return reached
