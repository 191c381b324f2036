"""Messages of different channels may overtake each other: the same numbers come out, and nothing waits for ever."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ibp_deepspeed import InterlockingConfig
from ibp_deepspeed.errors import ConfigError
from ibp_deepspeed.strategy.timeline import Timeline
from tests.engine.test_parity import MODES, interlocking
from tests.launch import launch


@st.composite
def blocks(draw: st.DrawFn, stages: int) -> dict[str, Any]:
    """An interlocking block: width, mode, slack, exits, phases, mixtures, borrowed layers, fused or split backward."""
    widths, modes = st.integers(1, stages), st.sampled_from(MODES)
    borrow = draw(st.sampled_from([{}, {"aux_head": {"borrow": 1}}]))
    exits = {} if borrow else draw(st.sampled_from([{}, {"exits": 2}]))
    phases = draw(st.lists(st.tuples(widths, modes), max_size=2))
    block = interlocking(
        draw(widths),
        mode=draw(modes),
        hop_slack=draw(st.integers(0, 2)),
        streaming=draw(st.booleans()),
        backward=draw(st.sampled_from(["fused", "split"])),
        schedule=[{"from_step": step, "width": n, "mode": m} for step, (n, m) in enumerate(phases, start=1)],
        **borrow,
        **exits,
    )
    if draw(st.booleans()):
        block["mixed"] = {"width": draw(widths), "fraction": 0.5}
    return block


@st.composite
def trainings(draw: st.DrawFn, stages: int) -> dict[str, Any]:
    """A case of the worker."""
    count = draw(st.integers(1, 6))
    block = draw(blocks(stages).filter(lambda block: _is_valid(block, stages, count)))
    return {
        "stages": stages,
        "micro_batches": count,
        "steps": 4,
        "eval": True,
        "checkpoint": draw(st.booleans()),
        "interlocking": block,
        "seed": draw(st.integers(0, 2**16)),
        "nccl": draw(st.booleans()),
    }


def _is_valid(block: dict[str, Any], stages: int, micro_batches: int) -> bool:
    try:
        Timeline(InterlockingConfig.parse(block), stages, micro_batches).distinct()
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("nccl", [False, True])
def test_channels_overtake_each_other_and_messages_of_one_do_not(nccl: bool) -> None:
    """Whole rounds late, both ways, over gloo and under NCCL's rules."""
    arrived = launch("out_of_order", 2, [{"seed": 0, "nccl": nccl}]).check().reports[1][0]
    numbers: dict[int, list[int]] = {}
    for channel, number in arrived:
        numbers.setdefault(channel, []).append(number)
    assert all(each == list(range(20)) for each in numbers.values()) and len(numbers) == 6
    overtaking = [later - number for i, (_, number) in enumerate(arrived) for _, later in arrived[:i]]
    assert max(overtaking) > 2


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_no_order_across_channels_is_needed(stages: int, full: bool) -> None:
    """Equal to the reference in fp32 to 1e-5: parameters after 4 steps, losses, an evaluation in between."""
    cases = drawn(stages, 100 if full else 12, derandomize=not full)
    reports = launch("out_of_order", stages, cases, timeout=500).check().reports
    for rank, rows in enumerate(reports):
        for case, row in zip(cases, rows, strict=True):
            assert max(row["gradient"], row["parameter"], row["loss"], row["eval"]) <= 1e-5, (rank, case, row)


def drawn(stages: int, count: int, *, derandomize: bool) -> list[dict[str, Any]]:
    """So many trainings, for one set of processes: their start takes longer than a training."""
    cases: list[dict[str, Any]] = []

    @settings(
        max_examples=count,
        derandomize=derandomize,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.filter_too_much],
    )
    @given(trainings(stages))
    def collect(case: dict[str, Any]) -> None:
        cases.append(case)

    collect()
    return cases
