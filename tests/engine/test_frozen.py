"""Stages with nothing to train: the engine equals the reference, and sends no gradient that nobody uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from ibp_deepspeed import Strategy
from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.strategy.timeline import Timeline
from tests.engine.test_parity import interlocking, run


def layers_of(stages: Sequence[int]) -> list[int]:
    """Two a stage."""
    return [layer for k in stages for layer in (2 * k, 2 * k + 1)]


def case(stages: int, frozen: Sequence[int], count: int, block: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"stages": stages, "micro_batches": count, "frozen": frozen, "eval": True, "interlocking": block, **more}


@pytest.mark.parametrize("frozen", [[0, 1], [1], [3], [0, 2], [0, 1, 2]])
def test_frozen_stages_equal_the_reference(frozen: list[int]) -> None:
    """First, middle and last stages: every width and mode, heads trained; fp32, 1e-5 relative after 5 steps."""
    blocks = [interlocking(n, mode=mode) for n in (1, 2, 3) for mode in ("furthest", "window")]
    blocks += [{"strategy": "global"}, {"strategy": "global", "mode": "sum"}, interlocking(2, exits=2, hop_slack=1)]
    blocks += [interlocking(2, backward="fused"), {"strategy": "local", "mixed": {"width": 3, "fraction": 0.5}}]
    cases = [case(4, layers_of(frozen), 1 + 2 * (i % 2), block) for i, block in enumerate(blocks)]
    reports = run(4, cases, 1e-5)
    lowest = min(set(range(4)) - set(frozen))
    for rank, rows in enumerate(reports):
        for each, row in zip(cases, rows, strict=True):
            if rank <= lowest:
                assert row["gradient messages"] == 0, (rank, each)
            count = each["micro_batches"]
            batch = Timeline(InterlockingConfig.parse(each["interlocking"]), 4, count, frozen=frozen).at(0)
            wanted = sum(strategy.crosses(loss, rank) for strategy in batch.strategies for loss in range(4))
            assert row["gradient messages"] == 5 * wanted, (rank, each)


def test_the_messages_of_a_frozen_bottom_by_hand() -> None:
    """K = 4, M = 3, stages 0 and 1 frozen, backpropagation: stage 3 sends 3 a batch, nobody else any."""
    reports = run(4, [case(4, layers_of([0, 1]), 3, {"strategy": "global"})], 1e-5)
    assert [rows[0]["gradient messages"] for rows in reports] == [0, 0, 0, 15]
    assert Strategy(4, 4, frozen=(0, 1)).users(3) == [2, 3]


def test_frozen_stages_combine_with_what_else_there_is() -> None:
    """No head trained either, layers of a stage, recomputation, borrowed layers, shared LM heads, clipping, ZeRO 1."""
    shared = {"readout": "shared", "refresh_interval": 1}
    nothing = {"frozen_heads": [0, 1]}
    first = layers_of([0, 1])
    cases = [
        case(4, first, 3, interlocking(2), **nothing),
        case(4, first, 3, interlocking(2, mode="window"), **nothing, clip=0.05),
        case(4, first, 3, {"strategy": "global", "clip_scope": "global"}, **nothing, clip=0.05),
        case(4, [*first, 4], 3, {"strategy": "global"}, optimizer="adamw"),
        case(4, layers_of([1, 2]), 3, {"strategy": "global"}, checkpoint=True),
        case(4, layers_of([2]), 5, interlocking(3, mode="window"), checkpoint=True),
        case(4, layers_of([1]), 3, interlocking(1, mode="window", aux_head={"borrow": 1})),
        case(4, layers_of([0, 2]), 3, interlocking(2, mode="window", aux_head={"borrow": 1})),
        case(4, layers_of([2]), 3, interlocking(2, aux_head={"borrow": 1}), checkpoint=True),
        case(4, [*first, 6], 3, interlocking(1, aux_head=shared)),
        case(4, first, 3, {"strategy": "local", "global_interval": 2}, **nothing),
        case(4, first, 3, interlocking(2), **nothing, zero=1),
    ]
    run(4, cases, 1e-5)


def test_replicas_and_bf16() -> None:
    """Nothing to train on the first stage, its head neither: ZeRO 0 and 1, fp32 with two replicas, and bf16."""
    cases = [case(2, [0, 1], 3, {"strategy": "global"}, frozen_heads=[0], zero=zero) for zero in (0, 1)]
    run(4, cases, 1e-5)
    run(2, [{**each, "dtype": "bf16"} for each in cases], 3e-2)
