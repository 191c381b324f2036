"""The one schedule of all widths: what a stage does in a batch, as DeepSpeed pipeline instructions.

1F1B is this schedule at N = K, and the micro-batches of a batch may differ in width. Whatever depends on the
mathematics is asked of :class:`Strategy`; the order is that of docs/how-it-works.md.

Where the backward pass is split, W of a micro-batch stands where it is needed at the latest: before a forward pass that
would hold one micro-batch more than is allowed, before another update (so that gradients are always summed in the same
order), and at the end. A stage that has to wait for a message works off what is due earlier.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Self

from deepspeed.runtime.pipe.schedule import PipeSchedule

from ibp_deepspeed.config.interlocking import Mode
from ibp_deepspeed.schedule.instructions import (
    AuxLoss,
    BackwardBorrowed,
    BackwardInput,
    BackwardPass,
    BackwardThrough,
    BackwardWeight,
    ForwardPass,
    LoadMicroBatch,
    OptimizerStep,
    PipeInstruction,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    Release,
    SendActivation,
    SendGrad,
    UpdateInput,
)
from ibp_deepspeed.strategy.strategy import StageStrategy, Strategy
from ibp_deepspeed.strategy.timeline import BatchStrategy


class InterlockedTrainSchedule(PipeSchedule):
    """The instructions of one stage in one batch; all micro-batches alike, or :meth:`for_batch`.

    Args:
        micro_batches: M, micro-batches in a batch.
        stages: K, pipeline stages.
        stage_id: k, the stage that executes the schedule.
        width: N, the interlocking width.
        hop_slack: extra slots for a gradient's travel over each boundary.
        mode: ``furthest``, ``window`` or ``sum``.
        options: of :class:`Strategy`: ``exits``, ``borrow``, ``split_backward``, ``frozen``.
    """

    def __init__(
        self,
        micro_batches: int,
        stages: int,
        stage_id: int,
        width: int,
        hop_slack: int = 0,
        mode: Mode = "furthest",
        **options: Any,
    ) -> None:
        super().__init__(micro_batches, stages, stage_id)
        strategy = Strategy(stages, width, mode, hop_slack, **options)
        self.batch_strategy = BatchStrategy.uniform(strategy, micro_batches)

    @classmethod
    def for_batch(cls, batch_strategy: BatchStrategy, stage_id: int) -> Self:
        """The schedule of a batch whose micro-batches have strategies of their own."""
        schedule = cls(len(batch_strategy), batch_strategy.stages, stage_id, batch_strategy.stages)
        schedule.batch_strategy = batch_strategy
        return schedule

    def num_pipe_buffers(self) -> int:
        """Places for micro-batches in flight, which are told apart by their number modulo this."""
        return self._buffers

    @cached_property
    def _buffers(self) -> int:
        return self.batch_strategy.buffers(self.stage_id)

    @cached_property
    def program(self) -> list[PipeInstruction]:
        """The instructions of all slots in order, made once."""
        return [instruction for commands in self.steps() for instruction in commands]

    @cached_property
    def tables(self) -> list[StageStrategy]:
        """What the strategy of each micro-batch means on this stage."""
        table = {strategy: StageStrategy.of(strategy, self.stage_id) for strategy in self.batch_strategy.strategies}
        return [table[strategy] for strategy in self.batch_strategy.strategies]

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Yield the instructions of slot 0, 1, … until every micro-batch is updated, then the optimizer step.

        A stage and the next one order their messages alike, by (slot, distance), whatever the strategies: what one
        sends at (s, i) the other expects at (s + hop_slots, i + 1).
        """
        k, hop_slots = self.stage_id, self.batch_strategy.hop_slots
        strategies = enumerate(self.batch_strategy.strategies)
        slots = max(m + strategy.distance(k) * hop_slots for m, strategy in strategies) + 1
        due: list[BackwardWeight] = []
        for slot in range(slots):
            commands: list[PipeInstruction] = []
            if slot < self.micro_batches:
                commands += self._forward(slot)
            for distance in range(1, self.batch_strategy.distance(k) + 1):
                micro_batch = slot - distance * hop_slots
                if self._valid_micro_batch(micro_batch):
                    commands += self._backward(micro_batch, distance)
            commands = list(self._with_weight_gradients(commands, due))
            if slot == slots - 1:
                commands += [*due, ReduceGrads(), OptimizerStep()]
            yield commands

    def _with_weight_gradients(
        self, commands: list[PipeInstruction], due: list[BackwardWeight]
    ) -> Iterator[PipeInstruction]:
        """Put each W before the first instruction that can't do without it; ``due``: those that wait, oldest first."""
        for command in commands:
            if isinstance(command, LoadMicroBatch):
                while any(each.buffer_id == command.buffer_id for each in due):
                    yield due.pop(0)
            elif isinstance(command, BackwardPass):
                yield from due
                due.clear()
            yield command
            if isinstance(command, UpdateInput):
                due.append(BackwardWeight(**self._at(command.micro_batch)))

    def _forward(self, micro_batch: int) -> list[PipeInstruction]:
        """Forward, the losses computed here, their input gradients upstream; without a reach, the update too."""
        k, strategy = self.stage_id, self.batch_strategy[micro_batch]
        at, awaited = self._at(micro_batch), strategy.awaited(k)
        commands: list[PipeInstruction] = [LoadMicroBatch(**at)]
        if not self.is_first_stage:
            commands.append(RecvActivation(**at))
        commands.append(ForwardPass(**at))
        if not self.is_last_stage:
            commands.append(SendActivation(**at))
        for loss in strategy.placement.losses_at(k):
            if loss < self.stages - 1:
                commands.append(AuxLoss(**at, loss=loss))
            if loss < k:
                upstream = [BackwardBorrowed(**at, loss=loss), SendGrad(**at, loss=loss)]
                commands += upstream if strategy.crosses(loss, k) else []
            elif loss == awaited:
                commands += self._update(micro_batch)
            elif strategy.crosses(loss, k):
                commands += [BackwardInput(**at, loss=loss), SendGrad(**at, loss=loss)]
        return commands if awaited is not None else [*commands, Release(**at)]

    def _backward(self, micro_batch: int, distance: int) -> list[PipeInstruction]:
        """What the losses computed ``distance`` stages further ask for: nothing beyond the micro-batch's own reach."""
        k, strategy = self.stage_id, self.batch_strategy[micro_batch]
        commands: list[PipeInstruction] = []
        for loss in strategy.placement.losses_at(k + distance):
            commands += self._update(micro_batch) if loss == strategy.awaited(k) else self._relay(micro_batch, loss)
        return commands

    def _relay(self, micro_batch: int, loss: int) -> list[PipeInstruction]:
        """Receive the gradient of another loss and pass it on, if anybody here or upstream uses it."""
        at, strategy = self._at(micro_batch), self.batch_strategy[micro_batch]
        if not strategy.crosses(loss, self.stage_id + 1):
            return []
        commands: list[PipeInstruction] = [RecvGrad(**at, loss=loss)]
        if strategy.crosses(loss, self.stage_id):
            commands += [BackwardInput(**at, loss=loss), SendGrad(**at, loss=loss)]
        return commands

    def _update(self, micro_batch: int) -> list[PipeInstruction]:
        """The trunk's one update gradient of a micro-batch; what upstream uses is sent as early as it exists."""
        k, strategy, at = self.stage_id, self.batch_strategy[micro_batch], self._at(micro_batch)
        reach = strategy.awaited(k)
        assert reach is not None
        commands: list[PipeInstruction] = [] if strategy.distance(k) == 0 else [RecvGrad(**at, loss=reach)]
        send = [SendGrad(**at, loss=reach)] if strategy.crosses(reach, k) else []
        if not strategy.trains(k):
            return [*commands, BackwardThrough(**at), *send]
        if strategy.splits(k):
            return [*commands, UpdateInput(**at), *send]
        if send and not strategy.update_gives_input_gradient(k):
            return [*commands, BackwardInput(**at, loss=reach), *send, BackwardPass(**at)]
        return [*commands, BackwardPass(**at), *send]

    def _at(self, micro_batch: int) -> dict[str, Any]:
        return {"buffer_id": self._buffer_idx(micro_batch), "micro_batch": micro_batch}
