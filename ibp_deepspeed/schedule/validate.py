"""Proof, without devices, that the schedules of all stages compute what the strategies say.

Nothing here knows how a schedule was made: any objects with ``steps()`` are validated.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from ibp_deepspeed.schedule.generator import InterlockedTrainSchedule
from ibp_deepspeed.schedule.instructions import (
    AuxLoss,
    Instruction,
    Link,
    OptimizerStep,
    PipeInstruction,
    ReduceGrads,
    Schedule,
    Value,
)
from ibp_deepspeed.schedule.simulator import Simulator
from ibp_deepspeed.strategy.strategy import StageStrategy
from ibp_deepspeed.strategy.timeline import BatchStrategy, Timeline

ScheduleMaker = Callable[[BatchStrategy, int], InterlockedTrainSchedule]
"""(the strategies of a batch, stage) → what the stage does."""


def validated_timeline(
    timeline: Timeline, make: ScheduleMaker = InterlockedTrainSchedule.for_batch
) -> dict[BatchStrategy, list[InterlockedTrainSchedule]]:
    """The schedules of all K stages for every batch that a timeline can have, validated one by one and in pairs.

    Raises:
        ScheduleError: what is wrong, with the grid of stages × time.
        ConfigError: the configured channel depth is too small.
    """
    depth = timeline.channel_depth()
    valid = {batch_strategy: validated_schedules(batch_strategy, depth, make) for batch_strategy in timeline.distinct()}
    for pair in itertools.permutations(valid.values(), 2):
        Simulator(pair, channel_depth=depth).run()
    return valid


def validated_schedules(
    batch_strategy: BatchStrategy,
    channel_depth: int | None = None,
    make: ScheduleMaker = InterlockedTrainSchedule.for_batch,
) -> list[InterlockedTrainSchedule]:
    """The schedules of all K stages, validated (see :func:`validate`); the engine runs its own of these objects.

    Raises:
        ScheduleError: what is wrong, with the grid of stages × time.
        ConfigError: the depth is too small.
    """
    schedules = [make(batch_strategy, k) for k in range(batch_strategy.stages)]
    validate(schedules, batch_strategy, batch_strategy.channel_depth(channel_depth))
    return schedules


def validate(schedules: Sequence[Schedule], batch_strategy: BatchStrategy, channel_depth: int | None) -> None:
    """Check the schedules of K stages, however they were made, against the strategies of a batch.

    Proved: every send meets its receive in order on its channel; no deadlock with channels of this depth, also from
    batch to batch; everything that is used is there; every trunk gets exactly one update gradient a micro-batch, made
    of the losses that the micro-batch's strategy names, and none if it has nothing to train; the optimizer steps once,
    after all of them; micro-batches in flight stay within the bound.

    Raises:
        ScheduleError: what is wrong, with the grid of stages × time.
    """
    Simulator([schedules] * 2, channel_depth=channel_depth).run()
    simulator = Simulator([schedules], channel_depth=channel_depth)
    simulator.run()
    for stage in range(batch_strategy.stages):
        _StageCheck(simulator, batch_strategy, stage).run()


class _StageCheck:
    """Symbolic execution of one stage: which values exist when an instruction uses them."""

    def __init__(self, simulator: Simulator, batch_strategy: BatchStrategy, stage: int) -> None:
        self.simulator, self.batch_strategy, self.stage = simulator, batch_strategy, stage
        self.program = simulator.programs[stage]
        self.tables = [StageStrategy.of(strategy, stage) for strategy in batch_strategy.strategies]
        self.bound = batch_strategy.most_in_flight(stage)
        self.there: set[Value] = set()
        self.made: set[Value] = set()
        self.buffers: dict[int, int] = {}  # buffer → the micro-batch in flight that has it
        self.ended: list[int] = []
        self.reductions = self.steps = 0
        self.index = 0

    def run(self) -> None:
        """Execute all instructions, then compare the totals with the strategies."""
        for index, instruction in enumerate(self.program):
            self.index = index
            self._require(self.steps == 0, "after the optimizer step")
            if isinstance(instruction, Instruction):
                self._execute(instruction)
            else:
                self._end_of_batch(instruction)
        self._require(self.steps == 1, f"the optimizer steps {self.steps} times")
        first, last = self.batch_strategy[0], self.batch_strategy.stages - 1
        heads = [loss for loss in first.placement.losses_at(self.stage) if loss < last]
        wanted = [(m, loss) for m in range(len(self.batch_strategy)) for loss in heads]
        self._compare("computes the heads' losses", [i for i in self.program if isinstance(i, AuxLoss)], wanted)
        crossing = [(m, loss) for m, table in enumerate(self.tables) for loss in table.crosses]
        sends = [i for i in self.program if isinstance(i, Instruction) and i.sends is Link.GRADIENTS]
        self._compare("sends gradients", sends, crossing)

    def _execute(self, instruction: Instruction) -> None:
        table = self.tables[instruction.micro_batch]
        if instruction.begins:
            self._begin(instruction)
        for value in instruction.uses(table):
            self._require(value in self.there, f"uses {_words(value)}, which is not there")
        if instruction.ends:
            self._end(instruction)
        for value in instruction.makes(table):
            self._require(value not in self.made, f"makes {_words(value)} a second time")
            self.made.add(value)
            self.there.add(value)

    def _begin(self, instruction: Instruction) -> None:
        self._require(instruction.buffer_id not in self.buffers, "forward into a buffer that is in use")
        self.buffers[instruction.buffer_id] = instruction.micro_batch
        count = len(self.buffers)
        self._require(count <= self.bound, f"{count} micro-batches in flight, the bound is {self.bound}")

    def _end(self, instruction: Instruction) -> None:
        m = instruction.micro_batch
        self._require(m not in self.ended, "a second update gradient for a micro-batch")
        if self.tables[m].trains:
            self._require(instruction.updates, "ends a micro-batch without the trunk's gradient")
        else:
            self._require(not instruction.updates, "a gradient for a trunk with nothing to train")
        self._require(self.buffers.pop(instruction.buffer_id, None) == m, "frees a buffer of another micro-batch")
        self.ended.append(m)
        # an input gradient outlives the graph that it was made with
        self.there = {value for value in self.there if value.micro_batch != m or value.kind == "input gradient"}

    def _end_of_batch(self, instruction: PipeInstruction) -> None:
        if isinstance(instruction, ReduceGrads):
            self._require(sorted(self.ended) == list(range(len(self.batch_strategy))), f"reduces after {self.ended}")
            self.reductions += 1
        elif isinstance(instruction, OptimizerStep):
            self._require(self.reductions == 1, "steps without a reduction")
            self.steps += 1

    def _compare(self, what: str, found: Sequence[Instruction], expected: list[tuple[int, int]]) -> None:
        """The (micro-batch, loss) of some instructions against what the strategies ask for."""
        seen = sorted((i.micro_batch, i.loss) for i in found)
        self._require(seen == sorted(expected), f"{what} {seen}, not {sorted(expected)}")

    def _require(self, holds: bool, message: str) -> None:
        if not holds:
            self.simulator.fail(self.stage, self.index, message)


def _words(value: Value) -> str:
    loss = "" if value.loss is None else f" of loss {value.loss}"
    return f"the {value.kind}{loss} of micro-batch {value.micro_batch}"
