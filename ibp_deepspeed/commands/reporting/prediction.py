"""What the schedule promises, beside what a run measured of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ibp_deepspeed import measures
from ibp_deepspeed.commands.reporting.history import History
from ibp_deepspeed.commands.reporting.record import RunRecord
from ibp_deepspeed.config.deepspeed import resolve_interlocking
from ibp_deepspeed.schedule.predict import Prediction, predict_timeline
from ibp_deepspeed.schedule.simulator import Costs
from ibp_deepspeed.strategy.timeline import Timeline

_MOST_WORK = 4096  # stages times micro-batches that are simulated within seconds


@dataclass(frozen=True)
class StageComparison:
    """Shares of time that a stage waits, 0 … 1.

    Attributes:
        stage: its number.
        by_operations: predicted before the run, each stage's work being its counted operations.
        by_measured_work: predicted with the time that each stage computed, all of it.
        measured: by the run.
    """

    stage: int
    by_operations: float
    by_measured_work: float
    measured: float


@dataclass(frozen=True)
class Comparison:
    """Of a run.

    Attributes:
        stages: of each.
        batch_time: predicted from measured work, seconds.
        measured_batch_time: of the slowest stage, seconds.
    """

    stages: list[StageComparison]
    batch_time: float
    measured_batch_time: float


def compare(record: RunRecord, history: History) -> Comparison | None:
    """Prediction and measurement; None where stages did not wait for each other, where nothing was measured yet, or
    where the schedule is too large to be simulated in passing.

    Messages are taken to cost nothing: what they add is part of the difference.
    """
    waits = [history.mean(k, measures.WAITING) for k in range(record.stages)]
    times = [history.batch_time(k) for k in range(record.stages)]
    if record.processes == 1 or record.stages * record.micro_batches > _MOST_WORK:
        return None
    if any(value is None for value in (*waits, *times)):
        return None
    measured, seconds = [w or 0.0 for w in waits], [t or 0.0 for t in times]
    costs = [Costs(**cost) for cost in record.costs]
    timeline = _timeline(record)
    before = predict_timeline(timeline, costs)
    busy = [(1 - waiting) * time for waiting, time in zip(measured, seconds, strict=True)]
    after = predict_timeline(timeline, _as_measured(costs, before, busy))
    rows = zip(before.idle, after.idle, measured, strict=True)
    stages = [StageComparison(k, *row) for k, row in enumerate(rows)]
    return Comparison(stages, after.batch_time, max(seconds))


def _timeline(record: RunRecord) -> Timeline:
    interlocking = resolve_interlocking(record.ds_config)
    heads = interlocking.aux_head is not None
    return Timeline(interlocking, record.stages, record.micro_batches, aux_heads=heads, frozen=record.frozen)


def _as_measured(costs: list[Costs], before: Prediction, busy: list[float]) -> list[Costs]:
    """Each stage's pieces of work in the proportions of their operations, so long that together they take the seconds
    of a batch in which it did not wait (the optimizer's step, and reading data, among them)."""
    scaled = []
    for cost, idle, seconds in zip(costs, before.idle, busy, strict=True):
        factor = seconds / ((1 - idle) * before.batch_time)
        pieces = ("forward", "input_gradient", "weight_gradient", "head", "borrowed_gradient")
        scaled.append(replace(cost, **{piece: getattr(cost, piece) * factor for piece in pieces}))
    return scaled
