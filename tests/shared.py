"""Folders that several testing processes share: the first that needs one makes it."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shared:
    """A place that all processes of one run of the tests know."""

    root: Path

    def folder(self, name: str, make: Callable[[Path], None]) -> Path:
        """The folder ``name``, filled by ``make`` unless another process has; who comes meanwhile waits."""
        folder, done = self.root / name, self.root / f"{name}.done"
        with (self.root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                folder.mkdir(exist_ok=True)
                make(folder)
                done.touch()
        return folder
