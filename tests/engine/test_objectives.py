"""An objective of a user's own trains in real processes as the contract says."""

from __future__ import annotations

from typing import Any

from tests.launch import launch

CASES: list[dict[str, Any]] = [
    {"interlocking": {"strategy": "local"}},
    {"interlocking": {"strategy": "pairwise", "mode": "window"}},
    {"interlocking": {"strategy": "pairwise", "mode": "window", "aux_head": {"borrow": 1}}},
]


def test_an_objective_with_a_loss_and_weights_of_its_own() -> None:
    """Equal to the reference, 1e-5; evaluations weight micro-batches."""
    for rows in launch("objectives", 3, CASES).check().reports:
        for row in rows:
            assert row["parameter"] <= 1e-5 and row["loss"] <= 1e-5 and row["eval"] <= 1e-5, row
            assert row["unweighted"] > 1e-3, "the weights matter here"
