"""Checkpoints of one shape go on in another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch import launch
from tests.workers.reshape import make_virtual, train

TOLERANCE = {"plain": 1e-6, "zero": 1e-6, "bf16": 1e-6}
SOURCES = [(4, "plain"), (4, "zero"), (2, "plain"), (2, "zero"), (4, "bf16")]
# in four processes: two stages are two replicas
IN_FOUR = [
    ((4, "plain"), 2, "zero"),
    ((4, "zero"), 2, "plain"),
    ((2, "plain"), 4, "plain"),
    ((2, "zero"), 4, "zero"),
    ((4, "bf16"), 2, "bf16"),
]
SHARED = {"strategy": "local", "aux_head": {"readout": "shared", "refresh_interval": 2, "refresh_delay": 4}}


def folder_of(root: Path, source: tuple[int, str]) -> str:
    return str(root / f"{source[0]}-{source[1]}")


def go_on(root: Path, source: tuple[int, str], stages: int, layout: str, **more: Any) -> dict[str, Any]:
    return {"task": "go on", "folder": folder_of(root, source), "stages": stages, "layout": layout, **more}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture(scope="module")
def four(root: Path) -> list[dict[str, Any]]:
    """Of each case in four processes what the first process says."""
    saves = [{"task": "save", "folder": folder_of(root, s), "stages": s[0], "layout": s[1]} for s in SOURCES]
    cases = [go_on(root, source, stages, layout) for source, stages, layout in IN_FOUR]
    reports = launch("reshape", 4, saves + cases).check().reports
    return reports[0][len(saves) :]


def test_stages_become_replicas_and_back(four: list[dict[str, Any]]) -> None:
    """4 × 1 and 2 × 2, ZeRO 0 and 1: what is loaded is what was saved, and what follows is backpropagation."""
    for (source, stages, layout), row in zip(IN_FOUR, four, strict=True):
        assert row["differing"] == [], (source, stages, layout)
        assert row["six"] <= TOLERANCE[layout], (source, stages, layout, row["six"])
        assert row["rate"] and row["numbers"] == [3, 48, 5]
        added = [] if stages == 2 else [f"head {layer}:{name}" for layer in (2, 6) for name in ("bias", "weight")]
        assert row["unknown"] == added
