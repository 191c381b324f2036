"""Predict time, idle share and memory of a schedule from the cost of each piece of work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ibp_deepspeed.check import checked_schedules
from ibp_deepspeed.schedule import ForwardPass, InterlockedBackward
from ibp_deepspeed.strategy import Strategy
from ibp_deepspeed.walk import Costs, Event, Walk


@dataclass(frozen=True)
class Prediction:
    """What a batch costs in the steady state.

    Attributes:
        batch_time: time a batch, in the unit of the costs.
        micro_batch_time: the same divided by M.
        idle: idle share of each stage, 0 … 1.
        live: the most micro-batches that each stage held at once.
        limit: time a micro-batch of the busiest stage's work alone: no schedule of this work is faster.
    """

    batch_time: float
    micro_batch_time: float
    idle: list[float]
    live: list[int]
    limit: float


def simulate(
    strategy: Strategy,
    micro_batches: int,
    costs: Costs | None = None,
    *,
    channel_depth: int | None = None,
    streaming: bool = True,
    batches: int = 0,
) -> Prediction:
    """Walk enough batches for a steady state (or ``batches`` of them) and measure the last half."""
    costs = costs or Costs()
    depth = strategy.channel_depth(micro_batches, channel_depth)
    schedules = checked_schedules(strategy, micro_batches, depth)
    batches = batches or 2 * (strategy.stages * (2 + depth // micro_batches) + 4)
    walk = Walk(schedules, channel_depth=depth, costs=costs, batches=batches, streaming=streaming)
    walk.run()
    rows = [[e for e in walk.events if e.stage == k] for k in range(strategy.stages)]
    half = batches // 2
    spans, busy = [], []
    for row, length in zip(rows, walk.lengths, strict=True):
        spans.append((row[-1].end - row[half * length - 1].end) / (batches - half))
        busy.append(sum(e.end - e.start for e in row[:length]))
    batch_time = max(spans)
    return Prediction(
        batch_time=batch_time,
        micro_batch_time=batch_time / micro_batches,
        idle=[1 - b / batch_time for b in busy],
        live=[_most_live(row) for row in rows],
        limit=max(busy) / micro_batches,
    )


def _most_live(events: Sequence[Event]) -> int:
    live = most = 0
    for event in events:
        live += isinstance(event.instruction, ForwardPass) - isinstance(event.instruction, InterlockedBackward)
        most = max(most, live)
    return most
