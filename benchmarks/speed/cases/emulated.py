"""Stages that sleep, on the real engines: how close each comes to its work, and who wastes how much of a stage's time.

A unit is a stage's forward pass, its input gradient (B), or its weight gradient (W); a head costs 0.1 units.
Beside what is measured stands what the simulator says of the same instructions, once of the schedule alone and once
with the processor time that each rank was measured to take itself, and the largest deviation below the table.

DualPipeV and zero bubble in a V (ZBV) need M ≥ 2K, interleaved zero bubble (ZB1) a multiple of K.
"""

from __future__ import annotations

import argparse

from tqdm import tqdm

from benchmarks.speed.contenders import PEERS
from benchmarks.speed.emulated import COLUMNS, draw, measure
from benchmarks.speed.harness import Row, add_timing_arguments
from benchmarks.speed.predicted import summary

__all__ = ["COLUMNS", "add_arguments", "draw", "run", "summary"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The case's options."""
    parser.add_argument("--stages", type=int, nargs="+", default=[4, 8], help="K, pipeline stages")
    parser.add_argument(
        "--micro-batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="M, micro-batches of a batch"
    )
    names = ["N=1", "N=2", "G=2", "G=4", "B-W", "sum", *PEERS]
    parser.add_argument("--contenders", nargs="+", default=names, help="1F1B must be among them")
    add_timing_arguments(parser, unit=0.1, measured=8)


def run(args: argparse.Namespace) -> list[Row]:
    """All K and M."""
    rows: list[Row] = []
    grid = [(k, m) for k in args.stages for m in args.micro_batches]
    for stages, micro_batches in tqdm(grid, desc="emulated", unit="set-up"):
        options = {"unit": args.unit, "measured": args.measured, "repeats": args.repeats}
        rows += measure(stages, micro_batches, args.contenders, **options)
    return rows
