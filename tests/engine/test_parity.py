"""The engine in real processes equals the one-process reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests import covering
from tests.launch import launch

MODES = ("furthest", "window")
STRATEGIES = {1: {"strategy": "local"}, 2: {"strategy": "pairwise"}}


def interlocking(width: int, **options: Any) -> dict[str, Any]:
    return {**STRATEGIES.get(width, {"strategy": "nwise", "width": width}), **options}


def run(world_size: int, cases: list[dict[str, Any]], tolerance: float) -> list[Any]:
    """Run cases in one set of processes; every rank compares its own stage."""
    reports = launch("parity", world_size, cases, timeout=500).check().reports
    for rank, rows in enumerate(reports):
        for case, row in zip(cases, rows, strict=True):
            message = f"rank {rank}, {case}: {row}"
            assert row["gradient"] <= tolerance and row["parameter"] <= tolerance, message
            assert row["loss"] <= tolerance and row["eval"] <= tolerance, message
    return reports


def matrix(stages: int, full: bool) -> list[dict[str, Any]]:
    axes = covering.cases(range(1, stages + 1), (1, 2, 5), MODES, (True, False), (0, 1), full=full)
    return [
        {
            "stages": stages,
            "micro_batches": count,
            "eval": count == 2,
            "interlocking": interlocking(width, mode=mode, streaming=streaming, hop_slack=slack),
        }
        for width, count, mode, streaming, slack in axes
    ]


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_every_strategy_equals_the_reference(stages: int, full: bool) -> None:
    """Gradients of the first step, parameters after 5 steps of SGD with momentum, losses: 1e-5 relative in fp32."""
    run(stages, matrix(stages, full), 1e-5)


def timelines(stages: int) -> list[dict[str, Any]]:
    """Strategies over time and micro-batch: phases, periodic backpropagation, three mixtures, all of them at once."""
    local = {"strategy": "local"}
    phases = [{"from_step": 1, "width": 2, "mode": "window"}, {"from_step": 2, "width": stages}]
    phases += [{"from_step": 4, "width": 1}, {"from_step": 5, "width": stages, "mode": "window"}]
    mixtures: list[dict[str, Any]] = [
        {**local, "mixed": {"width": 2, "fraction": 0.25}},
        {**local, "mixed": {"width": 3, "fraction": 0.5, "mode": "window"}},
        {"strategy": "pairwise", "mixed": {"width": stages, "fraction": 0.5}},
    ]
    return [
        {**local, "schedule": phases},
        {**local, "global_interval": 2},
        {"strategy": "pairwise", "mode": "window", "global_interval": 3},
        *mixtures,
        {**mixtures[1], "schedule": phases, "global_interval": 3, "hop_slack": 1},
    ]


@pytest.mark.parametrize("stages", [3, 4])
def test_timelines_equal_the_reference(stages: int) -> None:
    """Phases of width and mode, periodic backpropagation, mixed micro-batches, and all of them: 7 batches each."""
    blocks = timelines(stages)
    slack: list[dict[str, Any]] = [{**block, "mode": "window", "hop_slack": 1} for block in blocks[3:6]]
    pairs = [*itertools.product(blocks, (5,) if stages == 3 else (1, 2, 5)), *((block, 5) for block in slack)]
    cases: list[dict[str, Any]] = [
        {"stages": stages, "micro_batches": count, "steps": 7, "eval": count == 2, "interlocking": block}
        for block, count in pairs
    ]
    everything = {**cases[0], "micro_batches": 5, "interlocking": blocks[-1]}
    cases.append({**everything, "interlocking": {**blocks[-1], "streaming": False}})
    cases.append({**everything, "checkpoint": True})
    reports = run(stages, cases, 1e-5)
    # Stage 1 recomputes what waits for a gradient: batches 1-3 and 5-6 whole, 3 of 5 micro-batches of 0 and 4.
    assert reports[1][-1]["recomputations"] == 5 * 5 + 2 * 3


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_borrowed_layers_equal_the_reference(stages: int, full: bool) -> None:
    """Heads behind a layer of the next stage: readouts private and shared, slack, recomputation: 1e-5."""
    plain: dict[str, Any] = {"borrow": 1}
    shared = {"borrow": 1, "readout": "shared", "refresh_interval": 1}
    cases = [
        {
            "stages": stages,
            "micro_batches": count,
            "eval": count == 2,
            "checkpoint": count == 5,
            "interlocking": interlocking(width, mode=mode, hop_slack=slack, aux_head=head),
        }
        for width, mode, (count, slack, head) in covering.cases(
            range(1, stages + 1),
            MODES,
            ((1, 0, plain), (2, 1, shared), (5, 0, plain)),
            full=full,
            always=[(1, "furthest", (5, 0, plain))],  # whose recomputations are counted
        )
    ]
    mixed = {"strategy": "local", "mode": "window", "mixed": {"width": 2, "fraction": 0.5}, "aux_head": plain}
    cases += [{"stages": stages, "micro_batches": 3, "steps": 7, "interlocking": {**mixed, "global_interval": 3}}]
    reports = run(stages, cases, 1e-5)
    waiting = interlocking(1, mode="furthest", hop_slack=0, aux_head=plain)
    local = next(i for i, each in enumerate(cases) if each["micro_batches"] == 5 and each["interlocking"] == waiting)
    assert all(rows[local]["recomputations"] == 25 for rows in reports[:-1]), "local learning waits for a gradient too"


def test_one_stage_is_plain_training() -> None:
    run(
        1,
        [{"stages": 1, "micro_batches": 3, "eval": True, "interlocking": {"strategy": s}} for s in ("local", "global")],
        1e-5,
    )


def test_double_precision() -> None:
    """Doubles pass wherever DeepSpeed does not reduce gradients: 1e-10 relative."""
    cases = [
        {"stages": 3, "micro_batches": 5, "dtype": "fp64", "eval": True, "interlocking": interlocking(n, mode=mode)}
        for n in (1, 2, 3)
        for mode in ("furthest", "window")
    ]
    run(3, cases, 1e-10)


def test_weights_clipping_checkpointing_and_depth() -> None:
    """Options that must not change, or must change exactly so, the numbers."""
    base: dict[str, Any] = {"stages": 4, "micro_batches": 5}
    weighted = interlocking(3, mode="window", window_weights=[1.0, 0.5, 0.25])
    cases: list[dict[str, Any]] = [
        {**base, "interlocking": weighted},
        {**base, "clip": 0.05, "interlocking": interlocking(2)},
        {**base, "clip": 0.05, "interlocking": interlocking(2, mode="window", clip_scope="global")},
        {**base, "interlocking": interlocking(2, channel_depth=2)},
        {**base, "heads": False, "interlocking": {"strategy": "global", "aux_head": None}},
        {**base, "heads": False, "checkpoint": True, "interlocking": {"strategy": "global", "aux_head": None}},
        {**base, "interlocking": {"strategy": "global"}},
        {**base, "staged": True, "eval": True, "interlocking": interlocking(3, mode="window", hop_slack=1)},
        *(
            {**base, "checkpoint": True, "interlocking": interlocking(n, mode=m)}
            for n in (1, 2, 3)
            for m in ("furthest", "window")
        ),
    ]
    reports = run(4, cases, 1e-5)
    for row, case in zip(reports[1], cases, strict=True):  # stage 1 has a neighbour on both sides
        recomputes = case.get("checkpoint") and case["interlocking"].get("strategy") != "local"
        assert row["recomputations"] == (25 if recomputes else 0), case  # once a micro-batch: 5 steps of 5


def test_adamw_losses() -> None:
    """20 steps of AdamW: losses and parameters within 1e-5."""
    cases = [
        {"stages": 4, "micro_batches": 2, "steps": 20, "optimizer": "adamw", "interlocking": interlocking(n, mode=mode)}
        for n in (1, 2, 3, 4)
        for mode in ("furthest", "window")
    ]
    for rows in run(4, cases, 1e-5):
        print("AdamW, 20 steps:", [(f"{row['loss']:.1e}", f"{row['parameter']:.1e}") for row in rows])


def test_data_parallel(full: bool) -> None:
    """2 stages × 2 replicas, ZeRO 0 and 1."""
    cases = [
        {
            "stages": 2,
            "micro_batches": count,
            "zero": zero,
            "optimizer": optimizer,
            "clip": clip,
            "eval": True,
            "interlocking": interlocking(width, mode=mode),
        }
        for zero, (width, mode), (count, optimizer, clip) in covering.cases(
            (0, 1),
            ((1, "furthest"), (2, "furthest"), (2, "window")),
            ((1, "sgd", 0.0), (5, "sgd", 0.05), (2, "adamw", 0.0)),
            full=full,
        )
    ]
    cases += [
        {
            "stages": 2,
            "micro_batches": 3,
            "zero": zero,
            "clip": 0.05,
            "interlocking": interlocking(2, mode="window", clip_scope="global"),
        }
        for zero in (0, 1)
    ]
    mixed = {"strategy": "local", "mixed": {"width": 2, "fraction": 0.5}, "global_interval": 3}
    borrowing = interlocking(1, mode="window", aux_head={"borrow": 1})
    cases += [
        {"stages": 2, "micro_batches": 4, "zero": z, "eval": True, "interlocking": block}
        for z in (0, 1)
        for block in (mixed, borrowing)
    ]
    run(4, cases, 1e-5)


def test_bf16() -> None:
    """bf16 weights with fp32 masters, ZeRO 1 and 0, against the fp32 reference.

    bf16 has 8 bits of mantissa (2^-8 = 0.4%); five steps of a two-layer stage stay within 3% of a parameter's norm.
    """
    cases = [
        {"stages": 2, "micro_batches": 5, "zero": zero, "dtype": "bf16", "interlocking": interlocking(n, mode=mode)}
        for n, mode in ((1, "furthest"), (2, "furthest"), (2, "window"))
        for zero in (0, 1)
    ]
    borrowing: dict[str, Any] = {"stages": 2, "micro_batches": 5, "dtype": "bf16"}
    borrowing["interlocking"] = interlocking(1, mode="window", aux_head={"borrow": 1})
    cases += [{**borrowing, "zero": zero} for zero in (0, 1)]
    run(2, cases, 3e-2)
