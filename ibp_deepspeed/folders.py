"""Folders that somebody else may have made: what is named in them, and what lies in them, does not lead out."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

_LONGEST_PART, _LONGEST_NAME = 255, 1024  # bytes: the system refuses longer parts, and paths of more than 4096


def relative_name(name: str) -> str:
    """The same name, which is one of a file in the folder of the file that gives it.

    Raises:
        ValueError: it is empty, absolute, has ``..`` in it, is too long or no name at all; in words.
    """
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or not name.isprintable():
        raise ValueError(f"{name[:80]!r} is no name of a file in this folder")
    if len(name.encode()) > _LONGEST_NAME or any(len(part.encode()) > _LONGEST_PART for part in path.parts):
        raise ValueError(f"{name[:80]!r}… is too long for a name of a file")
    return name


def inside(folder: Path, name: str) -> Path:
    """The file or folder that is named so in a folder, which may be there or not.

    Raises:
        ValueError: the name, or a link that has it, leads out of the folder; in words.
    """
    path = folder / relative_name(name)
    target = Path(os.path.realpath(path))  # Path.resolve raises for a circle of links
    if not target.is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{name!r} is a link that leads out of {folder}, to {target}")
    return path


def check_entries(folder: Path) -> None:
    """That a folder has in it folders and plain files alone, and links to these.

    Raises:
        ValueError: a link leads out of the folder, or something would make its reader wait; in words.
    """
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink():
                inside(folder, path.relative_to(folder).as_posix())
            if path.exists() and not path.is_dir() and not path.is_file():
                raise ValueError(f"{path.relative_to(folder)} in {folder} is neither a file nor a folder")
