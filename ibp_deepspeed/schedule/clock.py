"""The times of the simulator without its record of events: the same programs and the same rules, ten times as fast.

For planning, where thousands of batches are timed and their schedules are known to fit together;
tests/schedule/test_clock.py holds it against :class:`ibp_deepspeed.schedule.simulator.Simulator`.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from ibp_deepspeed.errors import ScheduleError
from ibp_deepspeed.schedule.instructions import (
    BackwardWeight,
    Instruction,
    Link,
    Schedule,
    UpdateInput,
)
from ibp_deepspeed.schedule.simulator import Boundary, Costs


class _Step(NamedTuple):
    """An instruction of a stage as far as time goes."""

    cost: float
    receives: int
    """0: nothing, 1: activations, -1: gradients."""
    sends: int
    begins: bool
    later: int
    """Of a B, where the W stands that may come early from now on; -1: none."""
    is_later: bool
    """Whether it is such a W."""


@dataclass
class _Stage:
    """Where a stage is."""

    steps: list[_Step]
    now: float = 0.0
    position: int = 0
    begun: int = 0
    busy: float = 0.0
    due: dict[int, float] = field(default_factory=dict)
    """Place of a W that may come early → what is left of it."""
    ends: list[float] = field(default_factory=lambda: [0.0])
    """When each batch ended; the first is the start."""
    worked: list[float] = field(default_factory=lambda: [0.0])
    """What it had computed by then."""


@dataclass
class _Wire:
    """Messages of one direction of one boundary."""

    boundary: Boundary
    arrivals: deque[float] = field(default_factory=deque)
    taken: list[float] = field(default_factory=list)
    free: float = 0.0

    def send(self, now: float) -> None:
        self.free = max(now, self.free) + self.boundary.sending
        self.arrivals.append(self.free + self.boundary.latency)


class Clock:
    """Times of a batch that is repeated.

    Args:
        schedules: of each stage, in one batch.
        costs: of each stage.
        boundaries: of the messages, K-1.
        channel_depth: micro-batches a stage may run ahead of the next one (None: unbounded).
        jitter, seed: as of the simulator, with the same draws.

    Attributes:
        executed: instructions so far, of all stages and batches.
        batches: so far.
    """

    def __init__(
        self,
        schedules: Sequence[Schedule],
        costs: Sequence[Costs],
        boundaries: Sequence[Boundary],
        *,
        channel_depth: int | None = None,
        jitter: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._stages = [_Stage(_compiled(s, c)) for s, c in zip(schedules, costs, strict=True)]
        self._down, self._up = [_Wire(b) for b in boundaries], [_Wire(b) for b in boundaries]
        self._depth, self._jitter = channel_depth, jitter
        self._random = [random.Random(f"{seed}/{stage}") for stage in range(len(schedules))]
        self.executed = self.batches = 0

    def run(self, batches: int) -> None:
        """Go on until every stage has ended that many batches since the start.

        Raises:
            ScheduleError: the schedules wait for each other for ever.
        """
        self.batches = batches
        last = len(self._stages) - 1
        sweep = [*range(last + 1), *range(last - 1, 0, -1)]  # activations go down, gradients up
        while any(len(stage.ends) <= batches for stage in self._stages):
            before = self.executed
            for stage in sweep:
                self._advance(stage)
            if self.executed == before:
                raise ScheduleError(f"the stages wait for ever at steps {[stage.position for stage in self._stages]}")

    def batch_time(self, warm_up: int) -> float:
        """Mean of the batches after the first ``warm_up``, of the stage that takes longest."""
        return max((s.ends[self.batches] - s.ends[warm_up]) / (self.batches - warm_up) for s in self._stages)

    def idle(self, warm_up: int) -> list[float]:
        """Share of these batches that each stage waited."""
        whole = self.batch_time(warm_up) * (self.batches - warm_up)
        return [1 - (s.worked[self.batches] - s.worked[warm_up]) / whole if whole else 0.0 for s in self._stages]

    def _advance(self, number: int) -> None:
        """Execute a stage's instructions until it has to wait for another stage."""
        stage = self._stages[number]
        while len(stage.ends) <= self.batches:
            step = stage.steps[stage.position]
            now = stage.now
            if step.receives:
                wire = self._down[number - 1] if step.receives > 0 else self._up[number]
                if not wire.arrivals:
                    return
                ready = wire.arrivals.popleft()
                if stage.due and ready > now:
                    now = _fill(stage, ready)
                now = max(now, ready)
                wire.taken.append(now)
            elif step.begins and self._depth is not None and number < len(self._stages) - 1:
                needed, taken = stage.begun - self._depth, self._down[number].taken
                if needed >= len(taken):
                    return
                if needed >= 0:
                    now = max(now, taken[needed])
            stage.now = now
            self._execute(number, stage, step)

    def _execute(self, number: int, stage: _Stage, step: _Step) -> None:
        rest = stage.due.pop(stage.position, None) if step.is_later else None
        if rest is None:
            rest = self._drawn(number, step.cost)
        stage.now += rest
        stage.busy += rest
        if step.later >= 0:
            stage.due[step.later] = self._drawn(number, stage.steps[step.later].cost)
        if step.sends:
            (self._down[number] if step.sends > 0 else self._up[number - 1]).send(stage.now)
        stage.begun += step.begins
        self.executed += 1
        stage.position += 1
        if stage.position == len(stage.steps):
            stage.position = 0
            stage.ends.append(stage.now)
            stage.worked.append(stage.busy)

    def _drawn(self, number: int, cost: float) -> float:
        return cost * self._random[number].lognormvariate(0.0, self._jitter) if cost and self._jitter else cost


def _fill(stage: _Stage, until: float) -> float:
    """Work off W that are due, the oldest first, until a message comes; returns the time then."""
    now = stage.now
    for place, rest in stage.due.items():
        if now >= until:
            break
        worked = min(rest, until - now)
        stage.due[place] = rest - worked
        stage.busy += worked
        now = now + rest if worked == rest else until
    return now


def _compiled(schedule: Schedule, costs: Costs) -> list[_Step]:
    """The instructions that take time or exchange messages."""
    kept = [i for i in chain.from_iterable(schedule.steps()) if isinstance(i, Instruction) and _counts(i)]
    places = {i.micro_batch: place for place, i in enumerate(kept) if isinstance(i, BackwardWeight)}
    prices = {kind: sum(getattr(costs, name) for name in kind.costs) for kind in {type(i) for i in kept}}
    put_off = {places[i.micro_batch] for i in kept if isinstance(i, UpdateInput)}
    return [
        _Step(
            prices[type(i)],
            _sign(i.receives),
            _sign(i.sends),
            i.begins,
            places[i.micro_batch] if isinstance(i, UpdateInput) else -1,
            place in put_off,
        )
        for place, i in enumerate(kept)
    ]


def _counts(instruction: Instruction) -> bool:
    return bool(instruction.costs or instruction.receives or instruction.sends or instruction.begins)


def _sign(link: Link | None) -> int:
    return 0 if link is None else link.value
