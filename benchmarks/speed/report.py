"""Put the records of ``benchmarks/results/speed`` into docs/performance.md and the README.

``python -m benchmarks.speed.report``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.pages import filled
from benchmarks.speed.contenders import PEERS
from benchmarks.speed.harness import Row

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/speed"
PAGES = (ROOT / "docs/performance.md", ROOT / "README.md")
SHORT = ("N=1", "G=2", "G=4", "N=2", "B-W", "1F1B")  # of the README

Table = list[list[str]]
Record = dict[str, Any]


def load(folder: Path) -> dict[str, Record]:
    """Records by case."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def tables(records: dict[str, Record]) -> Iterator[tuple[str, Table]]:
    """Title and rows of every table that the records allow."""
    for case, record in records.items():
        rows = record["rows"]
        if case not in ("emulated", "latency"):
            columns = import_module(f"benchmarks.speed.cases.{case}").COLUMNS
            yield case, [list(columns), *([show(row) for show in columns.values()] for row in rows)]
    if "emulated" in records:
        rows = records["emulated"]["rows"]
        yield "emulated", across(rows, ("stages", "micro_batches"), ("K", "M"), time_and_ratio)
        ours = [row for row in rows if row["contender"] not in PEERS]
        yield "idle share of the busiest stage", across(ours, ("stages", "micro_batches"), ("K", "M"), idle)
        short = [r for r in rows if r["contender"] in SHORT and r["stages"] > 2 and r["micro_batches"] in (1, 4, 16)]
        yield "emulated, in short", across(short, ("stages", "micro_batches"), ("K", "M"), time_and_ratio)
    if "latency" in records:
        yield "latency", across(records["latency"]["rows"], ("latency",), ("latency",), time_and_prediction)


def across(rows: list[Row], keys: tuple[str, ...], names: tuple[str, ...], show: Callable[[Row], str]) -> Table:
    """A line for each value of the keys, a column for each contender."""
    most = max(rows, key=lambda row: tuple(row[key] for key in keys))  # has all contenders
    last = tuple(most[key] for key in keys)
    contenders = [row["contender"] for row in rows if tuple(row[key] for key in keys) == last]
    lines: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        lines.setdefault(tuple(row[key] for key in keys), {})[row["contender"]] = show(row)
    table = [[*names, *contenders]]
    return table + [[*(f"{v:g}" for v in key), *(of.get(c, "–") for c in contenders)] for key, of in lines.items()]


def time_and_ratio(row: Row) -> str:
    """Units a micro-batch; 1F1B's divided by them."""
    ratio = "" if row["contender"] == "1F1B" else f" ({row['speedup']:.2f}×)"
    return f"{row['units'][0]:.2f}{ratio}"


def time_and_prediction(row: Row) -> str:
    """Units a micro-batch; what the schedule's simulation says."""
    return f"{row['units'][0]:.2f} ({row['predicted']:.2f})"


def idle(row: Row) -> str:
    """Of the stage that has most to do."""
    return f"{min(row['idle']):.1%}"


def main() -> None:
    """Fill the pages."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    made = list(tables(load(RESULTS)))
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), made), encoding="utf-8")


if __name__ == "__main__":
    main()
