"""DeepSpeed's launcher, whose end its ranks would not notice.

``deepspeed`` starts ``deepspeed.launcher.launch``, and that the ranks. The second passes SIGINT and SIGTERM on. The
first, whose process a scheduler or a script knows, has no handler for one host (``deepspeed/launcher/runner.py``,
0.19.8): a SIGTERM ends it alone, and the ranks would train on with nobody to stop them. So would they after a SIGKILL
of either.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

_PAUSE = 1.0  # seconds
_COMMANDS = ("deepspeed", "deepspeed.pt", "ds")
_MODULES = ("deepspeed.launcher.launch", "deepspeed.launcher.runner")


def launchers() -> list[psutil.Process]:
    """The processes of DeepSpeed's launcher above this one; none under another launcher."""
    return [process for process in psutil.Process().parents() if _is_launcher(process)]


def when_one_ends(processes: Sequence[psutil.Process], tell: Callable[[str], None]) -> None:
    """Have a thread call ``tell`` with a reason, within a second after one of the processes has ended."""
    if processes:
        threading.Thread(target=_watch, args=(processes, tell), name="launcher", daemon=True).start()


def _watch(processes: Sequence[psutil.Process], tell: Callable[[str], None]) -> None:
    while all(map(_lives, processes)):
        time.sleep(_PAUSE)
    tell("the deepspeed launcher has ended")


def _lives(process: psutil.Process) -> bool:
    """Not so if it waits for its parent to read its exit code."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_launcher(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:  # it has just ended, or belongs to somebody else
        return False
    return any(module in words for module in _MODULES) or any(Path(word).name in _COMMANDS for word in words[:2])
