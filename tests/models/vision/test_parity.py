"""Image classifiers in real processes equal the one-process reference: parameters, and statistics of batch norms."""

from __future__ import annotations

from typing import Any

from tests import covering
from tests.engine.test_parity import MODES, interlocking
from tests.launch import launch


def run(world_size: int, cases: list[dict[str, Any]]) -> list[Any]:
    """fp32: 1e-5 relative, after three batches of SGD with momentum and weight decay."""
    reports = launch("vision", world_size, cases, timeout=300).check().reports
    for rank, rows in enumerate(reports):
        for case, row in zip(cases, rows, strict=True):
            for name in ("parameter", "buffer", "loss", "eval"):
                assert row[name] <= 1e-5, f"rank {rank}, {case}: {row}"
    return reports


def test_every_strategy_equals_the_reference(full: bool) -> None:
    """Three stages: residual networks of both kinds of blocks and vision Transformers, every width, both modes,
    recomputation, borrowed layers."""
    axes = covering.cases(
        range(1, 4),
        MODES,
        ("cifar_resnet", "bottleneck", "vit"),
        ((2, True, 0), (3, False, 0), (1, False, 1)),
        full=full,
    )
    cases = [
        {
            "kind": kind,
            "stages": 3,
            "micro_batches": count,
            "checkpoint": checkpoint,
            "interlocking": interlocking(width, mode=mode, aux_head={"borrow": borrow}),
        }
        for width, mode, kind, (count, checkpoint, borrow) in axes
    ]
    cases += [
        {"kind": "cifar_resnet", "stages": 3, "micro_batches": 2, "interlocking": interlocking(1, exits=[0])},
        {"kind": "vit", "stages": 3, "micro_batches": 2, "interlocking": interlocking(2, aux_head={"blocks": 1})},
        {
            "kind": "cifar_resnet",
            "stages": 3,
            "micro_batches": 4,
            "checkpoint": True,
            "interlocking": interlocking(1, mixed={"width": 2, "fraction": 0.5}, global_interval=2),
        },
    ]
    reports = run(3, cases)
    assert all(rows[0]["buffers"] for rows in reports), "the first case's stages have batch norms"
    ran_again = [row["recomputations"] for row, case in zip(reports[1], cases, strict=True) if case.get("checkpoint")]
    assert max(ran_again) > 0


def test_statistics_are_moved_once_by_a_micro_batch_that_runs_twice() -> None:
    """A stage that waits for a gradient recomputes; norms that counted that would be seen in the buffers."""
    base: dict[str, Any] = {"kind": "cifar_resnet", "stages": 2, "micro_batches": 3, "checkpoint": True}
    cases = [{**base, "interlocking": interlocking(2, mode=mode)} for mode in MODES]
    reports = run(2, cases)
    assert [row["recomputations"] for row in reports[0]] == [9, 9]


def test_replicas_agree_on_their_statistics_before_they_are_used() -> None:
    """Two replicas of two stages: each has its own running means until an evaluation or a checkpoint."""
    cases = [{"kind": "cifar_resnet", "stages": 2, "micro_batches": 2, "interlocking": interlocking(2)}]
    for rows in launch("vision", 4, cases, timeout=300).check().reports:
        assert rows[0]["parameter"] <= 1e-5 and rows[0]["buffer"] == 0.0
