"""The second study's text with sixteen thin layers in four stages: what depth changes.

python -m benchmarks.quality thin_rates && python -m benchmarks.quality thin
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

from benchmarks.quality.records import load
from benchmarks.quality.run import Run
from benchmarks.quality.second import BACKPROPAGATION, SEEDS, STEPS, STEPS_OF_RATES, large_run, lowest_rate

LAYERS, WIDTH = 16, 64
ROWS = (BACKPROPAGATION, "G = 2, K = 4", "pairwise, K = 4", "local, K = 4")
RATES = (2e-3, 4e-3, 1e-3)


def _run(study: str, row: str, rate: float, steps: int, seed: int = 0) -> Run:
    return large_run(row, rate=rate, steps=steps, seed=seed, study=study, layers=LAYERS, width=WIDTH)


def thin_rates(results: Path) -> Iterator[Run]:
    """Short trainings of all rows at three learning rates."""
    for rate, row in product(RATES, ROWS):
        yield _run("thin_rates", row, rate, STEPS_OF_RATES)


def thin(results: Path) -> Iterator[Run]:
    """All rows whose rates were tried, one seed after the other."""
    tried = load(results / "thin_rates.jsonl")
    for seed, row in product(SEEDS, ROWS):
        rate = lowest_rate(tried, row)
        if rate is not None:
            yield _run("thin", row, rate, STEPS, seed)
