"""Files that do harm where they are read carelessly, and what is seen of it."""

from __future__ import annotations

import os
import resource
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class Bomb:
    """Unpickled it makes a folder: whoever reads it lets it run any code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def put_bomb(path: Path, mark: Path) -> None:
    """Into a file of torch.save, beside what it holds."""
    state = torch.load(path, weights_only=False)
    state["bomb"] = Bomb(mark)
    torch.save(state, path)


def rewritten(path: Path, change: Any, **zipped: Any) -> None:
    """The same records of a file of torch.save, each as ``change(name, content)`` gives it back."""
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", **zipped) as new:
        for name, content in records.items():
            new.writestr(name, change(name, content))


@contextmanager
def little_memory(more: int = 2**30) -> Iterator[None]:
    """No address space but what there is, and a gibibyte."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
