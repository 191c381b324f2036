"""Stages that sleep, with messages that take 0 … 4 units: what a slow link costs when it is wide enough.

``slack``: gradients may take so many slots more for each boundary (``hop_slack``). The peer's senders do not wait for
their messages either.
"""

from __future__ import annotations

import argparse

from tqdm import tqdm

from benchmarks.speed.emulated import COLUMNS, draw, measure
from benchmarks.speed.harness import Row, add_timing_arguments
from benchmarks.speed.predicted import summary

__all__ = ["COLUMNS", "add_arguments", "draw", "run", "summary"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The case's options."""
    parser.add_argument("--stages", type=int, default=4, help="K, pipeline stages")
    parser.add_argument("--micro-batches", type=int, default=8, help="M, micro-batches of a batch")
    parser.add_argument(
        "--latencies", type=float, nargs="+", default=[0.0, 0.5, 1.0, 2.0, 4.0], help="of a message, in units"
    )
    names = ["N=1", "G=2", "N=2", "N=2 slack 1", "N=2 slack 2", "B-W", "1F1B"]
    parser.add_argument("--contenders", nargs="+", default=names, help="1F1B must be among them")
    add_timing_arguments(parser, unit=0.05, measured=8)


def run(args: argparse.Namespace) -> list[Row]:
    """All latencies."""
    rows: list[Row] = []
    for latency in tqdm(args.latencies, desc="latency", unit="set-up"):
        options = {"unit": args.unit, "measured": args.measured, "repeats": args.repeats, "latency": latency}
        rows += measure(args.stages, args.micro_batches, args.contenders, **options)
    return rows
