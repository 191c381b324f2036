"""Exits on chosen stages, input gradients first, and the sum of all exits: the engine equals the reference."""

from __future__ import annotations

from typing import Any

import pytest

from tests import covering
from tests.engine.test_parity import interlocking, run
from tests.launch import launch

EXITS: list[Any] = [2, 4, [0, 3]]


@pytest.mark.parametrize("stages", [4, 8])
def test_exits_on_chosen_stages(stages: int, full: bool) -> None:
    """Every G-th stage and chosen ones, two widths, both modes, B and W at once and apart: 1e-5 relative in fp32."""
    axes = covering.cases(
        EXITS, (1, 2), ("furthest", "window"), ("fused", "split"), ((1, 0), (2, 1), (5, 0)), full=full and stages == 4
    )
    cases = [
        {
            "stages": stages,
            "micro_batches": count,
            "eval": count == 2,
            "checkpoint": count == 5 and mode == "window",
            "interlocking": interlocking(width, mode=mode, exits=exits, backward=backward, hop_slack=slack),
        }
        for exits, width, mode, backward, (count, slack) in axes
    ]
    run(stages, cases, 1e-5)


@pytest.mark.parametrize("stages", [4, 8])
def test_the_sum_of_all_exits(stages: int) -> None:
    """Weights of exits, some of them only, weights that change, recomputation. 16 layers in doubles: in fp32 five steps
    with momentum drift to 1.4e-5."""
    base: dict[str, Any] = {"strategy": "global", "mode": "sum"}
    some = {**base, "exits": [1, 2], "exit_weights": [0.3, 0.5, 1.0]}
    changing = [{"from_step": 2, "width": 9, "exit_weights": [0.0, 0.1, 1.0]}, {"from_step": 4, "width": 9}]
    blocks: list[dict[str, Any]] = [
        base,
        {**base, "backward": "fused", "exits": 2},
        some,
        {**some, "schedule": changing, "global_interval": 3},
        {"strategy": "local", "exits": [1, 2], "mixed": {"width": stages, "fraction": 0.5, "mode": "sum"}},
    ]
    cases: list[dict[str, Any]] = [
        {"stages": stages, "micro_batches": 3, "eval": True, "interlocking": block} for block in blocks
    ]
    cases.append({**cases[2], "checkpoint": True, "micro_batches": 5})
    if stages == 8:
        cases = [{**case, "dtype": "fp64"} for case in cases]
    run(stages, cases, 1e-10 if stages == 8 else 1e-5)


def test_exits_combine_with_what_else_there_is() -> None:
    """Phases, mixtures, periodic backpropagation, borrowed layers, shared LM heads, global clipping, ZeRO 1, bf16."""
    shared = {"readout": "shared", "refresh_interval": 1}
    phases = [{"from_step": 1, "width": 2, "mode": "window"}, {"from_step": 3, "width": 4}]
    blocks: list[dict[str, Any]] = [
        {"strategy": "local", "exits": 2, "schedule": phases},
        {"strategy": "local", "exits": 2, "global_interval": 2},
        {"strategy": "local", "exits": [0, 1], "mode": "window", "mixed": {"width": 2, "fraction": 0.5}},
        interlocking(1, exits=2, mode="window", aux_head={"borrow": 1}),
        interlocking(2, exits=[0, 1], aux_head={"borrow": 1, **shared}),
        interlocking(1, exits=2, aux_head=shared),
        interlocking(1, exits=4, aux_head=shared),  # no head is left to share it with
        interlocking(1, exits=2, clip_scope="global"),
        interlocking(1, exits=4, streaming=False),
    ]
    cases: list[dict[str, Any]] = [
        {
            "stages": 4,
            "micro_batches": 3,
            "steps": 6,
            "eval": True,
            "clip": 0.05 if block.get("clip_scope") else 0.0,
            "interlocking": block,
        }
        for block in blocks
    ]
    run(4, cases, 1e-5)


def test_replicas_and_bf16() -> None:
    """2 stages of 2 replicas where the whole pipeline is one module: ZeRO 0 and 1, fp32 and bf16."""
    cases: list[dict[str, Any]] = [
        {"stages": 2, "micro_batches": 5, "zero": zero, "eval": True, "interlocking": block}
        for zero in (0, 1)
        for block in (interlocking(1, exits=2), {"strategy": "global", "mode": "sum"})
    ]
    run(4, cases, 1e-5)
    run(2, [{**case, "dtype": "bf16"} for case in cases], 3e-2)


@pytest.mark.parametrize("worker", ["arrivals", "nccl"])
def test_a_stage_sees_that_a_message_has_come(worker: str) -> None:
    """Or it would never fill a gap, or always: over gloo, and where messages are announced."""
    first, second = (rows[0] for rows in launch(worker, 2, [{"worker": "arrivals"}], timeout=100).check().reports)
    assert first == {}
    assert second == {"before": False, "there": True, "header": [7, 3, 5], "same": True, "after": False}


@pytest.mark.parametrize("stages", [4])
def test_both_backward_passes_give_the_same_bits_in_fp64(stages: int) -> None:
    """Parameters after five steps, whoever waits for whom: sums are always taken in the same order."""
    blocks = [interlocking(1, exits=2), interlocking(1, exits=4), interlocking(2, exits=2), {"strategy": "global"}]
    blocks += [{"strategy": "global", "mode": "sum"}, {"strategy": "local", "exits": 2, "global_interval": 2}]
    cases = [
        {"stages": stages, "micro_batches": count, "dtype": "fp64", "interlocking": block}
        for block in blocks
        for count in (1, 5)
    ]
    for rows in launch("split_bits", stages, cases, timeout=300).check().reports:
        for case, row in zip(cases, rows, strict=True):
            assert row["equal"], case
    # the stages in front of an exit put something off, or the test shows nothing
    reports = launch("split_bits", stages, cases[:1], timeout=120).check().reports
    assert [rows[0]["put off"] > 0 for rows in reports] == [False, True, False, True]
    # in backpropagation stages wait for each other, and do some of it meanwhile
    reports = launch("split_bits", stages, [{**cases[3], "interlocking": interlocking(1, exits=4)}]).check().reports
    assert sum(rows[0]["early"] for rows in reports) > 0
