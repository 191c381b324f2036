"""The folder of a run: it belongs to one training at a time, and what is in it is not written over unasked."""

from __future__ import annotations

import argparse
import fcntl
import os
import platform
import shutil
import time
from pathlib import Path
from typing import IO

from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.commands.reporting.files import HISTORY, PAGE, RECORD
from ibp_deepspeed.commands.training.monitors import FOLDERS
from ibp_deepspeed.commands.training.trace import FILE as TRACE
from ibp_deepspeed.errors import OutputError

_LOCK = ".lock"
_OF_A_RUN = ("checkpoint", HISTORY, RECORD, PAGE, TRACE, *FOLDERS.values())


def check_output(args: argparse.Namespace) -> None:
    """That a run may begin in --output.

    Raises:
        OutputError: it is a file, or has a checkpoint that this run would neither continue nor may remove.
    """
    output: Path = args.output
    if output.exists() and not output.is_dir():
        raise OutputError(f"--output {output} is a file: give a folder.")
    latest = output / "checkpoint" / layout.LATEST
    if latest.exists() and args.resume is None and not args.overwrite:
        from ibp_deepspeed.checkpoint.store import newest_tag  # torch, which --help need not wait for

        tag = newest_tag(latest.parent)
        raise OutputError(
            f"--output {output} has a run already ({tag}): go on with --resume, remove it with --overwrite, or give "
            "another folder."
        )


def claim(args: argparse.Namespace) -> IO[str]:
    """On one process, before anything is written: lock --output for as long as it lives, and clear it if asked to.

    The lock is the operating system's, so that a process that died holds none.

    Returns:
        the locked file, to be kept open.

    Raises:
        OutputError: another training has it, or the folder can't be written.
    """
    output: Path = args.output
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / _LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"can't write into --output {output}: {error.strerror}.") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise OutputError(
            f"--output {output} is in use by {holder}: wait for its end, or give another folder."
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    os.fsync(file.fileno())  # processes on other hosts look for it
    if args.overwrite:
        for name in _OF_A_RUN:
            _remove(output / name)
    return file


def holder(output: Path) -> str:
    """Who has claimed a folder last, empty if nobody has; on the hosts that share it."""
    try:
        return (output / _LOCK).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
