"""Modules of one to eight layers, each trained by its own loss; and what trainings alike differ by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, mean

from benchmarks.quality.rate_tables import tuned_rows
from benchmarks.quality.records import Record
from benchmarks.quality.second import BACKPROPAGATION, LAYERS, ROWS, STEPS
from benchmarks.quality.seeds import Table, by_seed, difference
from ibp_deepspeed.config.interlocking import InterlockingConfig

TWINS = (("G = 4, K = 8", "G = 2, K = 4"), ("G = 2, K = 8", "local, K = 4"))
"""Rows whose trunks have the same gradients, but for clipping, which is of a stage; their heads are drawn otherwise."""


def modules_table(records: Sequence[Record]) -> Table:
    """N = 1: what more layers behind each loss bring, at equal tokens."""
    baseline = _ends(records, BACKPROPAGATION)
    table = [["layers a module", "", "seeds", "last exit", "to backpropagation"]]
    for row in ("local, K = 8", "local, K = 4", "G = 2, K = 8", "G = 2, K = 4", "G = 4, K = 8"):
        of = _ends(records, row)
        if of:
            table.append([_layers(row), row, str(len(of)), f"{mean(of.values()):.3f}", difference(of, baseline)])
    return [*table, [str(LAYERS), BACKPROPAGATION, str(len(baseline)), f"{mean(baseline.values()):.3f}", "–"]]


def chance_table(records: Sequence[Record]) -> Table:
    """What rows with the same gradients differ by at the same seed; last, the root mean square of all pairs."""
    table = [["", "layers a module", "seeds", "difference of the last exits"]]
    ratios: list[float] = []
    for row, twin in TWINS:
        of, to = _ends(records, row), _ends(records, twin)
        common = of.keys() & to.keys()
        ratios += [of[seed] / to[seed] - 1 for seed in common]
        table.append([f"{row}, to {twin}", _layers(row), str(len(common)), difference(of, to)])
    size = 100 * fmean(ratio**2 for ratio in ratios) ** 0.5 if ratios else 0.0
    return [*table, ["root mean square", "–", str(len(ratios)), f"{size:.1f}%"]]


def _ends(records: Sequence[Record], row: str) -> dict[int, float]:
    """Seed → the last exit's loss after STEPS batches."""
    return by_seed(
        [r for r in records if (r["run"]["row"], r["run"]["steps"], r["run"]["cosine"]) == (row, STEPS, False)]
    )


def _layers(row: str) -> str:
    """Of one of its modules."""
    return str(LAYERS // len(InterlockingConfig.parse(ROWS[row].block).exits_for(ROWS[row].stages)))


def module_tables(of: Mapping[str, Sequence[Record]]) -> Iterator[tuple[str, Table]]:
    """Title and rows, if the study has begun."""
    if of.get("large"):
        yield "second study, layers a module", modules_table(tuned_rows(of))
        yield "second study, chance", chance_table(tuned_rows(of))
