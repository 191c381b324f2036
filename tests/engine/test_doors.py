"""Batches of every form, and stages that train only in part: the numbers are the reference's."""

from __future__ import annotations

from typing import Any

import pytest

from tests.launch import launch
from tests.workers.doors import BATCHES, CASES, COUNT, REFUSED


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    """What both stages say, by case."""
    cases = [*CASES, REFUSED]
    rows = launch("doors", 2, cases).check().reports
    return [dict(zip(cases, row, strict=True)) for row in rows]


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_the_references(reports: list[dict[str, Any]], case: str) -> None:
    for stage, rows in enumerate(reports):
        row = rows[case]
        assert row["error"] < 1e-5 and row["loss"] < 1e-6 and row["finite"], (stage, row)
        gets_gradients = case != "no gradient" or stage == 0
        assert row["moved"] == [trained and gets_gradients for trained in row["trained"]], (stage, row)


def test_running_statistics_count_a_micro_batch_once_also_where_it_is_run_again(reports: list[dict[str, Any]]) -> None:
    """As docs/extending.md says."""
    for name in ("batch norm", "batch norm, recomputed"):
        found = reports[0][name]
        assert found["counted"] == [BATCHES * COUNT] * 2
        assert found["statistics"][0] == pytest.approx(found["statistics"][1])


def test_what_is_no_iterator_is_refused_before_anything_is_sent(reports: list[dict[str, Any]]) -> None:
    for stage, rows in enumerate(reports):
        dataset, *loaders = rows[REFUSED]["said"]
        assert dataset.startswith("training_data is an IterableDataset, which can't be divided among replicas")
        wanted = f"stage {stage} was given a DataLoader, which would begin again with every batch: make iter(…) of it"
        assert len(loaders) == 2 and all(said.startswith(wanted) for said in loaders), loaders
