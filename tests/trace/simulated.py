"""Recordings whose times are known, because a simulation made them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ibp_deepspeed.config.interlocking import InterlockingConfig
from ibp_deepspeed.schedule.instructions import BackwardWeight, Instruction
from ibp_deepspeed.schedule.simulator import Boundary, Costs, Event, Simulator
from ibp_deepspeed.schedule.validate import validated_timeline
from ibp_deepspeed.strategy.timeline import Timeline
from ibp_deepspeed.trace.spans import WEIGHTS, Process, Recording, Span


def recording(
    block: dict[str, Any],
    costs: Sequence[Costs],
    micro_batches: int = 4,
    latency: float = 0.0,
    warm_up: int = 30,
    batches: int = 2,
    frozen: Sequence[int] = (),
) -> Recording:
    """Of ``batches`` batches after ``warm_up`` of them: as the engine would record the simulated run."""
    stages = len(costs)
    timeline = Timeline(InterlockingConfig.parse(block), stages, micro_batches, True, frozen)
    schedules = validated_timeline(timeline)[timeline.at(0)]
    simulator = Simulator(
        [schedules] * (warm_up + batches),
        channel_depth=timeline.channel_depth(),
        costs=costs,
        boundaries=[Boundary(latency)] * (stages - 1),
    )
    events: list[list[Event]] = [[] for _ in range(stages)]
    for event in simulator.run():
        events[event.stage].append(event)
    spans = [span for stage, row in enumerate(events) for span in _spans(row, simulator.bounds[stage], warm_up)]
    return Recording(
        stages=stages,
        micro_batches=micro_batches,
        first=warm_up + 1,
        last=warm_up + batches,
        interlocking=block,
        has_aux_heads=True,
        device="cpu",
        processes=[Process(stage, stage, 0, "here") for stage in range(stages)],
        spans=spans,
        frozen=frozen,
    )


def _spans(events: Sequence[Event], bounds: Sequence[int], warm_up: int) -> list[Span]:
    """A stage's; a receive lasts from when the stage is there to when it has its message, W within it included."""
    found: list[Span] = []
    began = before = 0.0
    for event in events:
        instruction = event.instruction
        batch = sum(event.index >= bound for bound in bounds[1:-1]) + 1
        known = isinstance(instruction, Instruction)
        early = isinstance(instruction, BackwardWeight)
        receives = known and instruction.receives is not None
        kind = WEIGHTS if early else type(instruction).__name__
        start = began if receives else event.start
        if batch > warm_up:
            micro, loss = getattr(instruction, "micro_batch", -1), getattr(instruction, "loss", None)
            found.append(Span(event.stage, kind, batch, micro, loss, start, event.end))
        before = event.end
        began = began if early and _comes_early(events, event) else before
    return sorted(found, key=lambda span: (span.start, -span.end))


def _comes_early(events: Sequence[Event], event: Event) -> bool:
    """Whether weight gradients fill a gap: the next other event is of a smaller place in the program."""
    later = (e for e in events[events.index(event) + 1 :] if not isinstance(e.instruction, BackwardWeight))
    following = next(later, None)
    return following is not None and following.index < event.index
