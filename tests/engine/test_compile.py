"""Compiled layers give the numbers of the reference, which is eager, under the names of before."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from tests.engine.test_parity import interlocking, run


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs g++")
def test_compiled_stages_equal_the_eager_reference() -> None:
    """Several backward passes through one compiled graph, recomputation, borrowed layers: 1e-5."""
    cases: list[dict[str, Any]] = [
        {"micro_batches": 2, "eval": True, "interlocking": interlocking(2, mode="window")},
        {"micro_batches": 2, "checkpoint": True, "interlocking": interlocking(2, mode="window")},
        {"micro_batches": 2, "interlocking": interlocking(1, mode="furthest", aux_head={"borrow": 1})},
    ]
    for case in cases:
        case |= {"stages": 2}
        case["interlocking"]["compile"] = True
    for rows in run(2, cases, 1e-5):
        assert [row["compiled"] for row in rows] == [2, 2, 2], "both layers of a trunk"
