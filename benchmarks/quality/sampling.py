"""The study ``sampling``: what a loss over drawn tokens does to the gradient of a trunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.quality.records import Record, load
from benchmarks.quality.run import Run
from benchmarks.quality.second import STEPS_OF_RATES, best_rate, large_run


def sampling(results: Path) -> Iterator[Run]:
    """A copied LM head behind the first of two modules, trained exactly."""
    tried = load(results / "rates.jsonl")
    row = "G = 2, K = 4, copied LM heads"
    rate = best_rate(tried, row)
    if rate is not None:
        yield replace(large_run(row, rate=rate, steps=STEPS_OF_RATES, study="sampling"), sampled=True)


def sampling_table(records: Sequence[Record]) -> list[list[str]]:
    """A row for each number of tokens, then how far two batches are apart."""
    table = [["the loss is over", "difference to the exact gradient, of its norm", "cosine with it"]]
    (record,) = records
    vocabulary = record["sampled"]["vocabulary"]
    for size, (error, alike) in record["sampled"]["sizes"].items():
        table.append([f"{size} of {vocabulary} tokens and the label", f"{error:.0%}", f"{alike:.3f}"])
    return [*table, ["all tokens of another batch", f"{record['sampled']['batches']:.0%}", "–"]]
