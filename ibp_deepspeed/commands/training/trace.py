"""--trace of train_lm.py: which batches are recorded, and where the trace goes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from ibp_deepspeed.checkpoint import layout
from ibp_deepspeed.errors import TraceError

FILE = "trace.json"
_WARM, _COUNT = 10, 3
"""Batches that are left out at the start, and that are recorded, where --trace names none."""


class Batches(NamedTuple):
    """The first and the last one, from 1."""

    first: int
    last: int


def batches(args: argparse.Namespace, resume: str | None) -> Batches | None:
    """What is recorded: ``FIRST:LAST``, one batch, or without a value three when the pipeline is warm; None: nothing.

    Args:
        args: the command line.
        resume: tag of the checkpoint that the run begins with.

    Raises:
        TraceError: no such batches, or no pipeline.
    """
    text, steps = args.trace, args.steps
    if text is None:
        return None
    trained = (layout.batches_of(resume) if resume else None) or 0
    if args.one_process:
        raise TraceError("--trace shows how processes wait for each other, --one-process has one: leave either out.")
    if not text:
        last = min(steps, trained + _WARM + _COUNT)
        return Batches(max(trained + 1, last - _COUNT + 1), last)
    first, colon, last = text.partition(":")
    try:
        found = Batches(int(first), int(last if colon else first))
    except ValueError:
        raise TraceError(f"--trace {text}: write it as FIRST:LAST, like 11:13.") from None
    if not trained < found.first <= found.last <= steps:
        raise TraceError(f"--trace {text}: this run trains batches {trained + 1} to {steps}: name some of them.")
    return found


def path(args: argparse.Namespace) -> Path:
    """Where the trace is written."""
    folder: Path = args.output
    return folder / FILE
