"""Predict time, idle share and memory of a schedule from the cost of each piece of work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ibp_deepspeed.schedule.instructions import Instruction
from ibp_deepspeed.schedule.simulator import Costs, Event, Simulator
from ibp_deepspeed.schedule.validate import validated_schedules, validated_timeline
from ibp_deepspeed.strategy.strategy import Strategy
from ibp_deepspeed.strategy.timeline import BatchStrategy, Timeline


@dataclass(frozen=True)
class Prediction:
    """What a batch costs in the steady state, or in the mean over a timeline.

    Attributes:
        batch_time: time a batch, in the unit of the costs.
        micro_batch_time: the same divided by M.
        idle: idle share of each stage, 0 … 1.
        in_flight: the most micro-batches that each stage held at once.
        limit: time a micro-batch of the busiest stage's work alone: no schedule of this work is faster.
    """

    batch_time: float
    micro_batch_time: float
    idle: list[float]
    in_flight: list[int]
    limit: float


def predict(
    strategy: Strategy,
    micro_batches: int,
    costs: Costs | None = None,
    *,
    channel_depth: int | None = None,
    streaming: bool = True,
    batches: int = 0,
) -> Prediction:
    """Simulate enough batches for a steady state (or ``batches`` of them) and measure the last half."""
    batch_strategy = BatchStrategy.uniform(strategy, micro_batches)
    depth = batch_strategy.channel_depth(channel_depth)
    batches = batches or 2 * settling_batches(batch_strategy, depth)
    simulator = Simulator(
        [validated_schedules(batch_strategy, depth)] * batches,
        channel_depth=depth,
        costs=costs,
        streaming=streaming,
    )
    return measure(simulator, batches // 2, micro_batches)


def predict_timeline(
    timeline: Timeline,
    costs: Costs | Sequence[Costs] | None = None,
    *,
    batches: int = 0,
    streaming: bool = True,
) -> Prediction:
    """The mean over batches 0, 1, … of a timeline, entered by a pipeline that is in motion already.

    Args:
        timeline: with its own channel depth.
        costs: times of the work, of each stage or of all alike.
        batches: how many, rounded up to whole periods of ``global_interval`` (0: enough for a steady state).
        streaming: as in the configuration.
    """
    depth, period = timeline.channel_depth(), timeline.period
    settling = settling_batches(timeline.at(0), depth)
    valid = validated_timeline(timeline)
    warm_up = math.ceil(settling / period) * period
    measured = math.ceil((batches or settling) / period) * period
    numbers = [*(b % period for b in range(warm_up)), *range(measured)]
    simulator = Simulator(
        [valid[timeline.at(number)] for number in numbers],
        channel_depth=depth,
        costs=costs,
        streaming=streaming,
    )
    return measure(simulator, warm_up, len(timeline.at(0)))


def settling_batches(batch_strategy: BatchStrategy, depth: int) -> int:
    """Batches after which the start of a run is forgotten: the pipeline and its channels are full."""
    return batch_strategy.stages * (2 + depth // len(batch_strategy)) + 4


def measure(simulator: Simulator, warm_up: int, micro_batches: int) -> Prediction:
    """Execute a simulation and take the means over the batches after the first ``warm_up``."""
    events: list[list[Event]] = [[] for _ in range(simulator.stages)]
    for event in simulator.run():
        events[event.stage].append(event)
    spans, busy, in_flight = [], [], []
    for row, bounds in zip(events, simulator.bounds, strict=True):
        count, first = len(bounds) - 1 - warm_up, bounds[warm_up]
        measured = [e for e in row if e.index >= first]
        start = max((e.end for e in row if e.index < first), default=0.0)
        spans.append((row[-1].end - start) / count)
        busy.append(sum(e.end - e.start for e in measured) / count)
        in_flight.append(_most_in_flight(row))
    batch_time = max(spans)
    return Prediction(
        batch_time=batch_time,
        micro_batch_time=batch_time / micro_batches,
        idle=[1 - b / batch_time for b in busy],
        in_flight=in_flight,
        limit=max(busy) / micro_batches,
    )


def _most_in_flight(events: Sequence[Event]) -> int:
    count = most = 0
    for event in events:
        if isinstance(event.instruction, Instruction) and not event.partly:
            count += event.instruction.begins - event.instruction.ends
        most = max(most, count)
    return most
