"""Execute the schedules of all stages together, without devices: FIFO channels, bounded depth, a clock a stage.

It proves that a set of schedules fits together (:mod:`ibp_deepspeed.schedule.validate`) and, given costs and latencies,
tells how long a batch takes (:mod:`ibp_deepspeed.schedule.predict`). Each stage is a sequential program and each
channel is first in, first out, so the times do not depend on the order in which the stages are advanced. One thing a
stage does out of its order: while it waits for a message, it works off weight gradients that are due, and leaves off
when the message comes (the engine does so layer by layer).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

from ibp_deepspeed.errors import ScheduleError
from ibp_deepspeed.schedule.instructions import (
    BackwardWeight,
    Instruction,
    Link,
    PipeInstruction,
    Schedule,
    UpdateInput,
    message_of,
)

Program = list[PipeInstruction]


@dataclass(frozen=True)
class Costs:
    """Time of each piece of a stage's work in a micro-batch, in any unit.

    ``head`` is an auxiliary head's (the model's own belongs to the last stage's layers), ``borrowed_gradient`` that of
    borrowed layers' input gradient, ``latency`` one message's; ``at_once`` is what B and W in one piece take
    beyond both.
    """

    forward: float = 1.0
    input_gradient: float = 1.0
    weight_gradient: float = 1.0
    head: float = 0.1
    borrowed_gradient: float = 0.0
    latency: float = 0.0
    at_once: float = 0.0

    @property
    def plain(self) -> float:
        """F, and B and W at once."""
        return self.forward + self.input_gradient + self.weight_gradient + self.at_once

    def of(self, instruction: PipeInstruction) -> float:
        """Time that an instruction computes."""
        return sum(getattr(self, name) for name in instruction.costs) if isinstance(instruction, Instruction) else 0.0

    def scaled(self, factor: float) -> Costs:
        """Of a stage that takes ``factor`` times as long; messages don't."""
        pieces = ("forward", "input_gradient", "weight_gradient", "head", "borrowed_gradient", "at_once")
        return replace(self, **{piece: factor * getattr(self, piece) for piece in pieces})


@dataclass(frozen=True)
class Boundary:
    """What a message costs between two stages, in the unit of the costs.

    Attributes:
        latency: from the end of its sending to its arrival.
        sending: how long it occupies the link, its size over the bandwidth; messages of one direction wait for each
            other, those of the two directions don't. A stage computes on meanwhile.
    """

    latency: float = 0.0
    sending: float = 0.0


@dataclass(frozen=True)
class Event:
    """One executed instruction: ``index`` counts the stage's instructions over all batches; ``partly``: the rest of it
    follows."""

    stage: int
    index: int
    instruction: PipeInstruction
    start: float
    end: float
    partly: bool = False


@dataclass
class _Channel:
    """Messages of one direction of one boundary: what they are and when they arrive."""

    sent: deque[tuple[tuple[int, int | None], float]] = field(default_factory=deque)
    taken_at: list[float] = field(default_factory=list)
    free_at: float = 0.0


class Simulator:
    """Execute batches that follow each other without a gap, each of K programs.

    Args:
        batches: the K schedules of each batch, by stage.
        channel_depth: micro-batches a stage may run ahead of the next stage (None: unbounded).
        costs: times of the work, for all stages alike or of each.
        boundaries: of the messages, K-1 (None: ``latency`` of the costs of the stage that sends).
        jitter: standard deviation of the logarithm of a factor that each piece of work takes, drawn by ``seed``.
        seed: of these draws, for each stage and each of its instructions.
        streaming: False holds every stage at a batch's end until all stages reach it.

    Attributes:
        programs: the instructions of each stage, over all batches.
        bounds: by stage, where each batch begins in its program, and the program's length.
        events: what was executed.
    """

    def __init__(
        self,
        batches: Sequence[Sequence[Schedule]],
        *,
        channel_depth: int | None = None,
        costs: Costs | Sequence[Costs] | None = None,
        boundaries: Sequence[Boundary] | None = None,
        jitter: float = 0.0,
        seed: int = 0,
        streaming: bool = True,
    ) -> None:
        self.stages = len(batches[0])
        laid_out = [_lay_out(schedules) for schedules in zip(*batches, strict=True)]
        self.programs: list[Program] = [program for program, _ in laid_out]
        self.bounds: list[list[int]] = [bounds for _, bounds in laid_out]
        self.channel_depth = channel_depth
        given = costs or Costs()
        self.costs = [given] * self.stages if isinstance(given, Costs) else list(given)
        self._boundaries = boundaries or [Boundary(costs.latency) for costs in self.costs]
        self._jitter, self._random = jitter, [random.Random(f"{seed}/{stage}") for stage in range(self.stages)]
        self.streaming = streaming
        self.events: list[Event] = []
        self._clock = [0.0] * self.stages
        self._position = [0] * self.stages
        self._batch = [0] * self.stages
        self._begun = [0] * self.stages
        self._due: list[dict[int, float]] = [
            {} for _ in range(self.stages)
        ]  # places of W that may come early → its rest
        self._channels = {link: [_Channel() for _ in range(self.stages)] for link in Link}  # by their senders
        self._batch_ends: list[dict[int, float]] = [{} for _ in batches]

    def run(self) -> list[Event]:
        """Execute to the end.

        Raises:
            ScheduleError: a receive that meets another message than it expects, a deadlock, or messages left over.
        """
        progress = True
        while progress:
            progress = False
            for stage in range(self.stages):
                while self._position[stage] < len(self.programs[stage]) and self._advance(stage):
                    progress = True
        self._check_finished()
        return self.events

    def _fill_the_gap(self, stage: int, until: float) -> None:
        """Execute W that are due, the oldest first, while a stage waits."""
        for position, rest in list(self._due[stage].items()):
            start = self._clock[stage]
            if start >= until:
                return
            end = min(start + rest, until)
            self._due[stage][position] = start + rest - end
            partly = end < start + rest
            self.events.append(Event(stage, position, self.programs[stage][position], start, end, partly))
            self._clock[stage] = end

    def _advance(self, stage: int) -> bool:
        """Execute the next instruction of a stage; False if it has to wait for another stage."""
        position = self._position[stage]
        instruction = self.programs[stage][position]
        ready = self._ready_time(stage, instruction)
        if ready is None:
            return False
        if self._source(stage, instruction) is not None:
            self._fill_the_gap(stage, ready)
        start = max(self._clock[stage], ready)
        rest = self._due[stage].pop(position, None)  # of a W
        end = start + (self._cost(stage, instruction) if rest is None else rest)
        self._exchange(stage, instruction, start, end)
        if rest is None or end > start:  # else it has come early as a whole
            self.events.append(Event(stage, position, instruction, start, end))
        self._clock[stage] = end
        self._position[stage] = position + 1
        if position + 1 == self.bounds[stage][self._batch[stage] + 1]:
            self._batch_ends[self._batch[stage]][stage] = end
            self._batch[stage] += 1
        return True

    def _ready_time(self, stage: int, instruction: PipeInstruction) -> float | None:
        """When everything that the instruction waits for is there; None while it is not known."""
        batch = self._batch[stage]
        if batch and not self.streaming and self._position[stage] == self.bounds[stage][batch]:
            ends = self._batch_ends[batch - 1]
            return max(ends.values()) if len(ends) == self.stages else None
        if isinstance(instruction, Instruction) and instruction.begins:
            return self._credit_time(stage)
        channel = self._source(stage, instruction)
        if channel is None:
            return 0.0
        if not channel.sent:
            return None
        self._check_head(stage, instruction, channel)
        return channel.sent[0][1]

    def _credit_time(self, stage: int) -> float | None:
        """When the next stage had received enough for this stage's next forward pass."""
        if self.channel_depth is None or stage == self.stages - 1:
            return 0.0
        needed = self._begun[stage] + 1 - self.channel_depth
        taken_at = self._channels[Link.ACTIVATIONS][stage].taken_at
        if needed <= 0:
            return 0.0
        return taken_at[needed - 1] if len(taken_at) >= needed else None

    def _source(self, stage: int, instruction: PipeInstruction) -> _Channel | None:
        """The channel that an instruction takes a message from."""
        link = instruction.receives if isinstance(instruction, Instruction) else None
        return self._channels[link][stage - link.value] if link is not None else None

    def _check_head(self, stage: int, instruction: PipeInstruction, channel: _Channel) -> None:
        expected, head = message_of(instruction), channel.sent[0][0]
        if head != expected:
            self.fail(
                stage,
                self._position[stage],
                f"expects (micro-batch, loss) {expected}, the channel holds {head}",
            )

    def _exchange(self, stage: int, instruction: PipeInstruction, start: float, end: float) -> None:
        if not isinstance(instruction, Instruction):
            return
        if isinstance(instruction, UpdateInput):
            place = self._place_of_weight_gradient(stage, instruction.micro_batch)
            self._due[stage][place] = self._cost(stage, self.programs[stage][place])
        if instruction.sends is not None:
            channel = self._channels[instruction.sends][stage]
            boundary = self._boundaries[stage if instruction.sends is Link.ACTIVATIONS else stage - 1]
            channel.free_at = max(end, channel.free_at) + boundary.sending
            channel.sent.append((message_of(instruction), channel.free_at + boundary.latency))
        self._begun[stage] += instruction.begins
        source = self._source(stage, instruction)
        if source is not None:
            source.sent.popleft()
            source.taken_at.append(start)

    def _cost(self, stage: int, instruction: PipeInstruction) -> float:
        cost = self.costs[stage].of(instruction)
        return cost * self._random[stage].lognormvariate(0.0, self._jitter) if cost and self._jitter else cost

    def _place_of_weight_gradient(self, stage: int, micro_batch: int) -> int:
        """Where in its program a stage computes W of the micro-batch whose B it is at, at the latest."""
        program, position = self.programs[stage], self._position[stage]
        for place in range(position + 1, self.bounds[stage][self._batch[stage] + 1]):
            instruction = program[place]
            if isinstance(instruction, BackwardWeight) and instruction.micro_batch == micro_batch:
                return place
        self.fail(stage, position, "computes an input gradient whose weight gradients nobody computes")

    def _check_finished(self) -> None:
        for stage, program in enumerate(self.programs):
            if self._position[stage] < len(program):
                self.fail(stage, self._position[stage], "waits for ever: a deadlock, or a message nobody sends")
        for stage in range(self.stages):
            for name, link in (("an activation", Link.ACTIVATIONS), ("a gradient", Link.GRADIENTS)):
                channel = self._channels[link][stage]
                if channel.sent:
                    text = f"sent {name} (micro-batch, loss) {channel.sent[0][0]} that nobody receives"
                    self.fail(stage, len(self.programs[stage]) - 1, text)

    def fail(self, stage: int, index: int, message: str) -> NoReturn:
        """Raise with the grid, the faulty step marked."""
        instruction = self.programs[stage][index]
        grid = format_grid(self.events, self.stages, fault=(stage, index, instruction))
        raise ScheduleError(f"stage {stage}, step {index}, {instruction}: {message}\n{grid}")


def _lay_out(schedules: Sequence[Schedule]) -> tuple[Program, list[int]]:
    """One stage's instructions of all batches, one after the other, and where each batch begins and the last ends."""
    distinct = {id(schedule): schedule for schedule in schedules}
    written = {key: [i for step in schedule.steps() for i in step] for key, schedule in distinct.items()}
    program: Program = []
    bounds = [0]
    for schedule in schedules:
        program += written[id(schedule)]
        bounds.append(len(program))
    return program, bounds


def short_name(instruction: PipeInstruction) -> str:
    """``F2``: forward of micro-batch 2; ``L2.1``: head and loss 1; ``B2.3``: input gradient of loss 3; ``Q2.1``: the
    same through borrowed layers; ``BW2``: backward pass."""
    letter = getattr(instruction, "letter", "") or type(instruction).__name__
    loss = getattr(instruction, "loss", None)
    return f"{letter}{getattr(instruction, 'micro_batch', '')}" + ("" if loss is None else f".{loss}")


def format_grid(events: Sequence[Event], stages: int, fault: tuple[int, int, PipeInstruction] | None = None) -> str:
    """The executed computations as a grid of stages × time, one column for each time at which one starts.

    ``fault`` (stage, index, instruction) is marked ``>>…<<``, at its place if it was executed, else at the row's end.
    """
    faulty_place = fault[:2] if fault is not None else None
    shown = [e for e in events if getattr(e.instruction, "letter", "") or (e.stage, e.index) == faulty_place]
    columns = {start: i for i, start in enumerate(sorted({round(e.start, 6) for e in shown}))}
    rows = [[[] for _ in range(len(columns) + 1)] for _ in range(stages)]  # type: list[list[list[str]]]
    marked = False
    for event in shown:
        faulty = (event.stage, event.index) == faulty_place
        marked = marked or faulty
        name = short_name(event.instruction)
        rows[event.stage][columns[round(event.start, 6)]].append(f">>{name}<<" if faulty else name)
    if fault is not None and not marked:
        rows[fault[0]][-1].append(f">>{short_name(fault[2])}<<")
    cells = [[",".join(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns) + 1)]
    return "\n".join(
        f"stage {k} | " + " ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for k, row in enumerate(cells)
    )
