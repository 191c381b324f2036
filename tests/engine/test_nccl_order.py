"""Under NCCL's rules (tests/transport/nccl_like.py) every strategy runs to its end, with the reference's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import covering
from tests.engine.test_parity import MODES, interlocking, timelines
from tests.launch import launch

TRANSPORTS: list[dict[str, Any]] = [
    {"kernels": 4},  # as many as a stage has communicators in training
    {"kernels": 4, "synchronise": 0.2},
    {"lazy": True, "synchronise": 0.05},
]
SHARED = {"readout": "shared", "refresh_interval": 1}


def run(world_size: int, cases: list[dict[str, Any]]) -> None:
    reports = launch("nccl", world_size, cases, timeout=400).check().reports
    for rank, rows in enumerate(reports):
        for case, row in zip(cases, rows, strict=True):
            assert row["gradient"] <= 1e-5 and row["parameter"] <= 1e-5, f"rank {rank}, {case}: {row}"
            assert row["loss"] <= 1e-5 and row["eval"] <= 1e-5, f"rank {rank}, {case}: {row}"


def test_modules_of_stages() -> None:
    """Exits on chosen stages, gaps filled with weight gradients while announced messages are on their way."""
    blocks: list[dict[str, Any]] = [interlocking(1, exits=2), interlocking(2, mode="window", exits=[1], hop_slack=1)]
    blocks += [interlocking(1, exits=4), {"strategy": "global", "mode": "sum", "exits": 2}]
    cases = [
        {"stages": 4, "micro_batches": count, "eval": True, "steps": 3, "transport": transport, "interlocking": block}
        for block in blocks
        for count, transport in zip((1, 2, 5), TRANSPORTS, strict=True)
    ]
    run(4, cases)


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_every_strategy(stages: int, full: bool) -> None:
    """Widths, M, modes, slack; evaluations in between; a device that is synchronised at random places."""
    widths = sorted({1, 2, 3, stages} & set(range(1, stages + 1)))
    axes = covering.cases(widths, (1, 2, 5), MODES, (0, 1), TRANSPORTS, full=full and stages < 8)
    cases = [
        {
            "stages": stages,
            "micro_batches": count,
            "eval": True,
            "steps": 3,
            "transport": transport,
            "interlocking": interlocking(width, mode=mode, hop_slack=slack),
        }
        for width, count, mode, slack, transport in axes
    ]
    run(stages, cases)


def test_changes_of_width_mixtures_borrowed_layers_and_shared_heads() -> None:
    """What leaves no receive behind, and what travels beside the channels."""
    blocks = [
        *timelines(3),
        interlocking(1, mode="window", aux_head={"borrow": 1}),
        interlocking(2, mode="window", aux_head={"borrow": 1, **SHARED}),
        interlocking(1, aux_head=SHARED),
        {"strategy": "global", "aux_head": None},
        interlocking(1, exits=2),
        interlocking(2, mode="window", exits=[0], backward="fused"),
        {"strategy": "global", "mode": "sum", "exit_weights": [0.5, 0.5, 1.0]},
    ]
    cases = [
        {
            "stages": 3,
            "micro_batches": 5 if index % 2 else 2,
            "eval": True,
            "steps": 7,
            "heads": block.get("aux_head", {}) is not None,
            "checkpoint": index % 3 == 0,
            "transport": TRANSPORTS[index % 2],
            "interlocking": block,
        }
        for index, block in enumerate(blocks)
    ]
    run(3, cases)


def test_replicas() -> None:
    """Two of three stages: whose groups are made by all, and used by half."""
    cases = [
        {"stages": 3, "micro_batches": 2, "eval": True, "transport": transport, "interlocking": block}
        for transport in TRANSPORTS[:2]
        for block in (
            interlocking(1),
            interlocking(2, mode="window"),
            interlocking(3, aux_head={**SHARED, "refresh_delay": 2}),
        )
    ]
    run(6, cases)


def test_a_checkpoint_in_between(tmp_path: Path) -> None:
    """Saved while readouts and messages are on their way, loaded into another engine beside the first one."""
    case = {
        "worker": "checkpoints",
        "zero": 0,
        "folder": str(tmp_path),
        "transport": {"kernels": 8, "synchronise": 0.1},
    }
    for rows in launch("nccl", 4, [case], timeout=200).check().reports:
        assert rows[0]["difference"] == 0.0
