"""Last exits of several seeds, and rows compared at the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from benchmarks.quality.records import Record

Table = list[list[str]]


def last_exit(record: Record) -> float:
    """Held-out loss of the last exit at the end, in nats."""
    loss: float = record["curve"][-1][1][-1]
    return loss


def by_seed(records: Sequence[Record]) -> dict[int, float]:
    """Seed → held-out loss of the last exit."""
    return {record["run"]["seed"]: last_exit(record) for record in records}


def difference(of: Mapping[int, float], to: Mapping[int, float]) -> str:
    """Mean and range of the differences at the same seeds, in per cent; "–" if no seed is common."""
    ratios = [100 * (of[seed] / to[seed] - 1) for seed in sorted(of.keys() & to.keys())]
    if not ratios:
        return "–"
    if len(ratios) == 1:
        return f"{ratios[0]:+.1f}% (one seed)"
    return f"{mean(ratios):+.1f}% ({min(ratios):+.1f} … {max(ratios):+.1f})"
