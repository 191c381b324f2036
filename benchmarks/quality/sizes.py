"""The second study's text at other sizes of the model: thinner layers, and twice as many of them.

python -m benchmarks.quality narrow_rates && python -m benchmarks.quality narrow   # eight layers
python -m benchmarks.quality thin_rates && python -m benchmarks.quality thin       # sixteen, in four stages
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

from benchmarks.quality.records import load
from benchmarks.quality.run import Run
from benchmarks.quality.second import BACKPROPAGATION, LAYERS, SEEDS, STEPS, STEPS_OF_RATES, large_run, lowest_rate

WIDTH = 64
DEPTHS = {"narrow": LAYERS, "thin": 16}
ROWS = (BACKPROPAGATION, "G = 2, K = 4", "local, K = 4", "pairwise, K = 4")
RATES = (4e-3, 2e-3, 8e-3)


def _run(study: str, size: str, row: str, rate: float, steps: int, seed: int = 0) -> Run:
    return large_run(row, rate=rate, steps=steps, seed=seed, study=study, layers=DEPTHS[size], width=WIDTH)


def _rates(size: str, results: Path) -> Iterator[Run]:
    """Short trainings of all rows at three learning rates."""
    for rate, row in product(RATES, ROWS):
        yield _run(f"{size}_rates", size, row, rate, STEPS_OF_RATES)


def _rows(size: str, results: Path) -> Iterator[Run]:
    """All rows whose rates were tried, one seed after the other; then at half the rate that won there: seeds of the
    longer training are far apart at the whole one."""
    tried = load(results / f"{size}_rates.jsonl")
    best = {row: rate for row in ROWS if (rate := lowest_rate(tried, row)) is not None}
    for part, seed, row in product((1, 2), SEEDS, best):
        yield _run(size, size, row, best[row] / part, STEPS, seed)


SIZES: dict[str, Callable[[Path], Iterator[Run]]] = {
    **{f"{size}_rates": partial(_rates, size) for size in DEPTHS},
    **{size: partial(_rows, size) for size in DEPTHS},
}
