"""A step that can't be made is left out on its stage alone, with a warning, and all learning rates stay together."""

from __future__ import annotations

from typing import Any

import pytest

from tests.launch import launch
from tests.workers.skipping import BAD, BATCHES, STAGES

PRECISIONS: list[dict[str, Any]] = [
    {"bf16": False, "zero": 0, "clip": 0.0},
    {"bf16": False, "zero": 0, "clip": 1.0},
    {"bf16": False, "zero": 1, "clip": 1.0},
    {"bf16": True, "zero": 0, "clip": 1.0},
    {"bf16": True, "zero": 1, "clip": 0.0},
]
ALL = [*PRECISIONS, *({**PRECISIONS[i], "optimizer": "Muon"} for i in (1, 4))]


@pytest.fixture(scope="module")
def infinite() -> list[Any]:
    """Local learning with an infinite loss at the last stage in batch 1: the reports of all stages."""
    return launch("skipping", STAGES, [{"what": "infinite", **each} for each in ALL]).check().reports


@pytest.mark.parametrize("index", range(len(ALL)), ids=[str(tuple(each.values())) for each in ALL])
def test_a_step_that_is_not_finite_is_left_out_on_its_stage_alone(infinite: list[Any], index: int) -> None:
    *others, last = (rows[index] for rows in infinite)
    assert last["finite"] and last["moved"] == [batch != BAD for batch in range(BATCHES)], last
    assert len(last["said"]) == 1 and f"stage {STAGES - 1}, batch {BAD + 1}" in last["said"][0], last["said"]
    assert last["skipped"] == 1
    for other in others:
        assert other["finite"] and all(other["moved"]) and not other["said"] and other["skipped"] == 0, other
        assert other["rates"] == last["rates"], "the learning rates of all stages stay together"
    assert len(set(last["rates"])) == BATCHES, "a schedule that stands still would prove nothing"


def test_a_stage_without_gradients_takes_part_in_the_norm_of_all() -> None:
    """clip_scope global: the other stages wait for its part."""
    cases = [{"what": "no gradient", **each} for each in PRECISIONS if each["clip"]]
    reports = launch("skipping", STAGES, cases, timeout=60).check().reports
    for index, case in enumerate(cases):
        first, *others = (rows[index] for rows in reports)
        for other in others:
            assert all(other["moved"]) and other["norms"] == pytest.approx(first["norms"], rel=1e-6), (case, other)
            assert min(other["norms"]) > 0, other


def test_groups_that_differ_between_stages_are_refused_where_zero_would_hang() -> None:
    """ZeRO's optimizer reduces one norm a parameter group over all stages."""
    case = {"what": "uneven groups", "bf16": False, "zero": 1, "clip": 1.0}
    for (row,) in launch("skipping", STAGES, [case], timeout=60).check().reports:
        assert row["refused"].endswith('use "decay": "all".'), row
