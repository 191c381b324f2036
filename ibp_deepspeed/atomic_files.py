"""Folders and files that are whole or not there, whatever stops their writing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(complete: Path, target: Path, old: Path) -> None:
    """Give a complete folder the name ``target``; what had it before is called ``old`` meanwhile, and removed last.

    A kill leaves ``target`` as it was or as it is to be, but for the moment between two renames, when it is ``old``.
    """
    for path in [*complete.rglob("*"), complete]:
        sync(path)
    if target.exists():
        target.rename(old)
    complete.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file under another name first."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    sync(new)
    os.replace(new, path)
    sync(path.parent)
