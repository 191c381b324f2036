"""The one schedule of all widths: what a stage does in a batch, as DeepSpeed pipeline instructions.

1F1B is this schedule at N = K, and the micro-batches of a batch may differ in width. Whatever depends on the
mathematics is asked of :class:`Strategy`; the order is that of docs/how-it-works.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Self

from deepspeed.runtime.pipe.schedule import (
    BufferOpInstruction,
    ForwardPass,
    LoadMicroBatch,
    OptimizerStep,
    PipeInstruction,
    PipeSchedule,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    SendActivation,
    SendGrad,
)

from ibp_deepspeed.config.interlocking import Mode
from ibp_deepspeed.strategy.stage_strategy import StageStrategy
from ibp_deepspeed.strategy.strategy import Strategy
from ibp_deepspeed.strategy.timeline import BatchStrategy

__all__ = [
    "AuxLoss",
    "BorrowedProduct",
    "ForwardPass",
    "InputProduct",
    "InterlockedBackward",
    "InterlockedTrainSchedule",
    "LoadMicroBatch",
    "OptimizerStep",
    "PipeInstruction",
    "RecvActivation",
    "ReduceGrads",
    "RelayGrad",
    "RecvGrad",
    "SendActivation",
    "SendGrad",
]


class AuxLoss(BufferOpInstruction):
    """Forward and backward of a head: its gradient, and dL_loss at the states that it reads (buffer_id, micro_batch,
    loss)."""


class RelayGrad(BufferOpInstruction):
    """Receive dL_loss/dh_k of a loss that does not end in an update here yet (buffer_id, micro_batch, loss)."""


class InputProduct(BufferOpInstruction):
    """Vector-Jacobian product of dL_loss/dh_k to the stage's input (buffer_id, micro_batch, loss)."""


class BorrowedProduct(BufferOpInstruction):
    """Vector-Jacobian product of the loss before this stage's, through the stage's first layers, to the stage's input
    (buffer_id, micro_batch, loss)."""


class InterlockedBackward(BufferOpInstruction):
    """Accumulate the trunk's gradient and free the micro-batch's graph and buffers (buffer_id, micro_batch)."""


class InterlockedTrainSchedule(PipeSchedule):
    """The instructions of one stage in one batch; all micro-batches alike, or :meth:`for_batch`.

    Args:
        micro_batches: M, micro-batches in a batch.
        stages: K, pipeline stages.
        stage_id: k, the stage that executes the schedule.
        width: N, the interlocking width.
        hop_slack: extra slots for a gradient's travel over each boundary.
        mode: ``furthest`` or ``window``.
        aux_heads: whether stages before the last have heads (only backpropagation works without).
        borrow: whether these heads stand behind the first layers of the next stage.
    """

    def __init__(
        self,
        micro_batches: int,
        stages: int,
        stage_id: int,
        width: int,
        hop_slack: int = 0,
        mode: Mode = "furthest",
        aux_heads: bool = True,
        borrow: bool = False,
    ) -> None:
        super().__init__(micro_batches, stages, stage_id)
        strategy = Strategy(stages, width, mode, hop_slack, aux_heads=aux_heads, borrow=borrow)
        self.batch = BatchStrategy.uniform(strategy, micro_batches)

    @classmethod
    def for_batch(cls, batch: BatchStrategy, stage_id: int) -> Self:
        """The schedule of a batch whose micro-batches have strategies of their own."""
        first = batch[0]
        schedule = cls(
            len(batch),
            first.stages,
            stage_id,
            first.width,
            first.hop_slack,
            first.mode,
            aux_heads=first.aux_heads,
            borrow=first.borrow,
        )
        schedule.batch = batch
        return schedule

    def num_pipe_buffers(self) -> int:
        """Places for live micro-batches, which are told apart by their number modulo this."""
        return self.batch.buffers(self.stage_id)

    @cached_property
    def program(self) -> list[PipeInstruction]:
        """The instructions of all slots in order, made once."""
        return [instruction for commands in self.steps() for instruction in commands]

    @cached_property
    def tables(self) -> list[StageStrategy]:
        """What the strategy of each micro-batch means on this stage."""
        table = {strategy: StageStrategy.of(strategy, self.stage_id) for strategy in self.batch.micro_batches}
        return [table[strategy] for strategy in self.batch.micro_batches]

    def steps(self) -> Iterator[list[PipeInstruction]]:
        """Yield the instructions of slot 0, 1, … until every micro-batch is updated, then the optimizer step.

        A stage and the next one order their messages alike, by (slot, hops), whatever the strategies: what one sends
        at (s, i) the other expects at (s + hop, i + 1).
        """
        k, hop = self.stage_id, self.batch.hop
        slots = max(m + strategy.distance(k) * hop for m, strategy in enumerate(self.batch.micro_batches)) + 1
        for slot in range(slots):
            commands: list[PipeInstruction] = []
            if slot < self.micro_batches:
                commands += self._forward(slot)
            for hops in range(1, self.batch.distance(k) + 1):
                micro_batch = slot - hops * hop
                if self._valid_micro_batch(micro_batch):
                    commands += self._backward(micro_batch, hops)
            if slot == slots - 1:
                commands += [ReduceGrads(), OptimizerStep()]
            yield commands

    def _forward(self, micro_batch: int) -> list[PipeInstruction]:
        """Forward, the losses computed here, and their products upstream at once; without a reach, the update too."""
        k, strategy = self.stage_id, self.batch[micro_batch]
        at = self._at(micro_batch)
        commands: list[PipeInstruction] = [LoadMicroBatch(**at)]
        if not self.is_first_stage:
            commands.append(RecvActivation(**at))
        commands.append(ForwardPass(**at))
        if not self.is_last_stage:
            commands.append(SendActivation(**at))
        for loss in strategy.losses_at(k):
            if loss < self.stages - 1:
                commands.append(AuxLoss(**at, loss=loss))
            if loss < k:
                product = [BorrowedProduct(**at, loss=loss), SendGrad(**at, loss=loss)]
                commands += product if strategy.crosses(loss, k) else []
            elif strategy.distance(k) == 0:
                commands += self._update(micro_batch)
            elif strategy.crosses(loss, k):
                commands += [InputProduct(**at, loss=loss), SendGrad(**at, loss=loss)]
        return commands

    def _backward(self, micro_batch: int, hops: int) -> list[PipeInstruction]:
        """What the gradients of the losses of stage k + hops ask for: nothing beyond the micro-batch's own reach."""
        k, strategy = self.stage_id, self.batch[micro_batch]
        commands: list[PipeInstruction] = []
        for loss in strategy.losses_at(k + hops):
            commands += self._update(micro_batch) if loss == strategy.reach(k) else self._relay(micro_batch, loss)
        return commands

    def _relay(self, micro_batch: int, loss: int) -> list[PipeInstruction]:
        """Receive the gradient of another loss and pass it on, if anybody here or upstream uses it."""
        at, strategy = self._at(micro_batch), self.batch[micro_batch]
        if not strategy.crosses(loss, self.stage_id + 1):
            return []
        commands: list[PipeInstruction] = [RelayGrad(**at, loss=loss)]
        if strategy.crosses(loss, self.stage_id):
            commands += [InputProduct(**at, loss=loss), SendGrad(**at, loss=loss)]
        return commands

    def _update(self, micro_batch: int) -> list[PipeInstruction]:
        """The trunk's one update gradient of a micro-batch; what upstream uses is sent as early as it exists."""
        k, strategy, at = self.stage_id, self.batch[micro_batch], self._at(micro_batch)
        reach = strategy.reach(k)
        commands: list[PipeInstruction] = [] if strategy.distance(k) == 0 else [RecvGrad(**at, loss=reach)]
        send = [SendGrad(**at, loss=reach)] if strategy.crosses(reach, k) else []
        if send and not strategy.update_gives_input_gradient(k):
            return [*commands, InputProduct(**at, loss=reach), *send, InterlockedBackward(**at)]
        return [*commands, InterlockedBackward(**at), *send]

    def _at(self, micro_batch: int) -> dict[str, int]:
        return {"buffer_id": self._buffer_idx(micro_batch), "micro_batch": micro_batch}
