"""Every value that an engine reports of its stages is the one that is worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from ibp_deepspeed import measures
from tests.launch import launch
from tests.workers.reports import COUNT, RATE, SLEEP

WINDOW = {"strategy": "pairwise", "mode": "window"}
CASES: list[dict[str, Any]] = [
    {"interlocking": WINDOW},
    {"interlocking": {"strategy": "local"}},
    {"interlocking": {"strategy": "nwise", "width": 3, "mode": "window", "window_weights": [1, 2, 3]}},
    {"interlocking": {"strategy": "nwise", "width": 3, "mode": "furthest"}},
    {"interlocking": {"strategy": "global", "mode": "sum"}},
    {"interlocking": {"strategy": "local", "exits": 2}},
    {"interlocking": WINDOW, "zero": 1, "rough": 1e-5},
    {"interlocking": WINDOW, "bf16": True, "rough": 0.03},
    {"interlocking": WINDOW, "bf16": True, "zero": 1, "rough": 0.03},
]
EXACT = (measures.LOSS, measures.TRUNK_NORM, measures.HEAD_NORM, measures.COSINE)


def check(cases: list[dict[str, Any]], reports: list[Any]) -> None:
    for case, rows in zip(cases, reports, strict=True):
        assert [row["step"] for row in rows] == [2, 4], case
        for row in rows:
            for stage, (got, want) in enumerate(zip(row["got"], row["want"], strict=True)):
                found = {name: got[name] for name in EXACT if name in got}
                assert set(found) <= set(want), (case, stage, found, want)
                rough = case.get("rough", 1e-5)
                expected = pytest.approx({name: want[name] for name in found}, rel=rough, abs=rough / 5)
                assert found == expected, (case, row["step"], stage)
                assert set(want) - set(found) <= {measures.COSINE}, (case, stage)
                assert got[measures.LEARNING_RATE] == RATE and got[measures.MEMORY] > 0


def test_losses_norms_and_cosines_are_those_of_the_reference() -> None:
    """Of three stages: before clipping, in fp32 and from bf16's and ZeRO's own sums; and nobody but rank 0 has them."""
    first, *others = launch("reports", 3, [{"stages": 3, **case} for case in CASES]).check().reports
    assert not any(any(rows) for rows in others)
    check(CASES, first)
    cosines = [[measures.COSINE in stage for stage in rows[-1]["got"]] for rows in first]
    assert cosines[0] == cosines[2] == cosines[4] == [True, True, False], "the last stage receives nothing"
    assert cosines[1] == [False] * 3, "in local learning none does"
    assert cosines[3] == [False, False, False] or cosines[3][1], "furthest: where the own loss trains a stage before"
    losses = [[measures.LOSS in stage for stage in rows[-1]["got"]] for rows in first]
    assert losses[5] == [True, False, True] or losses[5] == [False, False, True], "exits from the end"


def test_replicas_are_averaged() -> None:
    cases: list[dict[str, Any]] = [{"stages": 2, "interlocking": WINDOW, "zero": zero} for zero in (0, 1)]
    check(cases, launch("reports", 4, cases).check().reports[0])


def test_waits_are_counted_by_their_cause() -> None:
    """Behind a slow first stage the second waits for activations; before a slow second one the first waits for
    gradients. A share is of the stage's own time, and shares add up."""
    cases: list[dict[str, Any]] = [{"stages": 2, "interlocking": WINDOW, "slow": stage} for stage in (0, 1)]
    cases[0]["interlocking"] = {"strategy": "local"}
    behind, before = (rows[-1]["got"] for rows in launch("reports", 2, cases).check().reports[0])
    for stages in (behind, before):
        for stage in stages:
            causes = [stage[name] for name in measures.WAITING_FOR.values()]
            assert 0 <= stage[measures.WAITING] <= 1 and sum(causes) == pytest.approx(stage[measures.WAITING])
            assert stage[measures.BATCH_TIME] > 0
    slept = COUNT * SLEEP
    assert behind[0][measures.BATCH_TIME] >= slept and before[1][measures.BATCH_TIME] >= slept
    assert behind[1][measures.WAITING_FOR["activations"]] > behind[0][measures.WAITING]
    assert before[0][measures.WAITING_FOR["gradients"]] > before[1][measures.WAITING]
    assert [stage[measures.IN_FLIGHT] for stage in behind] == [1, 1]
    assert before[0][measures.IN_FLIGHT] == 2
