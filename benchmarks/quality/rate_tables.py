"""What was tried to choose learning rates: short trainings, and some as long as the rows are compared at."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean

from benchmarks.quality.records import Record
from benchmarks.quality.second import STEPS
from benchmarks.quality.seeds import Table, by_seed, difference, last_exit


def tuned_rows(of: Mapping[str, Sequence[Record]]) -> list[Record]:
    """The study ``large``, each row at the best of the rates that were tried with as many batches."""
    return at_best_rate([*of.get("large", ()), *of.get("longer_rates", ())])


def at_best_rate(records: Sequence[Record]) -> list[Record]:
    """Those of the rate with which each row of a length ended lowest on average, of the rates that have most seeds."""
    groups: dict[tuple[str, bool, int], dict[float, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        run = record["run"]
        groups[run["row"], run["cosine"], run["steps"]][run["rate"]].append(record)
    best = (min(of.values(), key=_most_seeds_and_lowest) for of in groups.values())
    return [record for group in best for record in group]


def _most_seeds_and_lowest(group: Sequence[Record]) -> tuple[int, float]:
    """Smallest where most seeds end lowest."""
    return -len(group), mean(last_exit(record) for record in group)


def rates_table(records: Sequence[Record]) -> Table:
    """Held-out loss of the last exit of the short trainings at each rate."""
    rates = sorted({record["run"]["rate"] for record in records})
    ends: dict[str, dict[float, float]] = defaultdict(dict)
    for record in records:
        run = record["run"]
        ends[f"{run['row']}, cosine" if run["cosine"] else run["row"]][run["rate"]] = last_exit(record)
    table = [["", *(f"{rate:g}" for rate in rates)]]
    for row, of in ends.items():
        table.append([row, *(f"{of[rate]:.3f}" if rate in of else "–" for rate in rates)])
    return table


def longer_rates_table(halves: Sequence[Record], records: Sequence[Record]) -> Table:
    """The trainings at half the rate beside those of the same row, length and seeds at the whole one."""
    table = [["", "rate", "last exit", "seeds at half of it", "last exit", "half to whole"]]
    for row in dict.fromkeys(record["run"]["row"] for record in halves):
        half, whole = ([r for r in of if r["run"]["row"] == row] for of in (halves, records))
        whole = [r for r in whole if (r["run"]["steps"], r["run"]["cosine"]) == (STEPS, False)]
        below, ends = by_seed(half), by_seed(whole)
        same = [ends[seed] for seed in below if seed in ends]
        cells = [f"{whole[0]['run']['rate']:g}", f"{mean(same):.3f}", str(len(below)), f"{mean(below.values()):.3f}"]
        table.append([row, *cells, difference(below, ends)])
    return table
