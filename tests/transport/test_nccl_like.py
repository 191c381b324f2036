"""The transport keeps NCCL's rules: what waits for ever there waits here, and nothing else."""

from __future__ import annotations

import pytest

from tests.launch import launch


@pytest.mark.parametrize(
    ("case", "ends"),
    [
        ("batched", [True, True]),
        ("two groups", [True, True]),
        ("unbatched", [False, False]),
        ("first meeting", [False, True]),
        ("synchronised", [False, False]),
    ],
)
def test_a_rule(case: str, ends: list[bool]) -> None:
    assert [rows[0] for rows in launch("nccl_rules", 2, [case]).check().reports] == ends
