"""Rates that won in short trainings are tried once more in long ones, and the tables compare the same seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.rate_tables import at_best_rate, longer_rates_table, tuned_rows
from benchmarks.quality.second import BACKPROPAGATION, LONGER, STEPS, STEPS_OF_RATES, longer_rates
from benchmarks.quality.sizes import RATES, ROWS, SIZES


def record(row: str, rate: float, loss: float, *, seed: int = 0, steps: int = STEPS) -> dict[str, Any]:
    run = {"row": row, "rate": rate, "seed": seed, "steps": steps, "cosine": False, "decay": 0.25}
    return {"run": run, "curve": [[steps, [loss]]]}


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in records))


def test_long_trainings_take_half_the_rate_that_won_in_short_ones(tmp_path: Path) -> None:
    short = [record(BACKPROPAGATION, rate, loss, steps=STEPS_OF_RATES) for rate, loss in ((4e-3, 4.7), (2e-3, 4.6))]
    write(tmp_path / "rates.jsonl", short)
    runs = list(longer_rates(tmp_path))
    assert [(run.row, run.rate, run.steps, run.seed) for run in runs] == [
        (BACKPROPAGATION, 1e-3, STEPS, seed) for seed in (0, 1, 2)
    ]
    assert BACKPROPAGATION in LONGER and len({run.id for run in runs}) == 3


@pytest.mark.parametrize("size", ["narrow", "thin"])
def test_other_sizes_train_each_row_at_both_rates(size: str, tmp_path: Path) -> None:
    short = [record(row, rate, rate, steps=STEPS_OF_RATES) for row in ROWS for rate in RATES]
    write(tmp_path / f"{size}_rates.jsonl", short)
    found = [(run.row, run.rate, run.seed) for run in SIZES[size](tmp_path)]
    assert set(found) == {(row, rate, seed) for row in ROWS for rate in (2e-3, 1e-3) for seed in (0, 1, 2)}
    assert len(found) == len(set(found))


def test_rates_are_compared_at_the_seeds_of_both() -> None:
    whole = [record(BACKPROPAGATION, 2e-3, loss, seed=seed) for seed, loss in enumerate((4.0, 4.2, 9.9))]
    other = [record(BACKPROPAGATION, 2e-3, 1.0, steps=8000), record("local, K = 4", 2e-3, 2.0)]
    half = [record(BACKPROPAGATION, 1e-3, loss, seed=seed) for seed, loss in enumerate((4.04, 4.158))]
    row = longer_rates_table(half, [*whole, *other])[1]
    assert row == [BACKPROPAGATION, "0.002", "4.100", "2", "4.099", "+0.0% (-1.0 … +1.0)"]


def test_a_row_stands_at_its_best_rate_of_those_with_most_seeds() -> None:
    lucky = [record("local, K = 4", 4e-3, loss, seed=seed) for seed, loss in enumerate((3.0, 5.0))]
    steady = [record("local, K = 4", 2e-3, 3.5, seed=seed) for seed in range(2)]
    once, longer = record("local, K = 4", 1e-3, 3.0), record("local, K = 4", 8e-3, 3.9, steps=8000)
    assert at_best_rate([*lucky, once, *steady, longer]) == [*steady, longer] and at_best_rate(lucky) == lucky
    assert tuned_rows({"large": [*lucky, longer], "longer_rates": steady}) == [*steady, longer]
