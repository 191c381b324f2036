"""Folders and files that are complete or not there, whatever stops their writing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ibp_deepspeed.errors import OutputError


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
    remove(old)


def remove(path: Path) -> None:
    """Remove a folder as far as that is possible; of a link the link alone."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def check_target(path: Path) -> None:
    """Before the work whose result a file is to hold: that it can be written.

    Raises:
        OutputError: there is no folder for it, it is a folder itself, or may not be written.
    """
    if not path.parent.is_dir():
        raise OutputError(f"there is no folder {path.parent} to write {path.name} to: make it first.")
    if path.is_dir():
        raise OutputError(f"{path} is a folder: give a file.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OutputError(f"{path} may not be written: give another file.")


def replace_text(path: Path, text: str) -> None:
    """Write a text file under another name first."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    sync(new)
    os.replace(new, path)
    sync(path.parent)


@contextmanager
def new_folder(out: Path, failures: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """A folder beside ``out`` to write into, which gets that name at the end, or goes when something fails.

    Args:
        out: its final name.
        failures: what else than an OSError says, while it is written, that it can't be.

    Raises:
        OutputError: ``out`` exists, or can't be written.
    """
    if out.exists():
        raise OutputError(f"{out} exists already: give another --out or remove it.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            yield temporary
            temporary.chmod(0o755)
            replace_folder(temporary, out, temporary.with_name(f"{temporary.name}.old"))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except Exception as error:
        if not isinstance(error, (OSError, *failures)):
            raise
        raise OutputError(f"can't write {out}: {getattr(error, 'strerror', None) or error}") from error
