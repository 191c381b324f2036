"""Processes, interleaved repeats, medians, and the record of a benchmark."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from benchmarks.pages import markdown
from ibp_deepspeed.models.devices import processor

Row = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def scaled(self, factor: float, digits: int = 3) -> list[float]:
        """[median, low, high] in another unit, rounded."""
        return [round(value * factor, digits) for value in (self.median, self.low, self.high)]


def spawn(processes: int, function: Callable[[dict[str, Any]], Any], arguments: dict[str, Any]) -> list[Any]:
    """Run ``function(arguments)`` in that many processes of one job; returns what each returned, by rank."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    results = elastic_launch(config, function)(arguments)
    return [results[rank] for rank in range(processes)]


def meet() -> None:
    """In a process of :func:`spawn`: with the others of its job, without DeepSpeed's log."""
    import deepspeed

    from ibp_deepspeed import init_distributed

    init_distributed()
    deepspeed.utils.logger.setLevel("ERROR")


def interleaved(measurements: Sequence[Callable[[], Any]], repeats: int) -> list[list[Any]]:
    """Call each once, then each again, …: what disturbs the machine disturbs all alike. Results by measurement."""
    results: list[list[Any]] = [[] for _ in measurements]
    for _ in range(repeats):
        for result, measure in zip(results, measurements, strict=True):
            result.append(measure())
    return results


def add_timing_arguments(parser: argparse.ArgumentParser, *, unit: float, measured: int) -> None:
    """The options of all cases whose stages sleep."""
    parser.add_argument("--unit", type=float, default=unit, help="seconds of a unit of work")
    parser.add_argument("--measured", type=int, default=measured, help="micro-batches a repeat, at least two batches")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved; medians count")


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    import torch

    packages = ("torch", "deepspeed", "transformers")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "device": device,
    }


def save(path: Path, rows: Sequence[Row], **about: Any) -> None:
    """Write a record: the command, the machine, what the caller says about it, and the rows."""
    command = " ".join(["python -m benchmarks.speed", *sys.argv[1:]])
    record = {"command": command, **about, "machine": machine(), "rows": list(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def table(rows: Sequence[Row], columns: dict[str, Callable[[Row], str]]) -> str:
    """Rows as a Markdown table."""
    return markdown([list(columns), *([show(row) for show in columns.values()] for row in rows)])
