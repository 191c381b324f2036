"""Heads with slow copies of the next stage's first layers: in real processes as in the reference, whatever is late."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.objectives.slow_layers import slow_rule
from tests.launch import launch


def block(width: int = 1, *, exits: Any = "every", mode: str = "window", **options: Any) -> dict[str, Any]:
    names: dict[int, dict[str, Any]] = {1: {"strategy": "local"}, 2: {"strategy": "pairwise"}}
    strategy = names.get(width, {"strategy": "nwise", "width": width})
    objective = {"name": "momentum", "interval": 2, "average": 0.5, **options}
    return {**strategy, "mode": mode, "exits": exits, "aux_head": {"objective": objective}}


_OF_THE_CASE = ("bounds", "stages", "optimizer", "clip", "zero", "frozen")


def case(width: int = 1, micro_batches: int = 2, **more: Any) -> dict[str, Any]:
    rest: dict[str, Any] = {name: more.pop(name) for name in _OF_THE_CASE if name in more}
    return {"task": "parity", "interlocking": block(width, **more), "micro_batches": micro_batches, **rest}


THREE = [
    case(1, 1),
    case(1, 2, delay=0),
    case(2, 1, layers=2, bounds=[0, 2, 4, 6]),
    case(2, 2, mode="furthest", interval=1, delay=5),
    case(3, 2, mode="furthest", interval=3),
    case(1, 2, optimizer="adamw", clip=0.05, frozen=[2, 3]),
    case(2, 2, frozen=[0, 1, 2]),
]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """Three processes: by case, what each rank says."""
    folder = tmp_path_factory.mktemp("checkpoints")
    cases = [
        *THREE,
        {"task": "late", "interlocking": block(interval=1, delay=1)},
        {"task": "resume", "interlocking": block(2, delay=5), "folder": str(folder / "resume")},
        {"task": "exchange", "interlocking": block(delay=5), "folder": str(folder / "exchange")},
        {
            "task": "reshape",
            "interlocking": block(),
            "bounds": [0, 2, 4, 6],
            "to": [0, 2, 3, 6],
            "folder": str(folder / "reshape"),
        },
        {"task": "average", "interlocking": block(interval=1, delay=0, average=0.9)},
        {"task": "refusals", "interlocking": block()},
    ]
    reports = launch("slow_layers", 3, cases, timeout=400).check().reports
    return [list(rows) for rows in zip(*reports, strict=True)]


def check(rows: list[dict[str, Any]], stages: int, heads: set[int], layers: int = 1) -> None:
    """1e-5 in fp32; every head has used several copies, whose bytes are reported."""
    for rank, row in enumerate(rows):
        assert max(row[name] for name in ("loss", "parameter", "eval")) <= 1e-5, (rank, row)
        stage = rank % len(rows) * stages // len(rows)
        if stage in heads:
            assert row["used"] >= 2, (rank, row)
        assert row["bytes"] == 4 * 7 * 6 * layers and row["reported"] == ([row["bytes"]] if rank == 0 else [])


@pytest.mark.parametrize("number", range(len(THREE)))
def test_equals_the_reference(three: list[list[Any]], number: int) -> None:
    options = THREE[number]["interlocking"]["aux_head"]["objective"]
    check(three[number], 3, {0, 1} if not THREE[number].get("frozen") else {1}, options.get("layers", 1))


def test_modules_and_replicas_equal_the_reference() -> None:
    """Four stages with an exit on every second one; two stages × two replicas, with ZeRO 1 or without."""
    cases = [
        case(1, 1, stages=4, exits=2),
        case(2, 2, stages=4, exits=2, mode="furthest"),
        case(1, 1, stages=2, delay=3, zero=0, clip=0.05),
        case(2, 2, stages=2, delay=2, zero=1, optimizer="adamw", layers=1),
    ]
    reports = launch("slow_layers", 4, cases).check().reports
    for number, heads in enumerate(({1}, {1}, {0}, {0})):
        check([rows[number] for rows in reports], cases[number]["stages"], heads)


def test_numbers_do_not_depend_on_time(three: list[list[Any]]) -> None:
    """Slow stages, and late messages."""
    assert three[len(THREE)] == [[True] * 3] * 3


def test_a_resumed_run_equals_the_uninterrupted_one_bitwise(three: list[list[Any]]) -> None:
    """In a new engine, and in one that has trained on; without the average and the pending copies it is refused."""
    for row in three[len(THREE) + 1]:
        assert row["files"] == ["slow_layers_02-model_states.pt", "slow_layers_04-model_states.pt"]
        assert row["pending"] == [2, 4] and row["dtypes"] == ["torch.float32"] and row["report"] == []
        assert row["same"] == [True, True]
    refusals = [row["refusal"] for row in three[len(THREE) + 1]]
    assert all(re.search("layers as they were when batch 2 began, but .* does not exist", text) for text in refusals)


def test_engine_and_virtual_pipeline_read_each_others(three: list[list[Any]]) -> None:
    for row in three[len(THREE) + 2]:
        assert max(row.values()) <= 1e-5, row


def test_another_shape_goes_on_where_the_boundary_is_the_same(three: list[list[Any]]) -> None:
    """Elsewhere averages and copies begin as the layers are, which is said."""
    for rank, row in enumerate(three[len(THREE) + 3]):
        line = "head before layer 3: its copies of the layers behind it begin as these are now"
        assert row["lines"] == [[line], [line]] and row["error"] <= 1e-5, row
        assert row["begins"] == (rank == 1), row


def test_an_average_is_exact_in_bf16(three: list[list[Any]]) -> None:
    """Copies are the rounded average: rounded averages would stand still."""
    assert all(all(same) for same in three[len(THREE) + 4]), three[len(THREE) + 4]


REFUSALS = [
    "objective momentum needs heads with SlowLayers, a Head has none",
    "the copied layers of a Ahead are trained too: set requires_grad to False",
    r"the head of stage 0 copies layers of \[.*\], the next stage's are \[",
    '"aux_head.objective" is momentum, for heads of cut language models: a head given as Objective has a loss of its',
    'objective momentum copies the first 3 layers of stage 1, which has 2: use fewer stages, or "layers": 2',
    'objective momentum copies the first 3 layers of stage 1, which has 2: use fewer stages, or "layers": 2',
]


def test_what_does_not_fit_is_refused_on_all_ranks(three: list[list[Any]]) -> None:
    for texts in three[len(THREE) + 5]:
        for text, sentence in zip(texts, REFUSALS, strict=True):
            assert re.search(sentence, text), text


@pytest.mark.parametrize(("micro_batches", "delay"), [(1, 3), (2, 2), (8, 2)])
def test_the_least_delay_is_that_of_two_stages(micro_batches: int, delay: int) -> None:
    rule = slow_rule(InterlockingConfig.parse({"aux_head": {"objective": "momentum"}}), micro_batches)
    assert rule is not None and (rule.interval, rule.delay, rule.average) == (10, delay, 0.95)
