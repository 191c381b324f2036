"""A report of recordings whose costs, waits and bubbles are known."""

from __future__ import annotations

from typing import Any

import pytest

from ibp_deepspeed.schedule.simulator import Costs
from ibp_deepspeed.trace.report import analyse
from ibp_deepspeed.trace.spans import CREDIT, Process, Recording, Span, own_seconds
from tests.trace.simulated import recording

STRATEGIES: dict[str, dict[str, Any]] = {
    "local": {"strategy": "local"},
    "pairwise": {"strategy": "pairwise"},
    "window": {"strategy": "nwise", "width": 3, "mode": "window"},
    "borrowed": {"strategy": "local", "aux_head": {"borrow": 1}},
    "backpropagation": {"strategy": "global", "exits": 4},
    "1F1B": {"strategy": "global", "exits": 4, "backward": "fused"},
}
COSTS = [
    Costs(1.0, 0.5, 0.5, 0.25, 0.125),
    Costs(1.5, 1.0, 1.0, 0.25, 0.125),
    Costs(1.0, 1.0, 0.75, 0.25, 0.125),
    Costs(1.0, 1.25, 1.0, 0.0, 0.125),
]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("latency", [0.0, 0.5])
def test_what_was_simulated_is_found_again(name: str, latency: float) -> None:
    """Bubbles are those of the simulation, so is the prediction, and pieces and latency are what they were."""
    report = analyse(recording(STRATEGIES[name], COSTS, latency=latency))
    assert report.batch_time == pytest.approx(report.predicted.batch_time, rel=0.02)
    for stage, idle in zip(report.stages, report.predicted.idle, strict=True):
        assert stage.bubble == pytest.approx(idle, abs=0.02)
        waited = sum(wait.seconds for wait in stage.waits)
        assert waited + sum(stage.computing.values()) + stage.between == pytest.approx(stage.seconds)
        assert all(wait.cause in ("activations", "gradients", "credit") for wait in stage.waits)
    for found, given in zip(report.costs, COSTS, strict=True):
        assert found.forward == pytest.approx(given.forward)
        both = given.input_gradient + given.weight_gradient
        assert found.input_gradient + found.weight_gradient == pytest.approx(both)
    latencies = [boundary.latency for boundary in report.boundaries]  # 0: nobody has waited for a message
    assert max(latencies) == pytest.approx(latency) and all(x == pytest.approx(latency) or x == 0 for x in latencies)


def test_stages_with_nothing_to_train_are_found_again() -> None:
    """The second passes gradients on, the last trains nothing: what was recorded is predicted with that."""
    report = analyse(recording({"strategy": "global"}, COSTS, frozen=(1, 3)))
    assert report.batch_time == pytest.approx(report.predicted.batch_time, rel=0.02)
    assert report.costs[1].input_gradient == pytest.approx(COSTS[1].input_gradient)
    assert report.costs[1].weight_gradient == report.costs[3].weight_gradient == 0
    assert "BW" not in report.stages[1].computing and "W" not in report.stages[1].computing


def test_a_wait_names_its_cause_its_peer_and_its_longest() -> None:
    """A slow last stage: in local learning the others wait until it has received enough, in backpropagation for its
    gradients."""
    slow = [*COSTS[:3], Costs(5.0, 5.0, 5.0)]
    report = analyse(recording(STRATEGIES["1F1B"], slow))
    for stage in report.stages[:3]:
        assert (stage.waits[0].cause, stage.waits[0].peer) == ("gradients", stage.stage + 1)
        assert stage.waits[0].longest.kind == "RecvGrad"
    assert report.overlap == pytest.approx(1.0)


def spans() -> list[Span]:
    return [
        Span(0, "LoadMicroBatch", 1, 0, None, 0.0, 1.0),
        Span(0, "ForwardPass", 1, 0, None, 1.0, 5.0),
        Span(0, CREDIT, 1, 0, None, 1.0, 3.0),
        Span(0, "ReduceGrads", 1, -1, None, 6.0, 7.0),
    ]


def test_time_of_a_span_is_without_that_of_spans_within() -> None:
    assert [seconds for _, seconds in own_seconds(spans())] == [1.0, 2.0, 2.0, 1.0]


@pytest.mark.parametrize("replicas", [1, 2])
def test_every_second_is_somewhere(replicas: int) -> None:
    """Waiting for other replicas counts where there are some; what no instruction covers is between batches."""
    processes = [Process(0, 0, 0, "here"), Process(1, 0, 1, "there")][:replicas]
    report = analyse(Recording(1, 1, 1, 1, {"strategy": "local"}, True, "cpu", processes, spans()))
    stage = report.stages[0]
    assert stage.computing == {"F": 2.0} and stage.between == 1.0 and stage.seconds == 7.0
    causes = {wait.cause: wait.seconds for wait in stage.waits}
    assert causes == {"credit": 2.0} | ({"replicas": 1.0} if replicas == 2 else {})
    assert stage.other == {"LoadMicroBatch": 1.0} | ({"ReduceGrads": 1.0} if replicas == 1 else {})
    assert report.overlap is None
